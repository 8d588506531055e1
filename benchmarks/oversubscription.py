"""What happens when more adapters are asked for than the device holds?

The closed loop of throughput.py against a server whose pool holds so many adapters of this rank
(--slots), with half as many adapters asked for, as many, twice and four times as many: one after
another, all alike, or as Zipf has it. Asked for in turn, twice as many as fit are the worst case:
whoever evicts what was used longest ago never finds what it looks for.

The host's memory holds all of them, unless --host-slots says less: then some come from the disk.
Every figure is set against half as many adapters, asked for in the same way, in the same round.

    python benchmarks/oversubscription.py --slots 8 --clients 8
    python benchmarks/oversubscription.py --slots 8 --host-slots 16 --order zipf
"""

import argparse
import asyncio
import math
import secrets
import signal
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal, get_args

import httpx

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.closed_loop import ClosedLoop, Work
from benchmarks.failure import exit_on_failure
from benchmarks.machine import Machine
from benchmarks.make_adapters import LINEARS, linear_shapes
from benchmarks.popularity import Popularity, num_distinct
from benchmarks.report import Report, Row, add_output_options, markdown_table, option_type
from benchmarks.server_options import add_server_options, server_settings, target_of
from benchmarks.server_process import Target, base_folder, checkpoint_dtype
from benchmarks.timing import Figures, median_figures
from benchmarks.workload import Prompts, Scenario

Order = Literal["turn", "uniform", "zipf"]
ORDERS: tuple[Order, ...] = get_args(Order)
FACTORS = (0.5, 1.0, 2.0, 4.0)
ROW_UNIT = 8
"""Ranks are rounded up to this in the pool."""
FOR_ROWS = 7 / 8
"""Of the device's ceiling; the rest is kept for updates of the vocabulary's two ends."""
EVICTIONS = 'quickchange_adapter_evictions_total{tier="device"}'
HEADER = (
    "adapters",
    "order",
    "used in a round",
    "evictions per request",
    "tokens/s out (lowest–highest)",
    "of ½×",
    "TTFT p50 / p99 ms",
    "TTFT p50 of ½×",
)


@dataclass(frozen=True, slots=True)
class Case:
    """So many times as many adapters as the pool holds, asked for in one of the ways."""

    factor: float
    order: Order

    def num_adapters(self, num_slots: int) -> int:
        """How many adapters that is."""
        return max(1, round(self.factor * num_slots))


@dataclass(frozen=True, slots=True)
class Run:
    """One round of one case."""

    figures: Figures
    num_used: int
    evictions_per_request: float


Runs = dict[Case, list[Run]]


class OversubscriptionBench:
    """One server, and the cases run on it in turn."""

    def __init__(self, target: Target, work: Work, options: argparse.Namespace) -> None:
        self._target = target
        self._work = work
        self._options = options
        self._cases = [Case(factor, order) for order in options.order for factor in FACTORS]

    def run_all(self) -> Runs:
        """Use every adapter once, then run all cases in turn, several times."""
        count = Case(FACTORS[-1], "turn").num_adapters(self._options.slots)
        loop = ClosedLoop(self._target, self._work)
        asyncio.run(loop.warm_up(Scenario(count, self._options.clients)))
        runs: Runs = {case: [] for case in self._cases}
        for repeat in range(self._options.repeats):
            for case in self._cases:
                run = self._run(case, seed=self._options.seed + repeat)
                runs[case].append(run)
                print(
                    f"{case.factor:g}x, {case.order}: {run.figures.tokens_per_s:.1f} tokens/s, "
                    f"TTFT {1e3 * run.figures.ttft_p50_s:.0f} ms",
                    file=sys.stderr,
                )
        return runs

    def _run(self, case: Case, seed: int) -> Run:
        num_adapters = case.num_adapters(self._options.slots)
        num_requests = self._options.clients * self._work.requests_per_client
        asked = self._draw(case.order, num_adapters, num_requests, seed)
        loop = ClosedLoop(self._target, self._work, pick=lambda _, index: asked[index])
        evictions = num_evictions(self._target)
        figures = asyncio.run(loop.measure(Scenario(num_adapters, self._options.clients)))
        evictions = num_evictions(self._target) - evictions
        return Run(figures, num_distinct(asked), evictions / num_requests)

    def _draw(self, order: Order, num_adapters: int, count: int, seed: int) -> Sequence[int]:
        if order == "turn":
            return [index % num_adapters for index in range(count)]
        return Popularity(order, num_adapters, self._options.exponent, seed).draw(count)


def num_evictions(target: Target) -> float:
    """Return how many adapters have left the device for others; NaN where nobody says."""
    headers = {"authorization": f"Bearer {target.api_key}"} if target.api_key else {}
    text = httpx.get(target.url.rstrip("/") + "/metrics", headers=headers, timeout=60).text
    found = [line for line in text.splitlines() if line.startswith(EVICTIONS)]
    return float(found[0].rpartition(" ")[2]) if found else math.nan


