"""What the machine can do at most: memory, matrix products, the bus. Everything else is a share."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median

import torch
from quickchange_adapters.ops.triton_product import MAX_ROWS, product
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

    def products(
        self, shapes: dict[str, tuple[int, int]], rows: list[int]
    ) -> Iterator[Callable[[], Row]]:
        """Time the base's own products, the library's and Triton's, at several numbers of rows."""
        for name, (out, width) in shapes.items():
            # several matrices take turns, so that none stays in the cache
            weights = [self._random(out, width) for _ in range(4)]
            for num_rows in rows:
                x = self._random(num_rows, width)
                times = [partial(_all, x, weights, functional.linear)]
                if num_rows <= MAX_ROWS:
                    times.append(partial(_all, x, weights, _skinny))
                yield partial(self._product_row, name, num_rows, times, weights)

    def _product_row(
        self,
        name: str,
        num_rows: int,
        computes: Sequence[Callable[[], None]],
        weights: list[Tensor],
    ) -> Row:
        count = len(weights)
        seconds = [captured_seconds_of(each, self.device) / count for each in computes]
        shares = [weights[0].nbytes / each / self.memory for each in seconds]
        cells = [f"{1e6 * s:.1f} µs, {share:.0%}" for s, share in zip(seconds, shares, strict=True)]
        values = {"matrix": name, "rows": num_rows, "seconds": seconds, "shares": shares}
        return Row((name, str(num_rows), cells[0], cells[1] if len(cells) > 1 else "–"), values)

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


def captured_seconds_of(compute: Callable[[], object], device: torch.device) -> float:
    """Return the median seconds of one call, launched from a graph where there is a GPU."""
    if device.type != "cuda":
        return seconds_of(compute, device)
    compute()
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        compute()
    return seconds_of(graph.replay, device)


def _all(x: Tensor, weights: list[Tensor], multiply: Callable[[Tensor, Tensor], Tensor]) -> None:
    for weight in weights:
        multiply(x, weight)


def _skinny(x: Tensor, weight: Tensor) -> Tensor:
    return product(x, weight, None)


def _rate(name: str, value: float, unit: float, title: str) -> Row:
    return Row((name, f"{value / unit:.1f} {title}"), {"ceiling": name, "per_s": value})
