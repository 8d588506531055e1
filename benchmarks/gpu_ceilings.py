"""What the machine can do at most: memory, matrix products, the bus. Everything else is a share."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from statistics import median

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.gpu_session import Row

NUM_REPEATS = 10
HEADER = ("ceiling", "measured")


@dataclass(slots=True)
class Ceilings:
    """Bytes per second of memory and bus, and bfloat16 operations per second; measured here."""

    device: torch.device
    memory: float = 0.0
    matrix: float = 0.0
    bus: float = 0.0

    def measure(self) -> Iterator[Row]:
        """Measure all of them."""
        is_cuda = self.device.type == "cuda"
        num_bytes, width = (1 << 32, 8192) if is_cuda else (1 << 24, 256)
        copied, read = self._memory_rates(num_bytes)
        self.memory = max(copied, read)
        yield _rate("memory: copy, bytes read and written", copied, 1e9, "GB/s")
        yield _rate("memory: read for a sum", read, 1e9, "GB/s")
        one, other = (self._random(width, width) for _ in range(2))
        seconds = seconds_of(partial(torch.matmul, one, other), self.device)
        self.matrix = 2 * width**3 / seconds
        yield _rate(f"bfloat16 matrix product of {width}", self.matrix, 1e12, "TFLOP/s")
        self.bus = num_bytes / 4 / self._bus_seconds(num_bytes // 4)
        yield _rate("bus: pinned host memory to device", self.bus, 1e9, "GB/s")

    def products(self, shapes: dict[str, tuple[int, int]], rows: list[int]) -> Iterator[Row]:
        """Time the base's own products as they are, at several numbers of rows."""
        for name, (out, width) in shapes.items():
            # several matrices take turns, so that none stays in the cache
            weights = [self._random(out, width) for _ in range(4)]
            for num_rows in rows:
                x = self._random(num_rows, width)
                seconds = seconds_of(partial(_all, x, weights), self.device) / len(weights)
                share = weights[0].nbytes / seconds / self.memory
                yield Row(
                    (name, str(num_rows), f"{1e6 * seconds:.1f} µs", f"{share:.0%}"),
                    {"matrix": name, "rows": num_rows, "seconds": seconds, "share": share},
                )

    def _memory_rates(self, num_bytes: int) -> tuple[float, float]:
        source = torch.randn(num_bytes // 4, device=self.device)
        target = torch.empty_like(source)
        copy_s = seconds_of(partial(target.copy_, source), self.device)
        return 2 * num_bytes / copy_s, num_bytes / seconds_of(source.sum, self.device)

    def _random(self, *shape: int) -> Tensor:
        return torch.randn(*shape, device=self.device).to(torch.bfloat16)

    def _bus_seconds(self, num_bytes: int) -> float:
        is_cuda = self.device.type == "cuda"
        host = torch.ones(num_bytes, dtype=torch.uint8, pin_memory=is_cuda)
        target = torch.empty(num_bytes, dtype=torch.uint8, device=self.device)
        return seconds_of(lambda: target.copy_(host, non_blocking=True), self.device)


def seconds_of(compute: Callable[[], object], device: torch.device) -> float:
    """Return the median seconds of one call on the device."""
    compute()
    seconds = []
    for _ in range(NUM_REPEATS):
        seconds.append(_once(compute, device))
    return median(seconds)


def _once(compute: Callable[[], object], device: torch.device) -> float:
    if device.type != "cuda":
        started_s = time.perf_counter()
        compute()
        return time.perf_counter() - started_s
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    before.record()
    compute()
    after.record()
    after.synchronize()
    elapsed_ms: float = before.elapsed_time(after)
    return elapsed_ms / 1e3


def _all(x: Tensor, weights: list[Tensor]) -> None:
    for weight in weights:
        functional.linear(x, weight)


def _rate(name: str, value: float, unit: float, title: str) -> Row:
    return Row((name, f"{value / unit:.1f} {title}"), {"ceiling": name, "per_s": value})
