"""What does everything around the engine cost: in time to first token, in memory, at the start?

Three questions, one table each:

- TTFT over HTTP against TTFT of the bare engine, one request at a time, the same prompts. Server
  and engine run in processes of their own, one at a time, in turn.
- The server's resident set by part, as it says of itself, and what part of it has no name (`rest`).
- Seconds from the start of the process until /readyz answers 200, once everything was read before.

    python benchmarks/overhead.py --requests 50
"""

import argparse
import asyncio
import json
import secrets
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.closed_loop import Work, by_model
from benchmarks.failure import BenchmarkFailure, exit_on_failure
from benchmarks.machine import Machine
from benchmarks.report import Report, add_output_options, markdown_table
from benchmarks.server_process import Target, base_folder, last_line, serving
from benchmarks.sse_client import EventConnection, timing_of
from benchmarks.timing import percentile
from benchmarks.workload import Prompts

MIB = 1 << 20
NUM_TOKENS = 2
NUM_WARM_UP = 5
PROBE_TIMEOUT_S = 900.0


@dataclass(slots=True)
class Overhead:
    """What was measured: one entry per round."""

    engine_ttfts_s: list[list[float]] = field(default_factory=list)
    http_ttfts_s: list[list[float]] = field(default_factory=list)
    starts_s: list[float] = field(default_factory=list)
    memory_bytes: dict[str, int] = field(default_factory=dict)

    def http_minus_engine_s(self) -> list[float]:
        """Return, per round, how much later half of the first tokens came over HTTP."""
        pairs = zip(self.http_ttfts_s, self.engine_ttfts_s, strict=True)
        return [percentile(http, 0.5) - percentile(engine, 0.5) for http, engine in pairs]


