"""How many tokens per second does a server give, and how long do its clients wait?

A closed loop over HTTP: each of C clients sends its next request when the last one has ended.
Requests stream, are greedy, ignore the end of text, and use N adapters in turn. Drives
`quickchange serve`, which it starts itself, or any OpenAI-compatible server given by --url.

    python benchmarks/throughput.py --model builtin:smollm2-135m
    python benchmarks/throughput.py --url http://127.0.0.1:8000 --scenarios base:1,base:16
"""

import argparse
import asyncio
import itertools
import secrets
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.failure import BenchmarkFailure, exit_on_failure
from benchmarks.machine import Machine
from benchmarks.report import (
    Report,
    add_output_options,
    option_type,
    scenario_results,
    scenario_table,
)
from benchmarks.server_process import Target, base_folder, checkpoint_dtype, serving
from benchmarks.sse_client import EventConnection, timing_of
from benchmarks.timing import Figures, RequestTiming, summarise
from benchmarks.workload import (
    DEFAULT_SCENARIOS,
    Prompts,
    Scenario,
    adapter_name,
    max_adapters,
    parse_scenarios,
)

Runs = dict[Scenario, list[Figures]]


@dataclass(frozen=True, slots=True)
class Work:
    """What each client asks for, and how often."""

    prompts: Prompts
    num_tokens: int
    requests_per_client: int

    def payload(self, model: str, num_tokens: int) -> dict[str, Any]:
        """Return the body of one request for a new prompt."""
        return {
            "model": model,
            "prompt": self.prompts.take(),
            "max_tokens": num_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }


class ClosedLoop:
    """Clients in a closed loop against one server."""

    def __init__(self, target: Target, work: Work) -> None:
        self._target = target
        self._work = work
        self._base_name = target.base_name()

    async def warm_up(self, scenario: Scenario) -> None:
        """Send one short request per client and per adapter, so that all is loaded."""
        num_requests = max(scenario.num_clients, scenario.num_adapters)
        await self._run(scenario, num_requests, num_tokens=4)

    async def measure(self, scenario: Scenario) -> Figures:
        """Run a scenario once."""
        client_cpu_s, server_cpu_s = time.process_time(), self._target.cpu_s()
        num_requests = scenario.num_clients * self._work.requests_per_client
        timings = await self._run(scenario, num_requests, self._work.num_tokens)
        short = sum(timing.num_tokens != self._work.num_tokens for timing in timings)
        if short:
            raise BenchmarkFailure(
                f"{short} of {num_requests} answers did not have {self._work.num_tokens} tokens: "
                "the server does not know ignore_eos, or its context is too short"
            )
        client_cpu_s = time.process_time() - client_cpu_s
        return summarise(timings, client_cpu_s, self._target.cpu_s() - server_cpu_s)

    async def _run(
        self, scenario: Scenario, num_requests: int, num_tokens: int
    ) -> list[RequestTiming]:
        waiting = iter(range(num_requests))
        timings: list[RequestTiming] = []
        async with asyncio.TaskGroup() as clients:
            for _ in range(scenario.num_clients):
                clients.create_task(self._client(scenario, waiting, num_tokens, timings))
        return timings

    async def _client(
        self,
        scenario: Scenario,
        waiting: Iterator[int],
        num_tokens: int,
        timings: list[RequestTiming],
    ) -> None:
        connection = EventConnection(self._target.url, self._target.api_key)
        try:
            for index in waiting:
                payload = self._work.payload(self._model(scenario, index), num_tokens)
                started_s = time.perf_counter()
                events = await connection.post("/v1/completions", payload)
                timings.append(timing_of(started_s, events))
        finally:
            connection.close()

    def _model(self, scenario: Scenario, request_index: int) -> str:
        adapter = scenario.adapter_of(request_index)
        return self._base_name if adapter is None else adapter_name(adapter)


def run_all(target: Target, work: Work, scenarios: tuple[Scenario, ...], repeats: int) -> Runs:
    """Warm up, then run every scenario in turn, and all of them again: noise hits all alike."""
    loop = ClosedLoop(target, work)
    runs: Runs = {scenario: [] for scenario in scenarios}
    for scenario in scenarios:
        with _prepared(target, scenario):
            asyncio.run(loop.warm_up(scenario))
    for repeat, scenario in itertools.product(range(repeats), scenarios):
        with _prepared(target, scenario):
            figures = asyncio.run(loop.measure(scenario))
        runs[scenario].append(figures)
        _say(f"{repeat + 1}/{repeats} {scenario.title}: {figures.tokens_per_s:.1f} tokens/s")
    return runs


