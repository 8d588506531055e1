"""How long does a quiet tenant wait for its first token while another tenant floods the server?

Two tenants over HTTP, with a key each. The flood keeps many more requests running and waiting than
there are rows, over several adapters; the quiet tenant asks now and then, for its own adapter.
Its TTFT is measured alone and beside the flood, in turns. The bound is what it takes alone (p95)
and two steps of a full batch more; a step is the mean of `quickchange_step_seconds` while the flood
runs.

    python benchmarks/fairness.py --model builtin:smollm2-135m --rows 32 --flood-clients 64
"""

import argparse
import asyncio
import random
import secrets
import shlex
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import httpx

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.closed_loop import Work, by_model
from benchmarks.failure import BenchmarkFailure, exit_on_failure
from benchmarks.machine import Machine
from benchmarks.report import Report, add_output_options, markdown_table
from benchmarks.server_options import made_adapters
from benchmarks.server_process import Target, serving
from benchmarks.sse_client import EventConnection, timing_of
from benchmarks.timing import percentile
from benchmarks.workload import Prompts

FULL_STEPS = 2
FILL_TIMEOUT_S = 120.0
COUNT_TIMEOUT_S = 20.0
HEADER = ("the quiet tenant", "requests", "TTFT p50 ms", "TTFT p95 ms", "TTFT worst ms")
QUIET_TOKENS = 8


@dataclass(frozen=True, slots=True)
class Outcome:
    """TTFT of the quiet tenant's requests, and what a step took while the flood ran."""

    alone_s: tuple[float, ...]
    beside_s: tuple[float, ...]
    step_s: float

    @property
    def bound_s(self) -> float:
        """What p95 beside the flood is held against."""
        return percentile(self.alone_s, 0.95) + FULL_STEPS * self.step_s

    @property
    def is_within(self) -> bool:
        """Whether the bound holds."""
        return percentile(self.beside_s, 0.95) <= self.bound_s


@dataclass(frozen=True, slots=True)
class Tenant:
    """One tenant's way to the server, and the models that it asks for in turn."""

    target: Target
    models: tuple[dict[str, Any], ...]


