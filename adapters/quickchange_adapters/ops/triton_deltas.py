"""Deltas of a step's short row blocks in two kernels, for GPUs. Import it only where Triton is.

    shrink:  hidden[item, part, piece] = weight · (x[rows, piece] @ lora_a[ranks, part, piece].T)
    expand:  y[rows, tile] += Σ over the block's items (Σ over pieces hidden) @ lora_b[ranks, tile]

The input's columns are cut into pieces, so that one row block keeps more than one multiprocessor
busy; their sums are float32. One program owns a row block's tile of the output, so nothing is added
atomically and the order is fixed; everything that changes from step to step is read from tables at
fixed addresses, so a captured step can be replayed. A rank row whose item is another's is never
read: a neighbour's infinity stays there.

While a step is captured, shrink is put on a branch beside the base's product, which reads the same
input.

Source: shrink and expand as in Punica (Chen et al. 2023, arXiv 2310.18547); ragged ranks without
padding as in S-LoRA (Sheng et al. 2023, arXiv 2311.03285).
"""

import math
from collections.abc import Callable, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from quickchange_adapters.arena import Arena
from quickchange_adapters.layout import GroupShape
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
MAX_INPUT_TILE, MAX_OUTPUT_TILE, MAX_ALIGNMENT = 256, 256, 16
PIECE_COLUMNS = 512
"""Of the input, for each program that shrinks."""
MIN_GRID_ITEMS_PER_BLOCK = 4
"""How many items of a row block a captured step has programs for; more take turns."""
_HEADER = tl.constexpr(HEADER_INTS)
_ITEM = tl.constexpr(ITEM_INTS)
_BLOCK = tl.constexpr(BLOCK_INTS)


class TritonDeltas:
    """Adds the deltas of short row blocks; implements `StepTables`."""

    def __init__(self, pool: AdapterPool, max_blocks: int) -> None:
        max_items = max_blocks * ITEMS_PER_BLOCK
        shapes = [arena.shape for arena in pool.arenas.values()]
        self.tables = DeltaTables(list(pool.arenas), max_blocks, max_items, pool.device)
        num_pieces = max((each.num_parts * _pieces(each) for each in shapes), default=1)
        self._hidden = torch.empty(
            (max_items, num_pieces, MAX_BLOCK_ROWS, RANK_TILE),
            dtype=torch.float32,
            device=pool.device,
        )
        self._tiles = {
            each.kind: output_tiles(each.part_outs, _output_tile(each)).to(pool.device)
            for each in shapes
        }
        self._grid_blocks = 0
        self._grid_items = 0
        self._pool = pool
        self._filled: tuple[int, tuple[RowBlock, ...]] | None = None
        self._num_taken = 0
        self._branch = Branch(pool.device)

    def fill(self, blocks: Sequence[RowBlock]) -> int:
        """Take the leading short blocks, as many as fit; return how many were taken.

        Blocks like the last step's are on the device already.
        """
        wanted = (self._pool.generation, tuple(blocks))
        if wanted != self._filled:
            self._filled = None
            self._num_taken = self.tables.fill(blocks)
            self._filled = wanted
        self._grid_blocks = self.tables.num_blocks
        self._grid_items = self.tables.num_items
        return self._num_taken

    def launch_for(self, max_blocks: int) -> None:
        """Launch enough programs for any later step of so many blocks: for a step to capture."""
        self._grid_blocks = max_blocks
        self._grid_items = MIN_GRID_ITEMS_PER_BLOCK * max_blocks

    def start(self, x: Tensor, arena: Arena, layer: int) -> None:
        """Shrink x [tokens, in] beside what is queued next; `add` waits for it."""
        if self._grid_items:
            self._branch.run(lambda: self._shrink(x, arena, layer))

    def add(self, y: Tensor, arena: Arena, layer: int) -> None:
        """Add the deltas of the blocks that `fill` took, in place; y [tokens, out].

        Rows of other blocks are not written.
        """
        if self._grid_items == 0:
            return
        self._branch.join()
        shape = arena.shape
        tiles = self._tiles[shape.kind]
        assert y.stride(1) == 1, "columns of a projection's output lie side by side"
        _expand[(self._grid_blocks, tiles.shape[0])](
            self.tables.values, tiles, self._hidden, y, arena.lora_b[layer], y.stride(0),
            OUT=shape.out_features, BLOCK_OUT=_output_tile(shape), ALIGNMENT=_alignment(shape),
            **self._constants(shape), num_warps=4, num_stages=3,
        )  # fmt: skip

    def _shrink(self, x: Tensor, arena: Arena, layer: int) -> None:
        shape = arena.shape
        x = x if x.stride(1) == 1 else x.contiguous()
        _shrink[(self._grid_items, shape.num_parts, _pieces(shape))](
            self.tables.values, self._hidden, x, arena.lora_a[layer], x.stride(0),
            IN=shape.in_features, BLOCK_IN=_input_tile(shape.in_features), PIECE=PIECE_COLUMNS,
            **self._constants(shape), num_warps=4, num_stages=3,
        )  # fmt: skip

    def _constants(self, shape: GroupShape) -> dict[str, int]:
        kind = self.tables.kinds.index(shape.kind)
        pieces = _pieces(shape)
        return {"KIND": kind, "NUM_PARTS": shape.num_parts, "NUM_PIECES": pieces, "TILE": RANK_TILE}


