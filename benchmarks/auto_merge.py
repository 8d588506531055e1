"""What does `--auto-merge` bring, and does it ever cost anything?

Two servers, with and without it, take turns on the same work. For each mix (a share of requests for
one hot adapter, the rest for the base and three others), the one with it is first given it for a
while, so that what traffic asks for is merged or unmerged; then rounds of the base, of one server
and of the other are measured. Ratios are medians of the ratios of single rounds.

    python benchmarks/auto_merge.py
    python benchmarks/auto_merge.py --clients 1 --shares 0.9,1.0 --repeats 5
"""

import argparse
import asyncio
import secrets
import signal
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import httpx

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.closed_loop import ClosedLoop, Work
from benchmarks.failure import exit_on_failure
from benchmarks.hot_mix import NUM_COLD, HotMix, read_mixes
from benchmarks.machine import Machine
from benchmarks.report import Report, Row, add_output_options, markdown_table
from benchmarks.server_options import add_server_options, server_settings, target_of
from benchmarks.server_process import Target
from benchmarks.workload import Prompts, Scenario

NUM_ADAPTERS = 1 + NUM_COLD
HEADER = (
    "mix",
    "base tokens/s",
    "without tokens/s",
    "with tokens/s",
    "with / without (lowest)",
    "with / base",
    "steps on a copy",
)


@dataclass(slots=True)
class MixRuns:
    """Tokens per second of each round of one mix; and the share of steps that ran on a copy."""

    base: list[float] = field(default_factory=list)
    without: list[float] = field(default_factory=list)
    on: list[float] = field(default_factory=list)
    merged_share: float = 0.0

    @property
    def of_without(self) -> list[float]:
        """With `--auto-merge`, set against without it in the same round."""
        return [a / b for a, b in zip(self.on, self.without, strict=True)]

    @property
    def of_base(self) -> list[float]:
        """With `--auto-merge`, set against the base in the same round."""
        return [a / b for a, b in zip(self.on, self.base, strict=True)]


class AutoMergeBench:
    """Two servers, and the mixes run on them in turn."""

    def __init__(self, without: Target, on: Target, work: Work, options: argparse.Namespace):
        self._without = without
        self._on = on
        self._work = work
        self._options = options
        self._seed = options.seed

    def run_all(self, mixes: tuple[HotMix, ...]) -> dict[HotMix, MixRuns]:
        """Warm up, then run one mix after the other."""
        for target in (self._without, self._on):
            asyncio.run(ClosedLoop(target, self._work).warm_up(Scenario(NUM_ADAPTERS, 4)))
        return {mix: self._run(mix) for mix in mixes}

    def _run(self, mix: HotMix) -> MixRuns:
        self._rate(self._without, mix)  # nothing is merged there: a round is enough
        self._settle(self._on, mix)
        runs, before = MixRuns(), self._steps()
        for repeat in range(self._options.repeats):
            runs.base.append(self._rate(self._without, HotMix(0, mix.num_clients), is_base=True))
            self._seed += 1
            turns = [(runs.without, self._without), (runs.on, self._on)]
            for rates, target in turns if repeat % 2 else reversed(turns):
                rates.append(self._rate(target, mix))
            note = f"{runs.without[-1]:.1f} without, {runs.on[-1]:.1f} with"
            print(f"{mix.title}: {note}", file=sys.stderr, flush=True)
        merged, steps = (now - then for now, then in zip(self._steps(), before, strict=True))
        runs.merged_share = merged / max(steps, 1)
        return runs

    def _settle(self, target: Target, mix: HotMix) -> None:
        deadline = time.monotonic() + self._options.settle
        while time.monotonic() < deadline:
            self._rate(target, mix)
            self._seed += 1

    def _rate(self, target: Target, mix: HotMix, *, is_base: bool = False) -> float:
        count = mix.num_clients * self._work.requests_per_client
        drawn = [None] * count if is_base else mix.draw(count, self._seed)
        loop = ClosedLoop(target, self._work, pick=lambda _, index: drawn[index])
        scenario = Scenario(NUM_ADAPTERS, mix.num_clients)
        return asyncio.run(loop.measure(scenario)).tokens_per_s

    def _steps(self) -> tuple[float, float]:
        """Return the steps on copies and all steps so far, of the server with it."""
        time.sleep(0.3)  # /metrics is rendered at most four times a second
        text = httpx.get(f"{self._on.url}/metrics", timeout=60).text
        counts = {
            line.partition(" ")[0]: float(line.partition(" ")[2])
            for line in text.splitlines()
            if line.startswith("quickchange_steps_total{")
        }
        merged = counts.get('quickchange_steps_total{weights="merged"}', 0.0)
        return merged, sum(counts.values())