def adapter_bytes(base: Path, rank: int, itemsize: int) -> int:
    """Return what one adapter on all seven linears takes in the pool."""
    rows = -(-rank // ROW_UNIT) * ROW_UNIT
    return sum(
        rows * (out + width) * itemsize for out, width in linear_shapes(base, LINEARS).values()
    )


def ceilings(bytes_of_one: int, num_slots: int, num_host_slots: int) -> tuple[int, int]:
    """Return the ceilings of device and host memory in bytes for so many adapters."""
    return math.ceil(num_slots * bytes_of_one / FOR_ROWS), num_host_slots * bytes_of_one


def oversubscription_table(runs: Runs) -> str:
    """Return one row per case: medians over the rounds, shares of the same round's half."""
    rows = [_row(case, each, runs[Case(FACTORS[0], case.order)]) for case, each in runs.items()]
    return markdown_table(HEADER, rows)


def _row(case: Case, runs: Sequence[Run], half: Sequence[Run]) -> Row:
    middle = median_figures([run.figures for run in runs])
    rates = [run.figures.tokens_per_s for run in runs]
    return (
        f"{case.factor:g}×",
        {"turn": "in turn"}.get(case.order, case.order),
        f"{median(run.num_used for run in runs):g}",
        f"{median(run.evictions_per_request for run in runs):.2f}",
        f"{middle.tokens_per_s:.1f} ({min(rates):.1f}–{max(rates):.1f})",
        f"{share(runs, half, 'tokens_per_s'):.2f}",
        f"{1e3 * middle.ttft_p50_s:.0f} / {1e3 * middle.ttft_p99_s:.0f}",
        f"{share(runs, half, 'ttft_p50_s'):.2f}",
    )


def share(runs: Sequence[Run], half: Sequence[Run], figure: str) -> float:
    """Return a figure as a share of the half's of the same round; the median of rounds."""
    pairs = zip(runs, half, strict=True)
    shares = [getattr(a.figures, figure) / getattr(b.figures, figure) for a, b in pairs]
    return float(median(shares))


def oversubscription_results(runs: Runs) -> list[dict[str, Any]]:
    """Return the same for JSON, with every round."""
    return [
        {
            "factor": case.factor,
            "order": case.order,
            "throughput_of_half": share(each, runs[Case(FACTORS[0], case.order)], "tokens_per_s"),
            "ttft_p50_of_half": share(each, runs[Case(FACTORS[0], case.order)], "ttft_p50_s"),
            "runs": [asdict(run) for run in each],
        }
        for case, each in runs.items()
    ]


def read_orders(text: str) -> tuple[Order, ...]:
    """Read a comma-separated list of orders.

    Raises: ValueError.
    """
    known: dict[str, Order] = {order: order for order in ORDERS}
    for word in text.split(","):
        if word not in known:
            raise ValueError(f"{word!r} is none of {', '.join(ORDERS)}")
    return tuple(known[word] for word in text.split(","))


def parsed_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_server_options(parser)
    parser.add_argument("--slots", type=int, default=8, help="adapters that the pool holds")
    parser.add_argument("--host-slots", type=int, help="adapters in host memory (all)")
    parser.add_argument(
        "--order",
        type=option_type(read_orders),
        default=ORDERS,
        help=f"how they are asked for, with commas ({','.join(ORDERS)})",
    )
    parser.add_argument("--exponent", type=float, default=1.0, help="of Zipf's law")
    parser.add_argument("--clients", type=int, help="default: half as many as slots")
    parser.add_argument("--prompt-words", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=32, help="tokens out per request")
    parser.add_argument("--requests", type=int, default=16, help="requests per client and round")
    parser.add_argument("--repeats", type=int, default=3, help="rounds")
    parser.add_argument("--seed", type=int, default=None, help="of prompts and draws")
    add_output_options(parser)
    options = parser.parse_args()
    options.clients = options.clients or max(1, options.slots // 2)
    options.host_slots = options.host_slots or Case(FACTORS[-1], "turn").num_adapters(options.slots)
    if options.seed is None:
        options.seed = secrets.randbelow(1 << 32)
    return options


def with_ceilings(options: argparse.Namespace) -> argparse.Namespace:
    """Tell the server that is started how much it may hold; a running one knows it."""
    if options.url:
        return options
    folder = base_folder(options.model)
    dtype = checkpoint_dtype(folder) if options.dtype == "auto" else options.dtype
    itemsize = 4 if dtype == "float32" else 2
    one = adapter_bytes(folder, options.rank, itemsize)
    device, host = ceilings(one, options.slots, options.host_slots)
    added = f"--adapter-device-bytes {device} --adapter-host-bytes {host}"
    return argparse.Namespace(
        **{**vars(options), "server_args": f"{options.server_args} {added}".strip()}
    )


def settings_of(options: argparse.Namespace, target: Target) -> dict[str, object]:
    """Return what is printed above the table."""
    return {
        **server_settings(options, target),
        "work": f"{options.clients} clients, prompts of {options.prompt_words} words, "
        f"{options.tokens} tokens out, greedy, end of text ignored, every prompt new",
        "adapters": f"rank {options.rank} on all seven linears; {options.slots} fit on the device, "
        f"{options.host_slots} in host memory; Zipf's exponent {options.exponent}",
        "runs": f"{options.repeats} interleaved rounds, {options.requests} requests a client in "
        "each; medians of the rounds",
        "seed": options.seed,
    }


def main() -> None:
    """Measure and report."""
    options = with_ceilings(parsed_options())
    machine = Machine.here()
    work = Work(Prompts(options.prompt_words, options.seed), options.tokens, options.requests)
    with target_of(options, Case(FACTORS[-1], "turn").num_adapters(options.slots)) as target:
        runs = OversubscriptionBench(target, work, options).run_all()
        settings = settings_of(options, target)
    report = Report(
        "More adapters than fit",
        machine,
        settings,
        oversubscription_table(runs),
        oversubscription_results(runs),
    )
    report.publish(options.markdown, options.json)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the server is stopped then too
    with exit_on_failure():
        main()
