"""What do more adapters cost: 1 to 256 of them, all asked for alike, or as Zipf has it?

The closed loop of throughput.py with a fixed number of clients. In each round the base is measured
first, and every other figure of the round is set against it. All adapters are uploaded and used
once before; those beyond the server's ceilings are then loaded again when they are asked for,
which is part of what is measured.

    python benchmarks/adapters_scaling.py --clients 16
    python benchmarks/adapters_scaling.py --adapters 1,32,256 --popularity zipf
"""

import argparse
import asyncio
import secrets
import signal
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.closed_loop import ClosedLoop, Work
from benchmarks.failure import exit_on_failure
from benchmarks.machine import Machine
from benchmarks.popularity import KINDS, Kind, Popularity, num_distinct, read_counts, read_kinds
from benchmarks.report import Report, Row, add_output_options, markdown_table, option_type
from benchmarks.server_options import add_server_options, server_settings, target_of
from benchmarks.server_process import Target
from benchmarks.timing import Figures, median_figures
from benchmarks.workload import Prompts, Scenario

DEFAULT_COUNTS = "1,2,4,8,16,32,64,128,256"
HEADER = (
    "adapters",
    "popularity",
    "used in a round",
    "tokens/s out (lowest–highest)",
    "of base",
    "TTFT p50 / p99 ms",
    "TPOT p50 ms",
)


@dataclass(frozen=True, slots=True)
class Case:
    """So many adapters, asked for in one of the ways; no adapters is the base."""

    num_adapters: int
    kind: Kind | None = None


@dataclass(frozen=True, slots=True)
class Run:
    """One round of one case: its figures, and how many adapters were really asked for."""

    figures: Figures
    num_used: int


Runs = dict[Case, list[Run]]
BASE = Case(0)


class ScalingBench:
    """One server, and the cases run on it in turn."""

    def __init__(self, target: Target, work: Work, options: argparse.Namespace) -> None:
        self._target = target
        self._work = work
        self._options = options
        self._cases = [
            Case(count, kind) for kind in options.popularity for count in options.adapters
        ]

    def run_all(self) -> Runs:
        """Use every adapter once, then run all cases in turn, several times."""
        clients, count = self._options.clients, max(self._options.adapters)
        loop = ClosedLoop(self._target, self._work)
        for scenario in (Scenario(0, clients), Scenario(count, clients)):
            asyncio.run(loop.warm_up(scenario))
        runs: Runs = {case: [] for case in (BASE, *self._cases)}
        for repeat in range(self._options.repeats):
            for case in runs:
                run = self._run(case, seed=self._options.seed + repeat)
                runs[case].append(run)
                note = f"{case.num_adapters or 'base'} {case.kind or ''}"
                print(f"{note}: {run.figures.tokens_per_s:.1f} tokens/s", file=sys.stderr)
        return runs

    def _run(self, case: Case, seed: int) -> Run:
        scenario = Scenario(case.num_adapters, self._options.clients)
        if case.kind is None:
            return Run(asyncio.run(ClosedLoop(self._target, self._work).measure(scenario)), 0)
        popularity = Popularity(case.kind, case.num_adapters, self._options.exponent, seed)
        drawn = popularity.draw(self._options.clients * self._work.requests_per_client)
        loop = ClosedLoop(self._target, self._work, pick=lambda _, index: drawn[index])
        return Run(asyncio.run(loop.measure(scenario)), num_distinct(drawn))


def scaling_table(runs: Runs) -> str:
    """Return one row per case; shares of the base are medians of the shares of single rounds."""
    return markdown_table(HEADER, [_row(case, each, runs[BASE]) for case, each in runs.items()])


def share_of_base(runs: Sequence[Run], base: Sequence[Run]) -> float:
    """Return the throughput as a share of the base's of the same round; the median of rounds."""
    pairs = zip(runs, base, strict=True)
    return median(run.figures.tokens_per_s / other.figures.tokens_per_s for run, other in pairs)


def _row(case: Case, runs: Sequence[Run], base: Sequence[Run]) -> Row:
    middle = median_figures([run.figures for run in runs])
    rates = [run.figures.tokens_per_s for run in runs]
    return (
        str(case.num_adapters or "base"),
        case.kind or "–",
        f"{median(run.num_used for run in runs):g}" if case.kind else "–",
        f"{middle.tokens_per_s:.1f} ({min(rates):.1f}–{max(rates):.1f})",
        f"{share_of_base(runs, base):.2f}",
        f"{1e3 * middle.ttft_p50_s:.0f} / {1e3 * middle.ttft_p99_s:.0f}",
        f"{1e3 * middle.tpot_p50_s:.1f}",
    )


def scaling_results(runs: Runs) -> list[dict[str, Any]]:
    """Return the same for JSON, with every round."""
    return [
        {
            "adapters": case.num_adapters,
            "popularity": case.kind,
            "share_of_base": share_of_base(each, runs[BASE]),
            "runs": [asdict(run) for run in each],
        }
        for case, each in runs.items()
    ]


def parsed_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_server_options(parser)
    parser.add_argument(
        "--adapters",
        type=option_type(read_counts),
        default=read_counts(DEFAULT_COUNTS),
        help=f"numbers of adapters, with commas ({DEFAULT_COUNTS})",
    )
    parser.add_argument(
        "--popularity",
        type=option_type(read_kinds),
        default=KINDS,
        help=f"with commas ({','.join(KINDS)})",
    )
    parser.add_argument("--exponent", type=float, default=1.0, help="of Zipf's law")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--prompt-words", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=64, help="tokens out per request")
    parser.add_argument("--requests", type=int, default=4, help="requests per client and round")
    parser.add_argument("--repeats", type=int, default=3, help="rounds")
    parser.add_argument("--seed", type=int, default=None, help="of prompts and draws")
    add_output_options(parser)
    options = parser.parse_args()
    if options.seed is None:
        options.seed = secrets.randbelow(1 << 32)
    return options


def settings_of(options: argparse.Namespace, target: Target) -> dict[str, object]:
    """Return what is printed above the table."""
    return {
        **server_settings(options, target),
        "work": f"{options.clients} clients, prompts of {options.prompt_words} words, "
        f"{options.tokens} tokens out, greedy, end of text ignored, every prompt new",
        "adapters": f"rank {options.rank} on all seven linears; Zipf's exponent {options.exponent}",
        "runs": f"{options.repeats} interleaved rounds, {options.requests} requests a client in "
        "each; medians of the rounds",
        "seed": options.seed,
    }


def main() -> None:
    """Measure and report."""
    options = parsed_options()
    machine = Machine.here()
    work = Work(Prompts(options.prompt_words, options.seed), options.tokens, options.requests)
    with target_of(options, max(options.adapters)) as target:
        runs = ScalingBench(target, work, options).run_all()
        settings = settings_of(options, target)
    report = Report(
        "More and more adapters", machine, settings, scaling_table(runs), scaling_results(runs)
    )
    report.publish(options.markdown, options.json)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the server is stopped then too
    with exit_on_failure():
        main()