def merge_table(runs: dict[HotMix, MixRuns]) -> str:
    """Return one row per mix."""
    return markdown_table(HEADER, [_row(mix, each) for mix, each in runs.items()])


def _row(mix: HotMix, runs: MixRuns) -> Row:
    ratios = runs.of_without
    return (
        mix.title,
        f"{median(runs.base):.1f}",
        f"{median(runs.without):.1f}",
        f"{median(runs.on):.1f}",
        f"{median(ratios):.3f} ({min(ratios):.3f})",
        f"{median(runs.of_base):.3f}",
        f"{runs.merged_share:.0%}",
    )


def merge_results(runs: dict[HotMix, MixRuns]) -> list[dict[str, Any]]:
    """Return the same for JSON, with every round."""
    return [{**asdict(mix), **asdict(each)} for mix, each in runs.items()]


def parsed_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_server_options(parser)
    parser.add_argument("--shares", default="0,0.5,0.9,1.0", help="of the hot adapter")
    parser.add_argument("--clients", default="1,16", help="with commas")
    parser.add_argument("--prompt-words", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=64, help="tokens out per request")
    parser.add_argument("--requests", type=int, default=10, help="per client and round")
    parser.add_argument("--repeats", type=int, default=5, help="rounds of each mix")
    parser.add_argument("--settle", type=float, default=90.0, help="seconds of a mix before")
    parser.add_argument("--seed", type=int, default=None, help="of prompts and draws")
    add_output_options(parser)
    options = parser.parse_args()
    try:
        options.mixes = read_mixes(options.shares, options.clients)
    except ValueError as error:
        parser.error(str(error))
    if options.url:
        parser.error("--url: it starts both servers itself")
    if options.seed is None:
        options.seed = secrets.randbelow(1 << 32)
    return options


def settings_of(options: argparse.Namespace, target: Target) -> dict[str, object]:
    """Return what is printed above the table."""
    return {
        **server_settings(options, target),
        "servers": "two at once, of which one is idle: with --auto-merge, and without",
        "work": f"prompts of {options.prompt_words} words, {options.tokens} tokens out, greedy",
        "adapters": f"rank {options.rank} on all seven linears: one hot, {NUM_COLD} cold, the base",
        "runs": f"{options.settle:g} s of a mix first, then {options.repeats} rounds of "
        f"{options.requests} requests a client, taking turns",
        "seed": options.seed,
    }


def main() -> None:
    """Measure and report."""
    options = parsed_options()
    machine, with_it = Machine.here(), argparse.Namespace(**vars(options))
    with_it.server_args = f"{options.server_args} --auto-merge"
    work = Work(Prompts(options.prompt_words, options.seed), options.tokens, options.requests)
    with target_of(options, NUM_ADAPTERS) as without, target_of(with_it, NUM_ADAPTERS) as on:
        runs = AutoMergeBench(without, on, work, options).run_all(options.mixes)
        settings = settings_of(options, on)
    report = Report("Merged by traffic", machine, settings, merge_table(runs), merge_results(runs))
    report.publish(options.markdown, options.json)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the servers are stopped then too
    with exit_on_failure():
        main()
