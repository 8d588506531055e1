"""How long does a scrape of /metrics take, with thousands of adapters and hundreds of answers?

Gateways scrape every 50 ms, so it has to be cheap and must not wait for the engine. Thousands of
adapters are registered in a store before the server starts; then a process of its own scrapes over
one kept connection, first while nothing runs, then while all streams do, which use dozens of
adapters in turn. Times are from sending to the last byte. A scrape beside streams waits for the
event loop's turn, which streams share: `turn` is the same for /livez, which does nothing.

    python benchmarks/metrics_latency.py --registered 5000 --streams 200
"""

import argparse
import asyncio
import hashlib
import http.client
import json
import multiprocessing
import re
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.closed_loop import Work, by_model
from benchmarks.failure import BenchmarkFailure, exit_on_failure
from benchmarks.machine import Machine
from benchmarks.report import Report, Row, add_output_options, markdown_table
from benchmarks.server_options import add_server_options, server_settings, target_of
from benchmarks.server_process import Target
from benchmarks.sse_client import EventConnection
from benchmarks.timing import percentile
from benchmarks.workload import Prompts

HEADER = ("meanwhile", "asked", "scrapes", "p50 ms", "p99 ms", "worst ms", "KiB", "lines")
FULL_S = 300.0
RUNNING = re.compile(r"^quickchange_requests_running ([0-9.]+)$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Scrapes:
    """Scrapes of one path in one state, seconds each."""

    meanwhile: str
    path: str
    seconds: tuple[float, ...]
    num_bytes: int
    num_lines: int


def scrape(url: str, path: str, interval_s: float, duration_s: float) -> tuple[list[float], str]:
    """Ask for a path over and over on one connection; return the times and the last text."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=60)
    seconds, text = [], ""
    end_s = time.perf_counter() + duration_s
    while time.perf_counter() < end_s:
        started_s = time.perf_counter()
        connection.request("GET", path)
        answer = connection.getresponse()
        text = answer.read().decode()
        seconds.append(time.perf_counter() - started_s)
        if answer.status != 200:
            raise BenchmarkFailure(f"GET {path} answered {answer.status}: {text[:300]}")
        time.sleep(max(0.0, interval_s - seconds[-1]))
    connection.close()
    return seconds, text


class LatencyBench:
    """Scrapes of one server, idle and with streams."""

    def __init__(self, target: Target, options: argparse.Namespace) -> None:
        self._target = target
        self._options = options
        self._base = target.base_name()

    def run_all(self) -> list[Scrapes]:
        """Measure idle, then with all streams running."""
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            found = [*self._measure(pool, "nothing")]
            return found + asyncio.run(self._measure_beside_streams(pool))

    def _measure(self, pool: Any, meanwhile: str) -> Iterator[Scrapes]:
        for path in ("/metrics", "/livez"):
            times = self._options.interval, self._options.seconds
            seconds, text = pool.apply(scrape, (self._target.url, path, *times))
            name = "turn" if path == "/livez" else path
            yield Scrapes(meanwhile, name, tuple(seconds), len(text), text.count("\n"))

    async def _measure_beside_streams(self, pool: Any) -> list[Scrapes]:
        streams = [asyncio.create_task(self._stream(at)) for at in range(self._options.streams)]
        try:
            await self._wait_until_all_run(streams)
            what = f"{self._options.streams} streams"
            return await asyncio.to_thread(lambda: list(self._measure(pool, what)))
        finally:
            for stream in streams:
                stream.cancel()
            await asyncio.gather(*streams, return_exceptions=True)

    async def _stream(self, at: int) -> None:
        """Answer after answer on one connection, with one of the adapters in use."""
        connection = EventConnection(self._target.url)
        work = Work(Prompts(self._options.prompt_words, at), self._options.tokens, 1)
        selection = by_model(self._base, at % self._options.used)
        try:
            while True:
                await connection.post("/v1/completions", work.payload(selection, work.num_tokens))
        finally:
            connection.close()

    async def _wait_until_all_run(self, streams: Sequence["asyncio.Task[None]"]) -> None:
        """Raises: BenchmarkFailure."""
        deadline_s = time.monotonic() + FULL_S
        while await asyncio.to_thread(num_running, self._target.url) < len(streams):
            for stream in streams:
                if stream.done():
                    await stream
            if time.monotonic() > deadline_s:
                raise BenchmarkFailure("the streams do not all run: raise --max-batch-rows")
            await asyncio.sleep(0.5)


def num_running(url: str) -> float:
    """Return how many requests are in the batch."""
    _, text = scrape(url, "/metrics", 0, 0.001)
    found = RUNNING.search(text)
    return float(found[1]) if found else 0.0


def register(store: Path, num_adapters: int, base_name: str) -> None:
    """Put adapters into a folder's store and catalog, each with a config of its own.

    They have one file of weights together, which nobody reads: they are never asked for.
    """
    from quickchange_adapters.catalog import Catalog, sqlite_url
    from quickchange_adapters.records import CONFIG_FILE, WEIGHTS_FILE, FileRecord, NewVersion

    store.mkdir(parents=True, exist_ok=True)
    catalog = Catalog(sqlite_url(store / "catalog.sqlite"))
    weights = FileRecord(WEIGHTS_FILE, hashlib.sha256(b"weights").hexdigest(), 7)
    for number in range(num_adapters):
        sha256 = hashlib.sha256(str(number).encode()).hexdigest()
        files = (FileRecord(CONFIG_FILE, sha256, 100), weights)
        name = f"registered-{number:05d}"
        catalog.publish(NewVersion(name, files, base_name, "", (16,), ("q_proj",), {}))
    catalog.close()


@contextmanager
def registered(options: argparse.Namespace) -> Iterator[Target]:
    """Give a server with so many adapters registered, and some more that are used."""
    with tempfile.TemporaryDirectory(prefix="quickchange-bench-") as folder:
        register(Path(folder), options.registered, "bench")
        options.server_args += f" --store {folder}"
        with target_of(options, options.used) as target:
            yield target


def latency_table(found: Sequence[Scrapes]) -> str:
    """Return a row per state and path."""
    return markdown_table(HEADER, [_row(each) for each in found])


def _row(each: Scrapes) -> Row:
    return (
        each.meanwhile,
        each.path,
        str(len(each.seconds)),
        f"{1e3 * percentile(each.seconds, 0.5):.1f}",
        f"{1e3 * percentile(each.seconds, 0.99):.1f}",
        f"{1e3 * max(each.seconds):.1f}",
        f"{each.num_bytes / 1024:.0f}",
        str(each.num_lines),
    )


def settings_of(options: argparse.Namespace, target: Target) -> Mapping[str, object]:
    """Return what is printed above the table."""
    return {
        **server_settings(options, target),
        "adapters": f"{options.registered} registered, {options.used} more of rank {options.rank} "
        "in use",
        "work": f"{options.streams} streams, prompts of {options.prompt_words} words, "
        f"{options.tokens} tokens out, greedy, in a closed loop",
        "scrapes": f"every {1e3 * options.interval:.0f} ms for {options.seconds:g} s, in a process "
        "of their own",
    }


def parsed_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_server_options(parser)
    parser.set_defaults(server_args="--max-batch-rows 200 --max-queue 200 --kv-cache-bytes 2GiB")
    parser.add_argument("--registered", type=int, default=5000, help="adapters that nobody uses")
    parser.add_argument("--used", type=int, default=40, help="adapters that the streams use")
    parser.add_argument("--streams", type=int, default=200)
    parser.add_argument("--prompt-words", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=256, help="tokens out per answer")
    parser.add_argument("--interval", type=float, default=0.05, help="seconds between scrapes")
    parser.add_argument("--seconds", type=float, default=30.0, help="of scraping per row")
    add_output_options(parser)
    return parser.parse_args()


def main() -> None:
    """Measure and report."""
    options = parsed_options()
    machine = Machine.here()
    with registered(options) as target:
        found = LatencyBench(target, options).run_all()
        settings = settings_of(options, target)
    results = [json.loads(json.dumps(asdict(each))) for each in found]
    report = Report("Scrapes of /metrics", machine, settings, latency_table(found), results)
    report.publish(options.markdown, options.json)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the server is stopped then too
    with exit_on_failure(), suppress(BrokenPipeError):
        main()
