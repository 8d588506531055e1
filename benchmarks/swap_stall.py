"""How long do running streams stand still while adapters come and go?

A few streams of the base run; meanwhile one thing is done over and over, and the gaps between the
pieces of the streams are looked at. What is done, in phases that take turns:

- nothing: the streams alone
- request: a request of one token to an adapter that is resident; its prefill shares the steps
- load: unload an adapter, and load it from the disk to the device
- swap: unload an adapter, and send such a request, which loads it
- upload: a new adapter comes over REST, is checked, asked once, and deleted again
- merge: a merged copy is made and dropped

A swap costs what it adds to `request`. Gaps count from the time when all streams run to the time
when the first one ends; the worst is of those in which, wholly or in part, something was done. A
step is the median gap while nothing is done.

    python benchmarks/swap_stall.py --streams 8
"""

import argparse
import asyncio
import secrets
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.closed_loop import Work, by_model
from benchmarks.failure import BenchmarkFailure, exit_on_failure
from benchmarks.machine import Machine
from benchmarks.report import Report, Row, add_output_options, markdown_table
from benchmarks.server_options import (
    add_server_options,
    made_adapters,
    server_settings,
    target_of,
)
from benchmarks.server_process import Target
from benchmarks.sse_client import EventConnection, timing_of
from benchmarks.timing import RequestTiming, percentile
from benchmarks.workload import Prompts, adapter_name

NUM_ADAPTERS = 2
UPLOADED = "bench-upload"
HEADER = (
    "meanwhile",
    "times in a run",
    "one takes ms",
    "ITL p50 / p99 ms",
    "worst gap ms (lowest–highest)",
    "worst in steps",
)


@dataclass(frozen=True, slots=True)
class Stall:
    """One run of one phase: what was done while all streams ran, and the streams' gaps then.

    `worst_gap_s` is of the gaps in which something was done, or of all when nothing ever was.
    """

    action_times_s: tuple[float, ...]
    itl_p50_s: float
    itl_p99_s: float
    worst_gap_s: float


class Repeater:
    """Does something over and over on a thread of its own, until told to stop."""

    def __init__(self, action: Callable[[], None] | None, pause_s: float) -> None:
        self.spans: list[tuple[float, float]] = []
        self._action = action
        self._pause_s = pause_s
        self._is_stopping = threading.Event()
        self._failure: Exception | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> "Repeater":
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._is_stopping.set()
        self._thread.join()
        if self._failure is not None:
            raise self._failure

    def _run(self) -> None:
        while self._action is not None and not self._is_stopping.wait(self._pause_s):
            started_s = time.perf_counter()
            try:
                self._action()
            except Exception as failure:
                self._failure = failure
                return
            self.spans.append((started_s, time.perf_counter()))


class StallBench:
    """One server, and the phases run on it in turn."""

    def __init__(
        self, target: Target, work: Work, options: argparse.Namespace, upload: Path
    ) -> None:
        self._target = target
        self._work = work
        self._options = options
        self._upload = upload
        self._base_name = target.base_name()
        self.phases: Mapping[str, Callable[[], None] | None] = {
            "nothing": None,
            "request": lambda: self._ask(adapter_name(0)),
            "load": self._load,
            "swap": self._swap,
            "upload": self._upload_and_delete,
            "merge": self._merge,
        }

    def run_all(self) -> dict[str, list[Stall]]:
        """Do everything once, then run all phases in turn, several times."""
        for action in self.phases.values():
            if action is not None:
                action()
        stalls: dict[str, list[Stall]] = {name: [] for name in self.phases}
        for _ in range(self._options.repeats):
            for name, action in self.phases.items():
                stall = self._run(action)
                stalls[name].append(stall)
                print(f"{name}: worst gap {1e3 * stall.worst_gap_s:.0f} ms", file=sys.stderr)
        return stalls

    def _run(self, action: Callable[[], None] | None) -> Stall:
        with Repeater(action, self._options.pause) as repeater:
            timings = asyncio.run(self._stream_all())
        return stall_of(timings, repeater.spans)

    async def _stream_all(self) -> list[RequestTiming]:
        async with asyncio.TaskGroup() as streams:
            tasks = [streams.create_task(self._stream()) for _ in range(self._options.streams)]
        return [task.result() for task in tasks]

    async def _stream(self) -> RequestTiming:
        connection = EventConnection(self._target.url, self._target.api_key)
        payload = self._work.payload(by_model(self._base_name, None), self._work.num_tokens)
        started_s = time.perf_counter()
        try:
            return timing_of(started_s, await connection.post("/v1/completions", payload))
        finally:
            connection.close()

    def _ask(self, model: str) -> None:
        self._target.complete({"model": model}, self._work.prompts.take(), 1)

    def _load(self) -> None:
        name = adapter_name(1)
        self._target.unload(name)
        self._target.load(name, to_device=True)

    def _swap(self) -> None:
        name = adapter_name(1)
        self._target.unload(name)
        self._ask(name)

    def _upload_and_delete(self) -> None:
        self._target.upload(UPLOADED, self._upload)
        self._ask(UPLOADED)
        self._target.delete(UPLOADED)

    def _merge(self) -> None:
        self._target.merge(adapter_name(0))
        self._target.unmerge(adapter_name(0))