class FairnessBench:
    """One server, its two tenants, and the phases run on it in turn."""

    def __init__(
        self, operator: Target, flood: Tenant, quiet: Tenant, options: argparse.Namespace
    ) -> None:
        self._operator = operator
        self._flood = flood
        self._quiet = quiet
        self._options = options
        prompts = Prompts(options.prompt_words, options.seed)
        self._work = Work(prompts, options.tokens, 1)
        self._rng = random.Random(options.seed)

    async def run(self) -> Outcome:
        """Measure alone and beside the flood, in turns."""
        alone: list[float] = []
        beside: list[float] = []
        steps: list[tuple[float, float]] = []
        await self._ask_quietly(2)
        for _ in range(self._options.repeats):
            alone += await self._ask_quietly(self._options.requests)
            times, step = await self._beside_flood()
            beside += times
            steps.append(step)
        seconds, count = (sum(part) for part in zip(*steps, strict=True))
        return Outcome(tuple(alone), tuple(beside), seconds / count)

    async def _ask_quietly(self, number: int) -> list[float]:
        """Send so many requests, one after another, with pauses by chance between them."""
        connection = EventConnection(self._quiet.target.url, self._quiet.target.api_key)
        times = []
        try:
            for index in range(number):
                await asyncio.sleep(self._rng.uniform(0, 2 * self._options.pause))
                selection = self._quiet.models[index % len(self._quiet.models)]
                payload = self._work.payload(selection, QUIET_TOKENS)
                started_s = time.perf_counter()
                events = await connection.post("/v1/completions", payload)
                times.append(timing_of(started_s, events).ttft_s)
        finally:
            connection.close()
        return times

    async def _beside_flood(self) -> tuple[list[float], tuple[float, float]]:
        clients = [asyncio.create_task(self._pour(i)) for i in range(self._options.flood_clients)]
        try:
            await self._until_full(clients)
            before = await asyncio.to_thread(self._step_seconds)
            times = await self._ask_quietly(self._options.requests)
            after = await self._steps_after(before)
        finally:
            for client in clients:
                client.cancel()
            ended = await asyncio.gather(*clients, return_exceptions=True)
        for each in ended:
            if isinstance(each, Exception):
                raise each
        return times, (after[0] - before[0], after[1] - before[1])

    async def _steps_after(self, before: tuple[float, float]) -> tuple[float, float]:
        """Return seconds and number of steps once more are counted: metrics are a little old."""
        deadline_s = time.monotonic() + COUNT_TIMEOUT_S
        while time.monotonic() < deadline_s:
            after = await asyncio.to_thread(self._step_seconds)
            if after[1] > before[1]:
                return after
            await asyncio.sleep(0.1)
        raise BenchmarkFailure("the server counted no step while the flood ran")

    async def _pour(self, client: int) -> None:
        """Ask without pause; answers' lengths differ, so that rows do not end together."""
        connection = EventConnection(self._flood.target.url, self._flood.target.api_key)
        rng = random.Random(client)
        try:
            while True:
                selection = rng.choice(self._flood.models)
                num_tokens = rng.randint(self._options.tokens // 2, self._options.tokens)
                payload = self._work.payload(selection, num_tokens)
                timing_of(0.0, await connection.post("/v1/completions", payload))
        finally:
            connection.close()

    async def _until_full(self, clients: Sequence["asyncio.Task[None]"]) -> None:
        """Wait until all rows are the flood's and more of it waits."""
        deadline_s = time.monotonic() + FILL_TIMEOUT_S
        while time.monotonic() < deadline_s:
            failed = [task for task in clients if task.done()]
            if failed:
                await failed[0]
            running = await asyncio.to_thread(self._metric, "requests_running")
            waiting = await asyncio.to_thread(self._metric, "requests_waiting")
            if running + 1 >= self._options.rows and waiting:
                return
            await asyncio.sleep(0.1)
        raise BenchmarkFailure("the flood never filled the rows: raise --flood-clients or --tokens")

    def _step_seconds(self) -> tuple[float, float]:
        return self._metric("step_seconds_sum"), self._metric("step_seconds_count")

    def _metric(self, name: str) -> float:
        """Return a metric, summed over its labels."""
        headers = {"authorization": f"Bearer {self._operator.api_key}"}
        answer = httpx.get(f"{self._operator.url}/metrics", headers=headers, timeout=60)
        answer.raise_for_status()
        start = f"quickchange_{name}"
        lines = [
            line for line in answer.text.splitlines() if line.startswith((start + "{", start + " "))
        ]
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines)


@contextmanager
def two_tenants(options: argparse.Namespace) -> Iterator[tuple[Target, Tenant, Tenant]]:
    """Start a server with keys; yield it as its operator, the flood and the quiet tenant see it."""
    secret = secrets.token_urlsafe(32)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        key_file = Path(folder) / "admin-key"
        key_file.touch(mode=0o600)
        key_file.write_text(secret, encoding="utf-8")
        arguments = ["--model", options.model, "--admin-key-file", str(key_file)]
        arguments += ["--max-batch-rows", str(options.rows)]
        arguments += ["--max-queue", str(4 * options.flood_clients)]
        target = stack.enter_context(serving([*arguments, *shlex.split(options.server_args)]))
        operator = replace(target, api_key=secret)
        folders: list[Path] = []
        if options.adapters:
            folders = stack.enter_context(made_adapters(options, options.adapters + 1))
        yield (
            operator,
            _tenant(operator, "flood", folders[:-1]),
            _tenant(operator, "quiet", folders[-1:]),
        )


