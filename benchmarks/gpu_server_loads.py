"""What a server does under load: clients in closed loops, and streams while adapters change."""

import argparse
import asyncio
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median

from benchmarks.closed_loop import ClosedLoop, Work
from benchmarks.gpu_session import Row
from benchmarks.server_process import Target
from benchmarks.swap_stall import Stall, StallBench
from benchmarks.workload import Prompts, Scenario

HEADER = (
    "load",
    "tokens/s",
    "TTFT p50 / p99 ms",
    "ITL p50 / p99 ms",
    "cores: client, server",
)
GAP_HEADER = ("meanwhile", "times", "one takes ms", "ITL p50 / p99 ms", "worst gap ms", "in steps")
NUM_MIXED = 8
"""Adapters that take turns with the base."""


@dataclass(frozen=True, slots=True)
class LoadSizes:
    """How much is asked for."""

    prompt_words: int = 64
    num_tokens: int = 96
    requests_per_client: int = 3
    clients: Sequence[int] = (1, 16, 64)
    num_streams: int = 16
    stream_tokens: int = 400

    @classmethod
    def trial(cls) -> "LoadSizes":
        """Return sizes that show on a CPU that it works."""
        return cls(16, 8, 1, (2, 9), 3, 96)


class ServerLoads:
    """Loads on one server that has the workload's first eight adapters."""

    def __init__(self, target: Target, sizes: LoadSizes, upload: Path) -> None:
        self._target = target
        self._sizes = sizes
        self._upload = upload
        self._prompts = Prompts(sizes.prompt_words, 11)

    def rows(self) -> Iterator[Callable[[], Row]]:
        """Measure the base, one adapter, and eight in turn with the base, by numbers of clients."""
        work = Work(self._prompts, self._sizes.num_tokens, self._sizes.requests_per_client)
        for num_clients in self._sizes.clients:
            for num_adapters in (0, 1, NUM_MIXED):
                scenario = Scenario(num_adapters, num_clients)
                loop = ClosedLoop(self._target, work, pick=pick_with_base)
                yield partial(self._measured, loop, scenario)

    def _measured(self, loop: ClosedLoop, scenario: Scenario) -> Row:
        asyncio.run(loop.warm_up(scenario))
        figures = asyncio.run(loop.measure(scenario))
        title = scenario.title + (" in turn with the base" if scenario.num_adapters > 1 else "")
        cells = (
            title,
            f"{figures.tokens_per_s:.0f}",
            f"{1e3 * figures.ttft_p50_s:.1f} / {1e3 * figures.ttft_p99_s:.1f}",
            f"{1e3 * figures.itl_p50_s:.2f} / {1e3 * figures.itl_p99_s:.2f}",
            f"{figures.client_cores:.2f}, {figures.server_cores:.2f}",
        )
        return Row(cells, {"load": scenario.label, **asdict(figures)})

    def gap_rows(self) -> Iterator[Row]:
        """Look at the gaps of streams while adapters are asked, loaded, uploaded and merged."""
        options = argparse.Namespace(streams=self._sizes.num_streams, pause=0.02, repeats=1)
        work = Work(self._prompts, self._sizes.stream_tokens, 1)
        stalls = StallBench(self._target, work, options, self._upload).run_all()
        step_s = stalls["nothing"][0].itl_p50_s
        for name, (stall,) in stalls.items():
            yield gap_row(name, stall, step_s)


def gap_row(name: str, stall: Stall, step_s: float) -> Row:
    """Return the line of what was done while streams ran, whose step takes `step_s` otherwise."""
    times = stall.action_times_s
    cells = (
        name,
        str(len(times)) if times else "–",
        f"{1e3 * median(times):.1f}" if times else "–",
        f"{1e3 * stall.itl_p50_s:.2f} / {1e3 * stall.itl_p99_s:.2f}",
        f"{1e3 * stall.worst_gap_s:.1f}",
        f"{stall.worst_gap_s / step_s:.1f}",
    )
    return Row(cells, {"meanwhile": name, "step_s": step_s, **asdict(stall)})


def pick_with_base(scenario: Scenario, request_index: int) -> int | None:
    """Return the adapter of a request: several take turns with the base; None is the base."""
    if scenario.num_adapters <= 1:
        return scenario.adapter_of(request_index)
    turn = request_index % (scenario.num_adapters + 1)
    return turn if turn < scenario.num_adapters else None
