"""Comparisons that take a GPU: offsets beyond 32 bits, bits that no neighbour changes, draws."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from quickchange_adapters.arena import RowRange
from quickchange_adapters.layout import AdapterLayout, GroupShape
from quickchange_adapters.ops.deltas import add_reference
from quickchange_adapters.ops.triton_deltas import TritonDeltas
from quickchange_adapters.plan import RowBlock, Term
from quickchange_adapters.pool import AdapterPool, Slot
from quickchange_server.engine.attention import KvShape, KvStorage, Rule
from quickchange_server.engine.attention_tiles import KvRow
from quickchange_server.engine.batch_sampler import Draw, draw_together
from quickchange_server.engine.triton_attention import TritonAttention
from torch import Tensor

LIMIT = 2e-2
BLOCK_SIZE = 16
FAR = (1 << 31) + (1 << 24)
"""Elements: an offset that 32 bits do not hold."""


@dataclass(frozen=True, slots=True)
class Check:
    """One comparison's outcome; `is_good` also says that nothing was NaN."""

    name: str
    error: float
    limit: float

    @property
    def is_good(self) -> bool:
        """Whether the error is within the limit."""
        return self.error <= self.limit


def far_checks(device: torch.device, dtype: torch.dtype) -> Iterator[Check]:
    """Compare what lies far behind the start of a large pool and a large KV cache."""
    yield Check("deltas beyond 2^31 elements", far_delta_error(device, dtype, FAR), LIMIT)
    yield Check("attention beyond 2^31 elements", far_kv_error(device, dtype, FAR), LIMIT)


def far_delta_error(device: torch.device, dtype: torch.dtype, num_elements: int) -> float:
    """Return the relative error of an adapter in the last rows of so many elements."""
    shape = GroupShape("group", 4096, (4096,), 1)
    num_rows = num_elements // shape.in_features // 8 * 8
    # an eighth of a pool is kept for what is as wide as the vocabulary
    num_bytes = num_rows * shape.row_elements * dtype.itemsize * 8 // 7 + (1 << 20)
    pool = AdapterPool(AdapterLayout({"group": shape}), num_bytes, dtype, device)
    arena = pool.arenas["group"]
    rows = RowRange(arena.num_rows - 16, arena.num_rows)
    for tensor in (arena.lora_a, arena.lora_b):
        tensor[:, rows.start :].normal_(0, 0.1)
    block = RowBlock(0, 1, (Term(Slot("far", {"group": rows}, 0)),))
    x = torch.randn(2, shape.in_features, device=device).to(dtype)
    actual = torch.zeros(2, shape.out_features, device=device, dtype=dtype)
    expected = torch.zeros_like(actual, dtype=torch.float32)
    tables = TritonDeltas(pool, 1)
    tables.fill([block])
    tables.start(x, arena, 0)
    tables.add(actual, arena, 0)
    add_reference(expected, x, arena, 0, block)
    return float((actual.float() - expected).norm() / expected.norm())


def far_kv_error(device: torch.device, dtype: torch.dtype, num_elements: int) -> float:
    """Return the relative error of rows whose KV lies in the last blocks of so many elements."""
    shape = KvShape(8, 128, 128, 4)
    num_blocks = num_elements // (BLOCK_SIZE * shape.num_heads * shape.key_dim)
    like = torch.empty(0, dtype=dtype, device=device)
    far = KvStorage([shape], num_blocks, BLOCK_SIZE, like)
    near = KvStorage([shape], 64, BLOCK_SIZE, like)
    count = 40
    for one, other in ((far.keys[0], near.keys[0]), (far.values[0], near.values[0])):
        one[-count:].normal_()
        other[:count] = one[-count:]
    outs = [_attended(far, num_blocks - count, count), _attended(near, 0, count)]
    return float((outs[0].float() - outs[1].float()).norm() / outs[1].float().norm())


def _attended(storage: KvStorage, first_block: int, count: int) -> Tensor:
    """Return a row of one token and a chunk over so many blocks, for a fixed query."""
    keys = storage.keys[0]
    length = count * BLOCK_SIZE
    blocks = list(range(first_block, first_block + count))
    rows = [KvRow(0, length - 1, 1, blocks), KvRow(1, length - 20, 20, blocks)]
    generator = torch.Generator(keys.device).manual_seed(0)
    query = torch.randn(32, 21, 128, generator=generator, device=keys.device).to(keys.dtype)
    return _attend(storage, rows, query)


def _attend(storage: KvStorage, rows: list[KvRow], query: Tensor) -> Tensor:
    shape = KvShape(8, 128, 128, 4)
    out = torch.zeros(query.shape[1], 32, 128, device=query.device, dtype=query.dtype)
    attention = TritonAttention([shape], BLOCK_SIZE, 4096, query.device)
    attention.fill(rows).attend(storage, 0, query, Rule(128**-0.5), out)
    return out


def bits_check(device: torch.device, dtype: torch.dtype) -> Check:
    """Count numbers of attention that are others alone than beside neighbours."""
    lengths = [1, 17, 600, 1500, 2049]
    counts = [-(-length // BLOCK_SIZE) for length in lengths]
    like = torch.empty(0, dtype=dtype, device=device)
    storage = KvStorage([KvShape(8, 128, 128, 4)], sum(counts) + 1, BLOCK_SIZE, like)
    for tensor in (*storage.keys, *storage.values):
        tensor.normal_()
    blocks = iter(range(1, sum(counts) + 1))
    rows = [
        KvRow(index, length - 1, 1, [next(blocks) for _ in range(count)])
        for index, (length, count) in enumerate(zip(lengths, counts, strict=True))
    ]
    query = torch.randn(32, len(rows), 128, device=device).to(dtype)
    together = _attend(storage, rows, query)
    num_others = 0
    for index, row in enumerate(rows):
        alone = [KvRow(0, row.position, 1, row.blocks)]
        own = _attend(storage, alone, query[:, index : index + 1])
        num_others += int((own[0] != together[index]).sum())
    return Check("attention: other bits alone than together", num_others, 0)


def draws_check(device: torch.device) -> Check:
    """Count rows that are drawn otherwise on the device than on the CPU."""
    generator = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(64, 32000, generator=generator)
    plain: dict[str, Any] = {}
    filters: dict[str, Any] = {"top_k": 50, "top_p": 0.9, "min_p": 0.01}
    num_others = 0
    for values in (plain, filters):
        draws = [Draw((row + 0.5) / 64, 0.9, **values) for row in range(64)]
        pairs = draw_together(logits.to(device), draws), draw_together(logits, draws)
        num_others += sum(one != other for one, other in zip(*pairs, strict=True))
    return Check("rows drawn otherwise than on the CPU", num_others, 0)