@contextmanager
def _prepared(target: Target, scenario: Scenario) -> Iterator[None]:
    """Hold the merged copy that a merged scenario needs."""
    if scenario.is_merged:
        target.merge(adapter_name(0))
    try:
        yield
    finally:
        if scenario.is_merged:
            target.unmerge(adapter_name(0))


@contextmanager
def target_of(options: argparse.Namespace) -> Iterator[Target]:
    """Give the running server of --url, or a new one; the adapters are there in both cases."""
    if options.url:
        target = Target(options.url, api_key=options.api_key)
        _upload_adapters(target, options, is_wanted=options.upload)
        yield target
        return
    arguments = ["--model", options.model, "--dtype", options.dtype, "--device", options.device]
    with serving([*arguments, *shlex.split(options.server_args)]) as target:
        _upload_adapters(target, options, is_wanted=True)
        yield target


def _upload_adapters(target: Target, options: argparse.Namespace, *, is_wanted: bool) -> None:
    count = max_adapters(options.scenarios)
    if not is_wanted or not count:
        return
    with tempfile.TemporaryDirectory() as folder:
        script = str(Path(__file__).with_name("make_adapters.py"))
        base = str(base_folder(options.model))
        shape = ["--count", str(count), "--rank", str(options.rank)]
        subprocess.run([sys.executable, script, base, folder, *shape], check=True)
        for index in range(count):
            target.upload(adapter_name(index), Path(folder) / adapter_name(index))


def settings_of(options: argparse.Namespace, target: Target) -> dict[str, object]:
    """Return what is printed above the table."""
    settings: dict[str, object] = {
        "server": options.name or ("quickchange serve" if not options.url else "a running server"),
        "base": target.base_name(),
        "work": f"prompts of {options.prompt_words} words, {options.tokens} tokens out, greedy, "
        "end of text ignored, streaming /v1/completions, every prompt new",
        "adapters": f"rank {options.rank} on all seven linears, in turn",
        "runs": f"{options.repeats} interleaved, {options.requests} requests a client in each; "
        "medians of the runs",
        "seed": options.seed,
    }
    if target.process:
        settings["dtype, device"] = f"{_dtype(options)}, {options.device}"
        settings["server's resident set at the end"] = f"{target.resident_mib():.0f} MiB"
        settings["server's options"] = options.server_args or "defaults"
    return settings


def _dtype(options: argparse.Namespace) -> str:
    """Return the dtype, with what `auto` means for this base."""
    if options.dtype != "auto":
        return str(options.dtype)
    return f"auto ({checkpoint_dtype(base_folder(options.model))} in the checkpoint)"


def parsed_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--url", help="a running server; default: start `quickchange serve`")
    parser.add_argument("--api-key", help="sent as a bearer token")
    parser.add_argument(
        "--upload", action="store_true", help="with --url: upload the adapters; they stay"
    )
    parser.add_argument("--name", help="what the report calls the server")
    parser.add_argument("--model", default="builtin:smollm2-135m", help="the base: folder or id")
    parser.add_argument("--device", default="auto", help="of the server that is started")
    parser.add_argument("--dtype", default="auto", help="of the server that is started")
    parser.add_argument("--server-args", default="", help="more options for `quickchange serve`")
    parser.add_argument(
        "--scenarios",
        type=option_type(parse_scenarios),
        default=parse_scenarios(DEFAULT_SCENARIOS),
        help=f"adapters:clients with commas; adapters may be base or merged ({DEFAULT_SCENARIOS})",
    )
    parser.add_argument("--prompt-words", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=64, help="tokens out per request")
    parser.add_argument("--requests", type=int, default=2, help="requests per client and run")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--seed", type=int, default=None, help="of the prompts; default: a new one")
    add_output_options(parser)
    options = parser.parse_args()
    if options.seed is None:
        options.seed = secrets.randbelow(1 << 32)
    return options


def main() -> None:
    """Measure and report."""
    options = parsed_options()
    machine = Machine.here()
    work = Work(Prompts(options.prompt_words, options.seed), options.tokens, options.requests)
    with target_of(options) as target:
        runs = run_all(target, work, options.scenarios, options.repeats)
        settings = settings_of(options, target)
    report = Report(
        "Throughput over HTTP", machine, settings, scenario_table(runs), scenario_results(runs)
    )
    report.publish(options.markdown, options.json)


def _say(sentence: str) -> None:
    print(sentence, file=sys.stderr, flush=True)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the server is stopped then too
    with exit_on_failure():
        main()
