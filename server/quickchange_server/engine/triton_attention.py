"""Attention that reads KV blocks where they lie, for GPUs. Import it only where Triton is.

One kernel for decode rows and prompt chunks. A program owns one tile of a request's tokens and one
KV head; its rows are tokens × the query heads that share the head. It walks the block table once
with a running softmax: nothing is gathered, and only the request's own blocks are read.

Source: Dao et al. 2022 (arXiv 2205.14135); blocks as in Kwon et al. 2023 (arXiv 2309.06180).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from quickchange_adapters.ops.staged_ints import StagedInts
from torch import Tensor

from quickchange_server.engine.attention import KvShape, KvStorage, Rule
from quickchange_server.engine.attention_tiles import TILE_INTS, KvRow, TileTable, tile_table

MAX_TILE_ROWS = 64
MIN_TILE = 16
_TILE = tl.constexpr(TILE_INTS)


@dataclass(frozen=True, slots=True)
class TritonTiles:
    """One step's tiles on the device; implements `StepTiles`."""

    numbers: Tensor
    num_single: int
    num_long: int
    positions_per_tile: int

    def attend(
        self, storage: KvStorage, layer: int, query: Tensor, rule: Rule, out: Tensor
    ) -> None:
        """Fill out [tokens, heads, value dim] for query [heads, tokens, dim]."""
        query = query if query.stride(2) == 1 else query.contiguous()
        kv = storage.keys[layer], storage.values[layer]
        if self.num_single:
            self._launch((0, self.num_single, 1), kv, query, rule, out)
        if self.num_long:
            span = (self.num_single, self.num_long, self.positions_per_tile)
            self._launch(span, kv, query, rule, out)

    def _launch(
        self,
        span: tuple[int, int, int],
        kv: tuple[Tensor, Tensor],
        query: Tensor,
        rule: Rule,
        out: Tensor,
    ) -> None:
        """Compute a span of tiles: (first, how many, tokens in each)."""
        first, count, positions = span
        keys, values = kv
        num_kv, key_dim, value_dim = keys.shape[2], keys.shape[3], values.shape[3]
        groups = query.shape[0] // num_kv
        _attend[(count, num_kv)](
            self.numbers[first * TILE_INTS :], self.numbers, query, keys, values, out,
            rule.scaling, rule.softcap or 1.0, rule.window or 0, query.stride(0), query.stride(1),
            BLOCK_SIZE=keys.shape[1], NUM_KV=num_kv, GROUPS=groups,
            KEY_DIM=key_dim, VALUE_DIM=value_dim,
            KEY_TILE=_padded(key_dim), VALUE_TILE=_padded(value_dim),
            ROW_TILE=_padded(positions * groups), POSITION_TILE=_position_tile(keys),
            HAS_CAP=rule.softcap is not None, HAS_WINDOW=rule.window is not None,
            num_warps=4, num_stages=2,
        )  # fmt: skip


