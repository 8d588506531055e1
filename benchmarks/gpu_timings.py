"""How fast are the GPU's kernels by themselves, and the plain ways beside them?

Kernels are timed in a captured graph, so that what launches them does not count; several inputs
take turns, so that what is read does not stay in the cache. All figures are medians.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch
from quickchange_adapters.arena import RowRange
from quickchange_adapters.layout import AdapterLayout, GroupShape
from quickchange_adapters.ops.deltas import add_block, add_window
from quickchange_adapters.ops.triton_deltas import TritonDeltas
from quickchange_adapters.plan import RowBlock, Term, build_plan
from quickchange_adapters.pool import AdapterPool, Slot
from quickchange_server.engine.attention import KvShape, KvStorage, Rule
from quickchange_server.engine.attention_tiles import KvRow
from quickchange_server.engine.triton_attention import TritonAttention
from torch.nn import functional

NUM_REPEATS = 30
NUM_INPUTS = 4
BLOCK_SIZE = 16
Timing = tuple[str, str, str]


def time_s(compute: Callable[[int], object], device: torch.device) -> float:
    """Return the median seconds of one call; `compute` is given which of the inputs to use."""
    if device.type != "cuda":
        started = time.perf_counter()
        compute(0)
        return time.perf_counter() - started
    for index in range(NUM_INPUTS):
        compute(index)
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for index in range(NUM_INPUTS):
            compute(index)
    return median(_graph_times(graph)) / NUM_INPUTS


def _graph_times(graph: "torch.cuda.CUDAGraph") -> list[float]:
    seconds = []
    for _ in range(NUM_REPEATS):
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        before.record()
        graph.replay()
        after.record()
        after.synchronize()
        seconds.append(before.elapsed_time(after) / 1e3)
    return seconds


@dataclass(frozen=True, slots=True)
class DeltaCase:
    """So many decode rows that use so many adapters in turn."""

    num_rows: int
    num_adapters: int
    rank: int

    @property
    def title(self) -> str:
        """The case in words."""
        return f"{self.num_rows} rows, {self.num_adapters} adapters of rank {self.rank}"

    def pool(self, layout: AdapterLayout, dtype: torch.dtype, device: torch.device) -> AdapterPool:
        """Make a pool of random values with room for all adapters."""
        num_bytes = 2 * self.num_adapters * self.rank * layout.row_elements * dtype.itemsize
        pool = AdapterPool(layout, num_bytes, dtype, device)
        for arena in pool.arenas.values():
            arena.lora_a.normal_(0, arena.shape.in_features**-0.5)
            arena.lora_b.normal_(0, self.rank**-0.5)
        return pool

    def blocks(self, kind: str) -> list[RowBlock]:
        """One row each, adapters in turn."""
        ranges = [RowRange(i * self.rank, (i + 1) * self.rank) for i in range(self.num_adapters)]
        slots = [Slot(str(index), {kind: rows}, 0) for index, rows in enumerate(ranges)]
        return [
            RowBlock(row, row + 1, (Term(slots[row % self.num_adapters]),))
            for row in range(self.num_rows)
        ]


DELTA_CASES = (
    DeltaCase(1, 1, 16),
    DeltaCase(32, 1, 16),
    DeltaCase(32, 8, 16),
    DeltaCase(32, 32, 64),
)
ATTENTION_CASES = ((1, 2048), (32, 512), (32, 2048), (1, 8192))  # rows, tokens each


def delta_timings(device: torch.device, dtype: torch.dtype, scale: int) -> list[Timing]:
    """Time the deltas of one fused q, k, v projection for decode rows, beside the plain ways."""
    width = 4096 // scale
    shape = GroupShape("qkv", width, (width, width // 4, width // 4), NUM_INPUTS)
    return [_delta_timing(case, shape, device, dtype) for case in DELTA_CASES]


def _delta_timing(
    case: DeltaCase, shape: GroupShape, device: torch.device, dtype: torch.dtype
) -> Timing:
    pool = case.pool(AdapterLayout({"qkv": shape}), dtype, device)
    arena, blocks = pool.arenas["qkv"], case.blocks("qkv")
    x = torch.randn(case.num_rows, shape.in_features, device=device).to(dtype)
    y = torch.zeros(case.num_rows, shape.out_features, device=device, dtype=dtype)
    deltas = TritonDeltas(pool, case.num_rows)
    deltas.fill(blocks)

    def one_by_one(layer: int) -> None:
        for block in blocks:
            add_block(y, x, arena, layer, block)

    def together(layer: int) -> None:
        deltas.start(x, arena, layer)
        deltas.add(y, arena, layer)

    seconds = time_s(together, device)
    read = case.num_adapters * case.rank * shape.row_elements // NUM_INPUTS * dtype.itemsize
    note = f"{read / seconds / 1e9:.0f} GB/s; one by one {1e6 * time_s(one_by_one, device):.0f} µs"
    window = build_plan(blocks, case.num_rows, pool, is_exact=False).windows.get("qkv")
    if window is not None:
        dense = time_s(lambda layer: add_window(y, x, arena, layer, window), device)
        note += f", window {1e6 * dense:.0f} µs"
    return f"deltas of q, k, v: {case.title}", f"{1e6 * seconds:.1f} µs", note


def attention_timings(device: torch.device, dtype: torch.dtype, scale: int) -> list[Timing]:
    """Time decode attention over blocks, beside a dense product over KV laid out side by side."""
    return [
        _attention_timing(num_rows, length // scale, device, dtype)
        for num_rows, length in ATTENTION_CASES
    ]


def _attention_timing(
    num_rows: int, length: int, device: torch.device, dtype: torch.dtype
) -> Timing:
    shape, count = KvShape(8, 128, 128, 4), length // BLOCK_SIZE
    like = torch.empty(0, dtype=dtype, device=device)
    storage = KvStorage([shape] * NUM_INPUTS, num_rows * count + 1, BLOCK_SIZE, like)
    for tensor in (*storage.keys, *storage.values):
        tensor.normal_()
    order = (1 + torch.randperm(num_rows * count)).view(num_rows, count).tolist()
    rows = [KvRow(row, length - 1, 1, blocks) for row, blocks in enumerate(order)]
    query = torch.randn(32, num_rows, 128, device=device).to(dtype)
    out = torch.empty(num_rows, 32, 128, device=device, dtype=dtype)
    tiles = TritonAttention([shape], BLOCK_SIZE, 64, device).fill(rows)
    rule = Rule(128**-0.5)
    seconds = time_s(lambda layer: tiles.attend(storage, layer, query, rule, out), device)
    read = 2 * num_rows * length * shape.num_heads * shape.key_dim * dtype.itemsize
    dense = _dense_seconds(num_rows, length, device, dtype)
    note = f"{read / seconds / 1e9:.0f} GB/s; dense SDPA {1e6 * dense:.0f} µs"
    return f"decode attention: {num_rows} rows of {length} tokens", f"{1e6 * seconds:.1f} µs", note


def _dense_seconds(num_rows: int, length: int, device: torch.device, dtype: torch.dtype) -> float:
    """SDPA's time with KV as it would like it: no blocks, one length."""
    query = torch.randn(num_rows, 32, 1, 128, device=device).to(dtype)
    kv = [
        torch.randn(2, num_rows, 8, length, 128, device=device).to(dtype) for _ in range(NUM_INPUTS)
    ]

    def attend(index: int) -> None:
        key, value = kv[index]
        functional.scaled_dot_product_attention(query, key, value, enable_gqa=True)

    return time_s(attend, device)
