"""Deltas of a step's short row blocks in two kernels, for GPUs. Import it only where Triton is.

    shrink:  hidden[item, part] = weight · (x[rows] @ lora_a[ranks, part].T)      float32
    expand:  y[rows, tile] += Σ over the row block's items  hidden[item, part] @ lora_b[ranks, tile]

One program owns a row block's tile of the output, so nothing is added atomically; everything that
changes from step to step is read from tables at fixed addresses, so a captured step can be
replayed. A rank row whose item is another's is never read: a neighbour's infinity stays there.

Source: shrink and expand as in Punica (Chen et al. 2023, arXiv 2310.18547); ragged ranks without
padding as in S-LoRA (Sheng et al. 2023, arXiv 2311.03285).
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from quickchange_adapters.arena import Arena
from quickchange_adapters.ops.delta_tables import (
    BLOCK_INTS,
    HEADER_INTS,
    ITEM_INTS,
    MAX_BLOCK_ROWS,
    RANK_TILE,
    DeltaTables,
    output_tiles,
)
from quickchange_adapters.plan import RowBlock
from quickchange_adapters.pool import AdapterPool

ITEMS_PER_BLOCK = 16
MAX_INPUT_TILE, OUTPUT_TILE = 128, 128
_HEADER = tl.constexpr(HEADER_INTS)
_ITEM = tl.constexpr(ITEM_INTS)
_BLOCK = tl.constexpr(BLOCK_INTS)


class TritonDeltas:
    """Adds the deltas of short row blocks; implements `StepTables`."""

    def __init__(self, pool: AdapterPool, max_blocks: int) -> None:
        max_items = max_blocks * ITEMS_PER_BLOCK
        arenas = pool.arenas.values()
        self.tables = DeltaTables(list(pool.arenas), max_blocks, max_items, pool.device)
        num_parts = max((arena.shape.num_parts for arena in arenas), default=1)
        self._hidden = torch.empty(
            (max_items, num_parts, MAX_BLOCK_ROWS, RANK_TILE),
            dtype=torch.float32,
            device=pool.device,
        )
        self._tiles = {
            arena.shape.kind: output_tiles(arena.shape.part_outs, OUTPUT_TILE).to(pool.device)
            for arena in arenas
        }
        self._grid_blocks = 0
        self._grid_items = 0

    def fill(self, blocks: Sequence[RowBlock]) -> int:
        """Take the leading short blocks, as many as fit; return how many were taken."""
        num_taken = self.tables.fill(blocks)
        self._grid_blocks = self.tables.num_blocks
        self._grid_items = self.tables.num_items
        return num_taken

    def launch_for(self, max_blocks: int) -> None:
        """Launch enough programs for any later step of so many blocks: for a step to capture."""
        self._grid_blocks = max_blocks
        self._grid_items = 2 * max_blocks

    def add(self, y: Tensor, x: Tensor, arena: Arena, layer: int) -> None:
        """Add the deltas of the blocks that `fill` took, in place; y [tokens, out], x [tokens, in].

        Rows of other blocks are neither read nor written.
        """
        if self._grid_items == 0:
            return
        shape = arena.shape
        kind = self.tables.kinds.index(shape.kind)
        table, tiles = self.tables.values, self._tiles[shape.kind]
        x = x if x.stride(1) == 1 else x.contiguous()
        assert y.stride(1) == 1, "columns of a projection's output lie side by side"
        constants = {"KIND": kind, "NUM_PARTS": shape.num_parts, "TILE": RANK_TILE}
        _shrink[(self._grid_items, shape.num_parts)](
            table, self._hidden, x, arena.lora_a[layer], x.stride(0),
            IN=shape.in_features, BLOCK_IN=_input_tile(shape.in_features), **constants,
        )  # fmt: skip
        _expand[(self._grid_blocks, tiles.shape[0])](
            table, tiles, self._hidden, y, arena.lora_b[layer], y.stride(0),
            OUT=shape.out_features, BLOCK_OUT=OUTPUT_TILE, **constants,
        )  # fmt: skip


def _input_tile(in_features: int) -> int:
    tile: int = min(MAX_INPUT_TILE, max(16, triton.next_power_of_2(in_features)))
    return tile


@triton.jit  # type: ignore[untyped-decorator]
def _shrink(
    table: tl.tensor,  # [header and rows of every kind]
    hidden: tl.tensor,  # [items, parts, TILE, TILE] float32
    x: tl.tensor,  # [tokens, IN]
    lora_a: tl.tensor,  # [rank rows, parts, IN] of one layer
    x_stride: tl.tensor,
    KIND: tl.constexpr,
    NUM_PARTS: tl.constexpr,
    TILE: tl.constexpr,
    IN: tl.constexpr,
    BLOCK_IN: tl.constexpr,
) -> None:
    """Grid (any number, parts): each program takes every so manieth item."""
    part = tl.program_id(1)
    num_items = tl.load(table + KIND * _HEADER)
    items = table + tl.load(table + KIND * _HEADER + 1)
    rows = tl.arange(0, TILE)
    columns = tl.arange(0, BLOCK_IN)
    item = tl.program_id(0)
    while item < num_items:
        entry = items + item * _ITEM
        is_row = rows < tl.load(entry + 1)
        is_rank = rows < tl.load(entry + 3)
        x_rows = x + (tl.load(entry) + rows).to(tl.int64) * x_stride
        a_rows = lora_a + ((tl.load(entry + 2) + rows).to(tl.int64) * NUM_PARTS + part) * IN
        product = tl.zeros([TILE, TILE], dtype=tl.float32)
        for start in range(0, IN, BLOCK_IN):
            at = start + columns
            is_column = at < IN
            tile_x = tl.load(
                x_rows[:, None] + at[None, :], mask=is_row[:, None] & is_column[None, :], other=0.0
            )
            tile_a = tl.load(
                a_rows[None, :] + at[:, None], mask=is_rank[None, :] & is_column[:, None], other=0.0
            )
            product = tl.dot(tile_x, tile_a, product, input_precision="ieee")
        is_bias = rows == tl.load(entry + 4)
        weight = tl.load(entry + 5).to(tl.float32, bitcast=True)
        product = tl.where(is_bias[None, :], 1.0, product) * weight
        product = tl.where(is_rank[None, :], product, 0.0)
        target = hidden + (item * NUM_PARTS + part) * TILE * TILE
        tl.store(target + rows[:, None] * TILE + rows[None, :], product)
        item += tl.num_programs(0)


@triton.jit  # type: ignore[untyped-decorator]
def _expand(
    table: tl.tensor,
    tiles: tl.tensor,  # [tiles, 3]
    hidden: tl.tensor,  # [items, parts, TILE, TILE] float32
    y: tl.tensor,  # [tokens, OUT]
    lora_b: tl.tensor,  # [rank rows, OUT] of one layer
    y_stride: tl.tensor,
    KIND: tl.constexpr,
    NUM_PARTS: tl.constexpr,
    TILE: tl.constexpr,
    OUT: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
) -> None:
    """Grid (row blocks or more, output tiles)."""
    block = tl.program_id(0)
    if block < tl.load(table + KIND * _HEADER + 2):
        entry = table + tl.load(table + KIND * _HEADER + 3) + block * _BLOCK
        items = table + tl.load(table + KIND * _HEADER + 1)
        item = tl.load(entry + 2)
        end = tl.load(entry + 3)
        if item < end:
            tile = tiles + tl.program_id(1) * 3
            part = tl.load(tile)
            rows = tl.arange(0, TILE)
            columns = tl.arange(0, BLOCK_OUT)
            is_column = columns < tl.load(tile + 2)
            at = tl.load(tile + 1) + columns
            delta = tl.zeros([TILE, BLOCK_OUT], dtype=tl.float32)
            while item < end:
                source = hidden + (item * NUM_PARTS + part) * TILE * TILE
                product = tl.load(source + rows[:, None] * TILE + rows[None, :])
                first_rank = tl.load(items + item * _ITEM + 2)
                is_rank = rows < tl.load(items + item * _ITEM + 3)
                b_rows = lora_b + (first_rank + rows).to(tl.int64) * OUT
                tile_b = tl.load(
                    b_rows[:, None] + at[None, :],
                    mask=is_rank[:, None] & is_column[None, :],
                    other=0.0,
                )
                delta = tl.dot(product.to(tile_b.dtype), tile_b, delta, input_precision="ieee")
                item += 1
            y_rows = y + (tl.load(entry) + rows).to(tl.int64) * y_stride
            target = y_rows[:, None] + at[None, :]
            mask = (rows < tl.load(entry + 1))[:, None] & is_column[None, :]
            old = tl.load(target, mask=mask, other=0.0)
            tl.store(target, (old.to(tl.float32) + delta).to(old.dtype), mask=mask)
