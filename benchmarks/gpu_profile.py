"""Which kernels a decode step consists of, and where the host's time of a step goes.

Kernels: torch's profiler over replays of the captured step. The host: cProfile over whole runs,
which makes Python itself slower, so its figures are shares rather than times. The driver: how long
its calls take in a run; one that takes as long as a step is what the host waits in.
"""

import cProfile
import itertools
import pstats
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu_decode import Scenario, Timed
from benchmarks.gpu_session import Row

KERNELS_HEADER = ("step", "kernel", "launches", "time", "of all kernels'")
HOST_HEADER = ("rows", "function", "calls a step", "own time a step")
DRIVER_HEADER = ("rows", "call", "calls a step", "time a step")
NUM_REPLAYS = 5
NUM_SHOWN = 14
MAX_NAME = 60


@dataclass(slots=True)
class Profile:
    """Both, over one engine."""

    timed: Timed

    def kernels(self, scenarios: Sequence[Scenario]) -> Iterator[Row]:
        """Yield the longest kernels of each scenario's step, and all of them together."""
        for scenario in scenarios:
            self.timed.engine.run(scenario.requests(), 4, None)
            found = self.timed.amid_run(scenario, partial(self._kernels, scenario))
            whole_us = sum(us for _, us in found.values())
            title = f"{scenario.num_rows} rows, adapters: {scenario.title}"
            total = sum(count for count, _ in found.values())
            yield _kernel_row(title, "all", total, whole_us, whole_us)
            longest = sorted(found.items(), key=lambda item: -item[1][1])
            for name, (count, us) in longest[:NUM_SHOWN]:
                yield _kernel_row(title, name, count, us, whole_us)

    def host(self, scenarios: Sequence[Scenario]) -> Iterator[Callable[[], Row]]:
        """Yield the functions that a step spends most time in itself."""
        for scenario in scenarios:
            answer = self.timed.sizes.answer_tokens
            self.timed.engine.run(scenario.requests(), 4, None)
            profiler = cProfile.Profile()
            profiler.runcall(self.timed.engine.run, scenario.requests(), answer, None)
            stats = pstats.Stats(profiler).stats  # type: ignore[attr-defined]
            longest = sorted(stats.items(), key=lambda item: -item[1][2])
            for place, (_, calls, own_s, _, _) in longest[: 2 * NUM_SHOWN]:
                yield partial(_host_row, scenario.num_rows, place, calls / answer, own_s / answer)

    def driver(self, scenarios: Sequence[Scenario]) -> Iterator[Row]:
        """Yield the driver's calls that take longest while all tokens of a scenario are made."""
        num_steps = self.timed.sizes.answer_tokens
        for scenario in scenarios:
            self.timed.engine.run(scenario.requests(), 4, None)
            kinds = [ProfilerActivity.CPU, ProfilerActivity.CUDA]
            is_cuda = self.timed.ceilings.device.type == "cuda"
            with profile(activities=kinds if is_cuda else kinds[:1]) as profiler:
                self.timed.engine.run(scenario.requests(), num_steps, None)
            events = [e for e in profiler.key_averages() if e.key.startswith("cu") or not is_cuda]
            longest = sorted(events, key=lambda event: -event.self_cpu_time_total)
            for event in longest[:NUM_SHOWN]:
                own_s = event.self_cpu_time_total / 1e6 / num_steps
                yield _driver_row(scenario.num_rows, event.key, event.count / num_steps, own_s)

    def _kernels(self, scenario: Scenario) -> dict[str, tuple[float, float]]:
        """Return (launches, microseconds) of a step by the kernel's name."""
        replay = self.timed.captured(scenario)
        if replay is None:
            raise RuntimeError("no step was captured")
        is_cuda = self.timed.ceilings.device.type == "cuda"
        kinds = [ProfilerActivity.CUDA if is_cuda else ProfilerActivity.CPU]
        with torch.inference_mode(), profile(activities=kinds) as profiler:
            for _ in range(NUM_REPLAYS):
                replay()
            if is_cuda:
                torch.cuda.synchronize()
        found: dict[str, tuple[float, float]] = defaultdict(lambda: (0.0, 0.0))
        for event in profiler.key_averages():
            us = event.self_device_time_total if is_cuda else event.self_cpu_time_total
            name = _short(event.key)
            count, old = found[name]
            found[name] = count + event.count / NUM_REPLAYS, old + us / NUM_REPLAYS
        return {name: each for name, each in found.items() if each[1] > 0}


def profiled_scenarios(batches: Sequence[int], prompt_tokens: int) -> list[Scenario]:
    """Return every number of rows without adapters, and with as many as there are rows, 32."""
    pairs = itertools.product(batches, (False, True))
    counts = [(rows, min(rows, 32) if has_adapters else 0) for rows, has_adapters in pairs]
    return [Scenario(rows, count, prompt_tokens) for rows, count in counts]


def _short(name: str) -> str:
    name = re.sub(r"^void |\(anonymous namespace\)::|at::native::", "", name)
    return name[:MAX_NAME]


def _kernel_row(title: str, name: str, count: float, us: float, whole_us: float) -> Row:
    cells = (title, name, f"{count:.0f}", f"{us:.0f} µs", f"{us / whole_us:.1%}")
    return Row(cells, {"step": title, "kernel": name, "launches": count, "us": us})


def _driver_row(rows: int, name: str, calls: float, own_s: float) -> Row:
    return _call_row(rows, "call", name[:MAX_NAME], calls, own_s)


def _host_row(rows: int, place: tuple[str, int, str], calls: float, own_s: float) -> Row:
    file, line, function = place
    name = f"{Path(file).name}:{line} {function}"[:MAX_NAME]
    return _call_row(rows, "function", name, calls, own_s)


def _call_row(rows: int, what: str, name: str, calls: float, own_s: float) -> Row:
    cells = (str(rows), name, f"{calls:.1f}", f"{1e6 * own_s:.0f} µs")
    return Row(cells, {"rows": rows, what: name, "calls": calls, "own_s": own_s})