def _tenant(operator: Target, name: str, folders: Sequence[Path]) -> Tenant:
    """Make a tenant's key, and upload what it asks for; without adapters it asks for the base."""
    headers = {"authorization": f"Bearer {operator.api_key}"}
    body = {"tenant": name, "scopes": ["generate", "adapters:read", "adapters:write"]}
    answer = httpx.post(f"{operator.url}/v1/keys", json=body, headers=headers, timeout=60)
    if answer.is_error:
        raise BenchmarkFailure(f"no key for the tenant {name}: {answer.text[:300]}")
    target = replace(operator, api_key=answer.json()["secret"])
    for folder in folders:
        target.upload(folder.name, folder)
    base = dict(by_model(target.base_name(), None))
    return Tenant(target, tuple({"model": folder.name} for folder in folders) or (base,))


def outcome_table(outcome: Outcome) -> str:
    """Return the two measurements, and the bound with its verdict."""
    rows = [
        _row("alone", outcome.alone_s),
        _row("beside the flood", outcome.beside_s),
        ("bound", "", "", f"{1e3 * outcome.bound_s:.0f}", ""),
    ]
    verdict = "holds" if outcome.is_within else "does not hold"
    step = f"A step of the full batch takes {1e3 * outcome.step_s:.1f} ms (mean)"
    return f"{markdown_table(HEADER, rows)}\n\n{step}; the bound {verdict}."


def _row(title: str, times_s: Sequence[float]) -> tuple[str, ...]:
    figures = [percentile(times_s, 0.5), percentile(times_s, 0.95), max(times_s)]
    return (title, str(len(times_s)), *(f"{1e3 * each:.0f}" for each in figures))


def parsed_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="builtin:smollm2-135m", help="the base: folder or id")
    parser.add_argument("--server-args", default="", help="more options for `quickchange serve`")
    parser.add_argument("--rank", type=int, default=16, help="of the adapters")
    parser.add_argument("--rows", type=int, default=32, help="--max-batch-rows of the server")
    parser.add_argument("--flood-clients", type=int, default=64, help="that never pause")
    parser.add_argument("--adapters", type=int, default=4, help="of the flood; 0: the base alone")
    parser.add_argument("--prompt-words", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=128, help="most tokens of a flood's answer")
    parser.add_argument("--requests", type=int, default=40, help="of the quiet tenant, per phase")
    parser.add_argument("--pause", type=float, default=0.5, help="mean seconds between them")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=None, help="of the prompts; default: a new one")
    add_output_options(parser)
    options = parser.parse_args(arguments)
    if options.seed is None:
        options.seed = secrets.randbelow(1 << 32)
    return options


def settings_of(options: argparse.Namespace, target: Target) -> dict[str, object]:
    """Return what is printed above the table."""
    adapters = f"{options.adapters} of the flood and 1 of the quiet tenant, rank {options.rank}"
    return {
        "server": "quickchange serve",
        "base": target.base_name(),
        "server's options": f"--max-batch-rows {options.rows} {options.server_args}".strip(),
        "flood": f"{options.flood_clients} clients without pause, answers of "
        f"{options.tokens // 2} to {options.tokens} tokens",
        "quiet tenant": f"one request at a time, {options.pause:g} s between two on average, "
        f"{QUIET_TOKENS} tokens out",
        "prompts": f"{options.prompt_words} words, every one new",
        "adapters": adapters if options.adapters else "none: both ask for the base",
        "runs": f"{options.repeats} of each, in turn",
        "seed": options.seed,
    }


def main() -> None:
    """Measure and report."""
    options = parsed_options()
    machine = Machine.here()
    with two_tenants(options) as (operator, flood, quiet):
        outcome = asyncio.run(FairnessBench(operator, flood, quiet, options).run())
        settings = settings_of(options, operator)
    results = [{**asdict(outcome), "bound_s": outcome.bound_s, "holds": outcome.is_within}]
    report = Report(
        "A quiet tenant beside a flood", machine, settings, outcome_table(outcome), results
    )
    report.publish(options.markdown, options.json)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the server is stopped then too
    with exit_on_failure():
        main()