def stall_of(timings: Sequence[RequestTiming], spans: Sequence[tuple[float, float]]) -> Stall:
    """Look at the gaps, and at what was done, while all streams ran.

    Raises: BenchmarkFailure when they did not all run at one time.
    """
    begin = max(timing.piece_times_s[0] for timing in timings)
    end = min(timing.piece_times_s[-1] for timing in timings)
    gaps = [gap for timing in timings for gap in gaps_between(timing.piece_times_s, begin, end)]
    if not gaps:
        raise BenchmarkFailure("the streams did not all run at one time: raise --tokens")
    done = tuple(after - before for before, after in spans if before >= begin and after <= end)
    lengths = [after - before for before, after in gaps]
    worst = max(lengths)
    if spans:
        meanwhile = [
            after - before
            for before, after in gaps
            if any(before < ended and after > started for started, ended in spans)
        ]
        if not meanwhile:
            raise BenchmarkFailure("nothing was done while all streams ran: raise --tokens")
        worst = max(meanwhile)
    return Stall(done, percentile(lengths, 0.5), percentile(lengths, 0.99), worst)


def gaps_between(times_s: Sequence[float], begin: float, end: float) -> list[tuple[float, float]]:
    """Return the gaps between neighbours that both lie from begin to end, as (before, after)."""
    inside = [time_s for time_s in times_s if begin <= time_s <= end]
    return list(pairwise(inside))


def stall_table(stalls: Mapping[str, Sequence[Stall]]) -> str:
    """Return one row per phase: medians over its runs."""
    step_s = median(run.itl_p50_s for run in stalls["nothing"])
    return markdown_table(HEADER, [_row(name, runs, step_s) for name, runs in stalls.items()])


def _row(name: str, runs: Sequence[Stall], step_s: float) -> Row:
    times = [seconds for run in runs for seconds in run.action_times_s]
    worst = [run.worst_gap_s for run in runs]
    p50_s = median(run.itl_p50_s for run in runs)
    return (
        name,
        f"{median(len(run.action_times_s) for run in runs):g}" if name != "nothing" else "–",
        f"{1e3 * median(times):.0f}" if times else "–",
        f"{1e3 * p50_s:.1f} / {1e3 * median(run.itl_p99_s for run in runs):.1f}",
        f"{1e3 * median(worst):.0f} ({1e3 * min(worst):.0f}–{1e3 * max(worst):.0f})",
        f"{median(worst) / step_s:.1f}",
    )


def stall_results(stalls: Mapping[str, Sequence[Stall]]) -> list[dict[str, Any]]:
    """Return the same for JSON, with every run."""
    return [
        {"meanwhile": name, "runs": [asdict(run) for run in runs]} for name, runs in stalls.items()
    ]


def parsed_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_server_options(parser)
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--prompt-words", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=256, help="tokens out per stream")
    parser.add_argument("--pause", type=float, default=0.5, help="seconds between two actions")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=None, help="of the prompts; default: a new one")
    add_output_options(parser)
    options = parser.parse_args()
    if options.seed is None:
        options.seed = secrets.randbelow(1 << 32)
    return options


def settings_of(options: argparse.Namespace, target: Target) -> dict[str, object]:
    """Return what is printed above the table."""
    return {
        **server_settings(options, target),
        "work": f"{options.streams} streams of the base, prompts of {options.prompt_words} words, "
        f"{options.tokens} tokens out, greedy; {options.pause:g} s between two actions",
        "adapters": f"rank {options.rank} on all seven linears",
        "runs": f"{options.repeats} of each phase, in turn; medians",
        "seed": options.seed,
    }


def main() -> None:
    """Measure and report."""
    options = parsed_options()
    machine = Machine.here()
    work = Work(Prompts(options.prompt_words, options.seed), options.tokens, 1)
    with (
        made_adapters(options, NUM_ADAPTERS + 1) as folders,
        target_of(options, NUM_ADAPTERS) as target,
    ):
        stalls = StallBench(target, work, options, folders[-1]).run_all()
        settings = settings_of(options, target)
    report = Report(
        "Streams while adapters change",
        machine,
        settings,
        stall_table(stalls),
        stall_results(stalls),
    )
    report.publish(options.markdown, options.json)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the server is stopped then too
    with exit_on_failure():
        main()