class OverheadBench:
    """Server and bare engine in turn, over the same base."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self._options = options
        self._folder = folder
        self._arguments = ["--model", str(folder), "--device", options.device]
        self._arguments += shlex.split(options.server_args)

    def run_all(self) -> Overhead:
        """Start everything once, then measure in turn, several times."""
        found = Overhead()
        with serving(self._arguments):
            pass
        for repeat in range(self._options.repeats):
            seed = self._options.seed + repeat
            found.engine_ttfts_s.append(self._probe("engine", seed)["ttfts_s"])
            self._measure_server(found, Prompts(self._options.prompt_words, seed))
            print(f"round {repeat + 1}: {_difference(found, -1):.1f} ms", file=sys.stderr)
        return found

    def _measure_server(self, found: Overhead, prompts: Prompts) -> None:
        started_s = time.perf_counter()
        with serving(self._arguments) as target:
            found.starts_s.append(time.perf_counter() - started_s)
            work = Work(prompts, NUM_TOKENS, 1)
            ttfts_s = asyncio.run(http_ttfts(target, work, self._options.requests + NUM_WARM_UP))
            found.http_ttfts_s.append(ttfts_s[NUM_WARM_UP:])
            found.memory_bytes = target.process_memory()

    def _probe(self, kind: str, seed: int = 0) -> dict[str, Any]:
        """Run a part of overhead_probe.py in a process of its own."""
        options = self._options
        script = str(Path(__file__).with_name("overhead_probe.py"))
        command = [sys.executable, script, kind, str(self._folder), "--device", options.device]
        command += ["--prompt-words", str(options.prompt_words), "--seed", str(seed)]
        command += ["--requests", str(options.requests + NUM_WARM_UP)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=PROBE_TIMEOUT_S)
        if done.returncode:
            raise BenchmarkFailure(f"overhead_probe.py {kind} failed: {last_line(done.stderr)}")
        found: dict[str, Any] = json.loads(done.stdout)
        if "ttfts_s" in found:
            found["ttfts_s"] = found["ttfts_s"][NUM_WARM_UP:]
        return found


async def http_ttfts(target: Target, work: Work, num_requests: int) -> list[float]:
    """Return the TTFTs of streams that follow one another on one connection."""
    connection = EventConnection(target.url)
    selection = by_model(await asyncio.to_thread(target.base_name), None)
    ttfts_s = []
    try:
        for _ in range(num_requests):
            payload = work.payload(selection, work.num_tokens)
            started_s = time.perf_counter()
            events = await connection.post("/v1/completions", payload)
            ttfts_s.append(timing_of(started_s, events).ttft_s)
    finally:
        connection.close()
    return ttfts_s


def memory_rows(memory_bytes: Mapping[str, int]) -> list[tuple[str, str, str]]:
    """Return each part of the resident set, in MiB and as its share."""
    total = memory_bytes["total"]
    return [
        (part, f"{size / MIB:.0f}", f"{100 * size / total:.1f}")
        for part, size in memory_bytes.items()
    ]


def overhead_tables(found: Overhead) -> str:
    """Return the three tables."""
    engine = [seconds for each in found.engine_ttfts_s for seconds in each]
    http = [seconds for each in found.http_ttfts_s for seconds in each]
    times = markdown_table(
        ("TTFT", "p50 ms", "p99 ms"),
        [
            ("bare engine", _ms(percentile(engine, 0.5)), _ms(percentile(engine, 0.99))),
            ("over HTTP", _ms(percentile(http, 0.5)), _ms(percentile(http, 0.99))),
            ("difference, median of rounds", _ms(median(found.http_minus_engine_s())), "–"),
        ],
    )
    memory = markdown_table(("part", "MiB", "%"), memory_rows(found.memory_bytes))
    start = markdown_table(
        ("warm start to /readyz", "s"),
        [
            ("median", f"{median(found.starts_s):.1f}"),
            ("lowest–highest", f"{min(found.starts_s):.1f}–{max(found.starts_s):.1f}"),
        ],
    )
    return f"{times}\n\n{memory}\n\n{start}"


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.1f}"


def _difference(found: Overhead, repeat: int) -> float:
    return 1e3 * found.http_minus_engine_s()[repeat]


def settings_of(options: argparse.Namespace, folder: Path) -> dict[str, object]:
    """Return what is printed above the tables."""
    return {
        "base": folder.name,
        "device": options.device,
        "server's options": options.server_args or "defaults",
        "work": f"prompts of {options.prompt_words} words, {NUM_TOKENS} tokens out, greedy, one "
        "request at a time, the same prompts for both sides",
        "runs": f"{options.repeats} rounds of {options.requests} requests, after {NUM_WARM_UP} "
        "that do not count",
        "seed": options.seed,
    }


def parsed_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="builtin:smollm2-135m", help="the base: folder or id")
    parser.add_argument("--device", default="cpu", help="cpu or cuda[:N]")
    parser.add_argument("--server-args", default="", help="more options for `quickchange serve`")
    parser.add_argument("--prompt-words", type=int, default=64)
    parser.add_argument("--requests", type=int, default=50, help="requests per round and side")
    parser.add_argument("--repeats", type=int, default=3, help="rounds")
    parser.add_argument("--seed", type=int, default=None, help="of the prompts; default: a new one")
    add_output_options(parser)
    options = parser.parse_args()
    if options.seed is None:
        options.seed = secrets.randbelow(1 << 32)
    return options


def results_of(found: Overhead) -> Sequence[Mapping[str, Any]]:
    """Return everything for JSON."""
    return [{**asdict(found), "http_minus_engine_s": found.http_minus_engine_s()}]


def main() -> None:
    """Measure and report."""
    options = parsed_options()
    machine = Machine.here()
    folder = base_folder(options.model)
    found = OverheadBench(options, folder).run_all()
    report = Report(
        "Around the engine",
        machine,
        settings_of(options, folder),
        overhead_tables(found),
        results_of(found),
    )
    report.publish(options.markdown, options.json)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the server is stopped then too
    with exit_on_failure():
        main()