class Branch:
    """Work beside the current stream, in a step that is being captured; else it is in line."""

    def __init__(self, device: torch.device) -> None:
        is_cuda = device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if is_cuda else None  # type: ignore[no-untyped-call]
        self.is_on = True
        self._is_open = False

    def run(self, work: Callable[[], None]) -> None:
        """Queue work behind what is queued now, and beside what is queued next."""
        if self._stream is None or not self.is_on or not torch.cuda.is_current_stream_capturing():
            work()
            return
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            work()
        self._is_open = True

    def join(self) -> None:
        """Let what is queued next wait for the work."""
        if self._is_open and self._stream is not None:
            torch.cuda.current_stream().wait_stream(self._stream)
        self._is_open = False


def _pieces(shape: GroupShape) -> int:
    return -(-shape.in_features // PIECE_COLUMNS)


def _alignment(shape: GroupShape) -> int:
    """Return what every part's width is a multiple of: 16 at most, which is enough."""
    return math.gcd(MAX_ALIGNMENT, *shape.part_outs)


def _output_tile(shape: GroupShape) -> int:
    tile: int = min(MAX_OUTPUT_TILE, max(16, triton.next_power_of_2(max(shape.part_outs))))
    return tile


def _input_tile(in_features: int) -> int:
    tile: int = min(MAX_INPUT_TILE, max(16, triton.next_power_of_2(in_features)))
    return tile


@triton.jit  # type: ignore[untyped-decorator]
def _shrink(
    table: tl.tensor,  # [header and rows of every kind]
    hidden: tl.tensor,  # [items, parts, pieces, TILE, TILE] float32
    x: tl.tensor,  # [tokens, IN]
    lora_a: tl.tensor,  # [rank rows, parts, IN] of one layer
    x_stride: tl.tensor,
    KIND: tl.constexpr,
    NUM_PARTS: tl.constexpr,
    NUM_PIECES: tl.constexpr,
    TILE: tl.constexpr,
    IN: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    PIECE: tl.constexpr,
) -> None:
    """Grid (any number, parts, pieces): each program takes every so manieth item."""
    part = tl.program_id(1)
    piece = tl.program_id(2)
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
        for offset in range(0, PIECE, BLOCK_IN):
            at = piece * PIECE + offset + columns
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
        constant = tl.where(piece == 0, 1.0, 0.0)  # a bias is added once, whatever the pieces
        product = tl.where(is_bias[None, :], constant, product) * weight
        product = tl.where(is_rank[None, :], product, 0.0)
        target = hidden + ((item * NUM_PARTS + part) * NUM_PIECES + piece) * TILE * TILE
        tl.store(target + rows[:, None] * TILE + rows[None, :], product, mask=is_row[:, None])
        item += tl.num_programs(0)


@triton.jit  # type: ignore[untyped-decorator]
def _expand(
    table: tl.tensor,
    tiles: tl.tensor,  # [tiles, 3]
    hidden: tl.tensor,  # [items, parts, pieces, TILE, TILE] float32
    y: tl.tensor,  # [tokens, OUT]
    lora_b: tl.tensor,  # [rank rows, OUT] of one layer
    y_stride: tl.tensor,
    KIND: tl.constexpr,
    NUM_PARTS: tl.constexpr,
    NUM_PIECES: tl.constexpr,
    TILE: tl.constexpr,
    OUT: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    ALIGNMENT: tl.constexpr,  # that all parts' widths are multiples of
) -> None:
    """Grid (row blocks or more, output tiles)."""
    block = tl.program_id(0)
    if block < tl.load(table + KIND * _HEADER + 2):
        entry = table + tl.load(table + KIND * _HEADER + 3) + block * _BLOCK
        items = table + tl.load(table + KIND * _HEADER + 1)
        first_item = tl.load(entry + 2)
        end = tl.load(entry + 3)
        if first_item < end:
            tile = tiles + tl.program_id(1) * 3
            part = tl.load(tile)
            rows = tl.arange(0, TILE)
            columns = tl.arange(0, BLOCK_OUT)
            is_row = rows < tl.load(entry + 1)
            # without the hints every number is loaded by itself
            is_column = columns < tl.multiple_of(tl.load(tile + 2), ALIGNMENT)
            at = tl.multiple_of(tl.load(tile + 1), ALIGNMENT) + columns
            first_row = tl.load(entry)
            delta = tl.zeros([TILE, BLOCK_OUT], dtype=tl.float32)
            for item in range(first_item, end):
                source = hidden + (item * NUM_PARTS + part) * NUM_PIECES * TILE * TILE
                source += rows[:, None] * TILE + rows[None, :]
                first_rank = tl.load(items + item * _ITEM + 2)
                is_rank = rows < tl.load(items + item * _ITEM + 3)
                b_rows = lora_b + (first_rank + rows).to(tl.int64) * OUT
                tile_b = tl.load(
                    b_rows[:, None] + at[None, :],
                    mask=is_rank[:, None] & is_column[None, :],
                    other=0.0,
                )
                product = tl.zeros([TILE, TILE], dtype=tl.float32)
                for piece in tl.static_range(NUM_PIECES):
                    product += tl.load(
                        source + piece * TILE * TILE, mask=is_row[:, None], other=0.0
                    )
                delta = tl.dot(product.to(tile_b.dtype), tile_b, delta, input_precision="ieee")
            target = y + (first_row + rows).to(tl.int64)[:, None] * y_stride + at[None, :]
            mask = is_row[:, None] & is_column[None, :]
            old = tl.load(target, mask=mask, other=0.0)
            tl.store(target, (old.to(tl.float32) + delta).to(old.dtype), mask=mask)
