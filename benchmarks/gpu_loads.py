"""Adapters on the move: how fast they come, what streams notice, and thousands of them.

Source of the last: S-LoRA (Sheng et al. 2023, arXiv 2311.03285), setting S1: rank 8 on q, k, v, o.
"""

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from statistics import median

import torch
from quickchange_adapters.host_adapter import HostAdapter, pin_adapter

from benchmarks.gpu_adapters import add_named, attention_only, template
from benchmarks.gpu_decode import Timed
from benchmarks.gpu_engine import Row as Request
from benchmarks.gpu_engine import random_prompt
from benchmarks.gpu_session import Row

LOAD_HEADER = ("rank", "size", "time", "GB/s", "of the bus")
GAP_HEADER = ("while 16 streams run", "step", "worst gap", "in steps", "things done")
MANY_HEADER = ("adapters", "tokens/s", "loads", "of few adapters'")
FIRST_LOADED, FIRST_GAP, FIRST_MANY = 10_000, 20_000, 100_000
NUM_TEMPLATES = 16


@dataclass(frozen=True, slots=True)
class Counts:
    """How much is done: on a GPU, or in a trial."""

    loads: int = 8
    streams: int = 16
    stream_tokens: int = 240
    gap_every: int = 12
    few: int = 5
    many: int = 2000
    requests: int = 256
    request_tokens: int = 32

    @classmethod
    def trial(cls) -> "Counts":
        """Return counts with which every line runs in seconds."""
        return cls(2, 2, 16, 4, 2, 6, 6, 4)


@dataclass(slots=True)
class Loads:
    """All of it, over one engine."""

    timed: Timed
    counts: Counts

    def to_the_pool(self) -> Iterator[Row]:
        """Time copies from host memory to the pool, each until it is done."""
        first = itertools.count(FIRST_LOADED)
        for rank in (16, 64):
            seconds = [self._load(next(first), rank) for _ in range(self.counts.loads)]
            num_bytes = self._template(rank).num_bytes
            rate = num_bytes / median(seconds[1:])
            share = rate / self.timed.ceilings.bus
            yield Row(
                (
                    str(rank),
                    f"{num_bytes / 1e6:.0f} MB",
                    f"{1e3 * median(seconds[1:]):.2f} ms",
                    f"{rate / 1e9:.1f}",
                    f"{share:.0%}",
                ),
                {"rank": rank, "bytes": num_bytes, "seconds": seconds, "share": share},
            )

    def gaps(self) -> Iterator[Callable[[], Row]]:
        """Measure the longest time between two steps of streams that others' loads run beside."""
        yield partial(self._gap, "nothing else", lambda: None)
        adapter, small = self._template(64), self._template(16)
        names = itertools.count(FIRST_GAP)

        def load() -> None:
            name = f"adapter-{next(names)}"
            self.timed.engine.add_packed(replace(adapter, digest=name))
            self.timed.engine.activate(name)

        yield partial(self._gap, "loads of rank 64", load)
        yield partial(self._gap, "pinning of rank 16", lambda: _beside(small))

    def many(self) -> Iterator[Row]:
        """Compare a few adapters with thousands, uniformly drawn, in turns."""
        dtype, device = self.timed.engine.base.dtype, self.timed.ceilings.device
        layout = self.timed.engine.base.layout
        own = [
            attention_only(template(layout, 8, dtype, device, seed))
            for seed in range(NUM_TEMPLATES)
        ]
        add_named(self.timed.engine, own, FIRST_MANY, self.counts.many)
        rates: dict[int, list[float]] = {self.counts.few: [], self.counts.many: []}
        for turn, count in itertools.product(range(3), rates):
            rate, num_loads = self._serve(count, turn)
            if turn:  # the first turn is for whatever has to be compiled
                rates[count].append(rate)
                relative = rate / rates[self.counts.few][-1]
                yield Row(
                    (str(count), f"{rate:.0f}", str(num_loads), f"{relative:.3f}"),
                    {"adapters": count, "per_s": rate, "loads": num_loads, "relative": relative},
                )

    def _template(self, rank: int) -> HostAdapter:
        base = self.timed.engine.base
        return template(base.layout, rank, base.dtype, self.timed.ceilings.device)

    def _load(self, index: int, rank: int) -> float:
        adapter = replace(self._template(rank), digest=f"adapter-{index}")
        started_s = time.perf_counter()
        slots = self.timed.engine.pool.acquire(adapter)
        seconds = time.perf_counter() - started_s
        assert slots is not None
        self.timed.engine.pool.release(slots[0])
        return seconds

    def _gap(self, title: str, work: Callable[[], None]) -> Row:
        """Do something every few steps while streams run."""
        engine, counts = self.timed.engine, self.counts
        requests = [Request(random_prompt(32, row), ((row, 1.0),)) for row in range(counts.streams)]
        steps = itertools.count()
        num_done = 0

        def between() -> None:
            nonlocal num_done
            if next(steps) % counts.gap_every == counts.gap_every - 1:
                work()
                num_done += 1

        engine.run(requests, counts.stream_tokens, None, on_step=between)
        periods = engine.recorder.decode_periods_s(counts.streams)
        step_s, worst_s = median(periods), max(periods)
        values = {"beside": title, "step_s": step_s, "worst_s": worst_s, "periods_s": periods}
        cells = (
            title,
            *(f"{1e3 * seconds:.2f} ms" for seconds in (step_s, worst_s)),
            f"{worst_s / step_s:.1f}",
            str(num_done),
        )
        return Row(cells, values)

    def _serve(self, num_adapters: int, seed: int) -> tuple[float, int]:
        """Answer all requests; return tokens a second, and how many loads that took."""
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randint(num_adapters, (self.counts.requests,), generator=generator).tolist()
        requests = [
            Request(random_prompt(64, row), ((FIRST_MANY + index, 1.0),))
            for row, index in enumerate(chosen)
        ]
        loads: list[float] = []
        engine = self.timed.engine
        engine.pool.on_load = loads.append
        started_s = time.perf_counter()
        engine.run(requests, self.counts.request_tokens, None, is_resident=False)
        seconds = time.perf_counter() - started_s
        return len(requests) * self.counts.request_tokens / seconds, len(loads)


def _beside(adapter: HostAdapter) -> None:
    """Copy an adapter into host memory, pinned on a GPU, on another thread, as an upload does."""

    def work() -> None:
        groups = {
            kind: replace(group, lora_a=group.lora_a.clone(), lora_b=group.lora_b.clone())
            for kind, group in adapter.groups.items()
        }
        fresh = replace(adapter, groups=groups)
        if torch.cuda.is_available():
            pin_adapter(fresh)

    threading.Thread(target=work, daemon=True).start()