class TritonAttention:
    """Makes each step's tiles; the integers stay at one address while they fit.

    `positions_per_tile` is chosen for the layer with the most query heads per KV head.
    """

    def __init__(
        self, shapes: Sequence[KvShape], block_size: int, capacity: int, device: torch.device
    ) -> None:
        groups = max((shape.num_groups for shape in shapes), default=1)
        self.positions_per_tile = max(1, MAX_TILE_ROWS // groups)
        self._block_size = block_size
        self._device = device
        self._staged = StagedInts(capacity, device)

    def fill(self, rows: Sequence[KvRow]) -> TritonTiles:
        """Lay out and upload one step; a step larger than any before moves to a new address."""
        table = tile_table(rows, self._block_size, self.positions_per_tile)
        if len(table.numbers) > self._staged.capacity:
            self._staged = StagedInts(2 * len(table.numbers), self._device)
        self._staged.upload(table.numbers)
        return self._tiles(table)

    def _tiles(self, table: TileTable) -> TritonTiles:
        return TritonTiles(
            self._staged.values, table.num_single, table.num_long, self.positions_per_tile
        )


def _padded(size: int) -> int:
    padded: int = max(MIN_TILE, triton.next_power_of_2(size))
    return padded


def _position_tile(keys: Tensor) -> int:
    """How many positions at a time: K and V of two stages must fit into shared memory."""
    bytes_per_head = keys.shape[3] * keys.element_size()
    return 64 if bytes_per_head <= 256 else 32 if bytes_per_head <= 512 else 16


@triton.jit  # type: ignore[untyped-decorator]
def _attend(
    tiles: tl.tensor,  # this launch's tiles, [tiles, 4]
    table: tl.tensor,  # all integers of the step: block tables are found by their start in it
    query: tl.tensor,  # [heads, tokens, KEY_DIM]
    keys: tl.tensor,  # [blocks, BLOCK_SIZE, NUM_KV, KEY_DIM]
    values: tl.tensor,  # [blocks, BLOCK_SIZE, NUM_KV, VALUE_DIM]
    out: tl.tensor,  # [tokens, heads, VALUE_DIM]
    scaling: tl.tensor,
    softcap: tl.tensor,
    window: tl.tensor,
    head_stride: tl.tensor,
    token_stride: tl.tensor,
    BLOCK_SIZE: tl.constexpr,
    NUM_KV: tl.constexpr,
    GROUPS: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    KEY_TILE: tl.constexpr,
    VALUE_TILE: tl.constexpr,
    ROW_TILE: tl.constexpr,
    POSITION_TILE: tl.constexpr,
    HAS_CAP: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
) -> None:
    """Grid (tiles, NUM_KV). A tile's row r is token r // GROUPS, query head r % GROUPS."""
    tile = tiles + tl.program_id(0) * _TILE
    kv_head = tl.program_id(1)
    num_tokens = tl.load(tile + 1)
    first_position = tl.load(tile + 2)
    block_table = table + tl.load(tile + 3)
    rows = tl.arange(0, ROW_TILE)
    is_row = rows < num_tokens * GROUPS
    tokens = (tl.load(tile) + rows // GROUPS).to(tl.int64)
    heads = kv_head * GROUPS + rows % GROUPS
    own = tl.where(is_row, first_position + rows // GROUPS, first_position)
    key_columns = tl.arange(0, KEY_TILE)
    value_columns = tl.arange(0, VALUE_TILE)
    q = tl.load(
        query + (heads * head_stride + tokens * token_stride)[:, None] + key_columns[None, :],
        mask=is_row[:, None] & (key_columns < KEY_DIM)[None, :],
        other=0.0,
    )
    highest = tl.full([ROW_TILE], float("-inf"), dtype=tl.float32)
    total = tl.zeros([ROW_TILE], dtype=tl.float32)
    mixed = tl.zeros([ROW_TILE, VALUE_TILE], dtype=tl.float32)
    end = first_position + num_tokens
    start = 0
    if HAS_WINDOW:
        start = tl.maximum(first_position - window + 1, 0)
    for first in range(start, end, POSITION_TILE):
        positions = first + tl.arange(0, POSITION_TILE)
        is_there = positions < end
        block = tl.load(block_table + positions // BLOCK_SIZE, mask=is_there, other=0)
        slot = block.to(tl.int64) * BLOCK_SIZE + positions % BLOCK_SIZE
        k = tl.load(
            keys + ((slot * NUM_KV + kv_head) * KEY_DIM)[None, :] + key_columns[:, None],
            mask=is_there[None, :] & (key_columns < KEY_DIM)[:, None],
            other=0.0,
        )
        scores = tl.dot(q, k, input_precision="ieee") * scaling
        if HAS_CAP:
            scores = softcap * (2 * tl.sigmoid(2 * scores / softcap) - 1)
        is_seen = positions[None, :] <= own[:, None]
        if HAS_WINDOW:
            is_seen = is_seen & (positions[None, :] > own[:, None] - window)
        scores = tl.where(is_seen, scores, float("-inf"))
        new_highest = tl.maximum(highest, tl.max(scores, 1))
        base = tl.where(new_highest == float("-inf"), 0.0, new_highest)
        weights = tl.exp(scores - base[:, None])
        keep = tl.exp(highest - base)
        v = tl.load(
            values + ((slot * NUM_KV + kv_head) * VALUE_DIM)[:, None] + value_columns[None, :],
            mask=is_there[:, None] & (value_columns < VALUE_DIM)[None, :],
            other=0.0,
        )
        mixed = tl.dot(weights.to(v.dtype), v, mixed * keep[:, None], input_precision="ieee")
        total = total * keep + tl.sum(weights, 1)
        highest = new_highest
    target = out + ((tokens * NUM_KV * GROUPS + heads) * VALUE_DIM)[:, None]
    tl.store(
        target + value_columns[None, :],
        (mixed / total[:, None]).to(out.dtype.element_ty),
        mask=is_row[:, None] & (value_columns < VALUE_DIM)[None, :],
    )
