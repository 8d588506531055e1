"""Deltas of a step's row blocks in two kernels, for GPUs. Import it only where Triton is.

    shrink:  hidden[item, part, piece] = weight · (x[rows, piece] @ lora_a[ranks, part, piece].T)
    expand:  deltas[rows, tile] = Σ over the block's items
                                  (Σ over pieces hidden) @ lora_b[ranks, tile]

Sums of pieces are float32. One program owns a row block's tile of the output, so nothing is added
atomically and the order is fixed; everything that changes from step to step is read from tables at
fixed addresses, so a captured step can be replayed. A rank row whose item is another's is never
read: a neighbour's infinity stays there.

Both run on a branch beside the base's product while a step is captured: shrink reads the same
input, and the deltas lie apart until whoever reads the projection adds them on the way. So a step
waits for them only as far as it waits for the memory. Where the reader knows nothing of it
(another block's code, many rows), expand adds them in place.

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
from quickchange_adapters.ops.linear_weight import LinearWeight
from quickchange_adapters.ops.triton_chain import (
    is_chained,
    launch_options,
    let_next_start,
    wait_for_inputs,
)
from quickchange_adapters.ops.triton_product import SkinnyWeight
from quickchange_adapters.ops.triton_shrink import (
    ShrinkInputs,
    group_constants,
    num_pieces,
    shrink,
)
from quickchange_adapters.plan import Projection, RowBlock
from quickchange_adapters.pool import AdapterPool

ITEMS_PER_BLOCK = 16
MAX_OUTPUT_TILE, MAX_ALIGNMENT = 256, 16
MAX_HIDDEN_BYTES = 256 << 20
"""Of sums between the two kernels: blocks whose sums do not fit are left to others."""
MAX_APART_ROWS = 512
"""Of a step whose deltas have memory of their own."""
MIN_GRID_ITEMS_PER_BLOCK = 4
"""How many items of a row block a captured step has programs for; more take turns."""
_HEADER = tl.constexpr(HEADER_INTS)
_ITEM = tl.constexpr(ITEM_INTS)
_BLOCK = tl.constexpr(BLOCK_INTS)


class TritonDeltas:
    """Adds the deltas of row blocks; implements `StepTables`.

    `max_rows`: most rows of one token in a step; `max_tokens`: of all its rows, the others' are cut
    into blocks. What does not fit, blocks of mixes of large ranks, is left to others.
    """

    def __init__(self, pool: AdapterPool, max_rows: int, max_tokens: int = 0) -> None:
        max_blocks = max_rows + -(-max_tokens // MAX_BLOCK_ROWS)
        shapes = [arena.shape for arena in pool.arenas.values()]
        most_pieces = max((each.num_parts * num_pieces(each) for each in shapes), default=1)
        item_bytes = most_pieces * MAX_BLOCK_ROWS * RANK_TILE * torch.float32.itemsize
        max_items = min(max_blocks * ITEMS_PER_BLOCK, MAX_HIDDEN_BYTES // item_bytes)
        self.tables = DeltaTables(list(pool.arenas), max_blocks, max_items, pool.device)
        self._hidden = torch.empty(
            (max_items, most_pieces, MAX_BLOCK_ROWS, RANK_TILE),
            dtype=torch.float32,
            device=pool.device,
        )
        self._tiles = {
            each.kind: output_tiles(each.part_outs, _output_tile(each)).to(pool.device)
            for each in shapes
        }
        num_apart = min(max_rows, MAX_APART_ROWS)
        self._apart = {
            each.kind: torch.zeros(num_apart, each.out_features, device=pool.device)
            for each in shapes
        }
        self._grid_blocks = 0
        self._grid_items = 0
        self._is_for_capture = False
        self._begun: ShrinkInputs | None = None
        self._pool = pool
        self._filled: tuple[int, tuple[RowBlock, ...]] | None = None
        self._num_taken = 0
        self._branch = Branch(pool.device)

    def fill(self, blocks: Sequence[RowBlock]) -> int:
        """Take the leading blocks, as many as fit; return how many were taken.

        Blocks like the last step's are on the device already.
        """
        wanted = (self._pool.generation, tuple(blocks))
        if wanted != self._filled:
            self._filled = None
            for deltas in self._apart.values():
                deltas.zero_()  # of rows that no block writes any more
            self._num_taken = self.tables.fill(blocks)
            self._filled = wanted
        self._grid_blocks = self.tables.num_blocks
        self._grid_items = self.tables.num_items
        self._is_for_capture = False
        return self._num_taken

    def launch_for(self, max_blocks: int) -> None:
        """Launch enough programs for any later step of so many blocks: for a step to capture."""
        self._grid_blocks = max_blocks
        self._grid_items = MIN_GRID_ITEMS_PER_BLOCK * max_blocks
        self._is_for_capture = True

    def warm_up(self) -> None:
        """Compile what eager steps launch; nothing is computed."""
        self.fill(())
        self._grid_blocks = self._grid_items = 1
        for arena in self._pool.arenas.values():
            shape, like = arena.shape, arena.lora_a
            self.start(like.new_zeros(2, shape.in_features), arena, 0)
            self.add(like.new_zeros(2, shape.out_features), arena, 0)
        self.fill(())

    def project(
        self, weight: LinearWeight, x: Tensor, bias: Tensor | None, arena: Arena, layer: int
    ) -> Projection:
        """Return x @ W.T + bias with the deltas of x [tokens, in] apart, for as few rows as that.

        They are computed beside the product, from begin to end, on a GPU that captures a step.
        """
        deltas = self._apart[arena.shape.kind]
        if x.shape[0] > deltas.shape[0]:
            self.start(x, arena, layer)
            y = weight.apply(x, bias)
            self.add(y, arena, layer)
            return Projection(y)
        inputs = self._inputs(x, arena, layer)

        def compute() -> None:
            shrink(inputs)
            self._expand(deltas, arena, layer, is_apart=True, is_in_chain=False)

        if self._grid_items:
            self._branch.run(compute)
        y = _apply_beside(weight, x, bias)
        self._branch.join()
        return Projection(y, deltas[: x.shape[0]])

    def start(self, x: Tensor, arena: Arena, layer: int) -> None:
        """Shrink x [tokens, in] beside what is queued next; `add` waits for it."""
        if self._grid_items:
            inputs = self._begun = self._inputs(x, arena, layer)  # kept: the branch reads it
            self._branch.run(lambda: shrink(inputs))

    def add(self, y: Tensor, arena: Arena, layer: int) -> None:
        """Add the deltas of the blocks that `fill` took, in place; y [tokens, out].

        Rows of other blocks are not written.
        """
        if self._grid_items == 0:
            return
        self._branch.join()
        self._begun = None
        # Behind a join two kernels come before, and a chain is of one. What is captured is launched
        # the same way before: another variant would be loaded amid the capture.
        is_in_chain = is_chained(y.device) and not self._is_for_capture
        self._expand(y, arena, layer, is_apart=False, is_in_chain=is_in_chain)

    def _expand(
        self, y: Tensor, arena: Arena, layer: int, *, is_apart: bool, is_in_chain: bool
    ) -> None:
        shape = arena.shape
        tiles = self._tiles[shape.kind]
        assert y.stride(1) == 1, "columns of a projection's output lie side by side"
        _expand[(self._grid_blocks, tiles.shape[0])](
            self.tables.values, tiles, self._hidden, y, arena.lora_b[layer], y.stride(0),
            OUT=shape.out_features, BLOCK_OUT=_output_tile(shape), ALIGNMENT=_alignment(shape),
            IS_APART=is_apart, **group_constants(shape, self._kind(shape)),
            num_warps=4, num_stages=3, **launch_options(is_on=is_in_chain),
        )  # fmt: skip

    def _inputs(self, x: Tensor, arena: Arena, layer: int) -> ShrinkInputs:
        x = x if x.stride(1) == 1 else x.contiguous()
        parts = self.tables.values, self._hidden, x, arena.lora_a[layer]
        return ShrinkInputs(*parts, arena.shape, self._kind(arena.shape), self._grid_items)

    def _kind(self, shape: GroupShape) -> int:
        return self.tables.kinds.index(shape.kind)


class Branch:
    """Work beside the current stream, in a step that is being captured; else it is in line."""

    def __init__(self, device: torch.device) -> None:
        is_cuda = device.type == "cuda"
        self._stream = torch.cuda.Stream(device, priority=-1) if is_cuda else None  # type: ignore[no-untyped-call]
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


def _apply_beside(weight: LinearWeight, x: Tensor, bias: Tensor | None) -> Tensor:
    if isinstance(weight, SkinnyWeight):
        return weight.apply(x, bias, is_alone=False)
    return weight.apply(x, bias)


def _alignment(shape: GroupShape) -> int:
    """Return what every part's width is a multiple of: 16 at most, which is enough."""
    return math.gcd(MAX_ALIGNMENT, *shape.part_outs)


def _output_tile(shape: GroupShape) -> int:
    tile: int = min(MAX_OUTPUT_TILE, max(16, triton.next_power_of_2(max(shape.part_outs))))
    return tile


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
    IS_APART: tl.constexpr,  # y is float32 and holds the deltas alone
    IS_CHAINED: tl.constexpr,
) -> None:
    """Grid (row blocks or more, output tiles). Each item's B is read before the one before it ends.

    The first one's is there before the inputs are.
    """
    let_next_start(IS_CHAINED)
    block = tl.program_id(0)
    is_there = block < tl.load(table + KIND * _HEADER + 2)
    entry = table + tl.load(table + KIND * _HEADER + 3) + block * _BLOCK
    items = table + tl.load(table + KIND * _HEADER + 1)
    first_row = tl.load(entry, mask=is_there, other=0)
    num_rows = tl.load(entry + 1, mask=is_there, other=0)
    first_item = tl.load(entry + 2, mask=is_there, other=0)
    end = tl.load(entry + 3, mask=is_there, other=0)
    tile = tiles + tl.program_id(1) * 3
    part = tl.load(tile)
    rows = tl.arange(0, TILE)
    columns = tl.arange(0, BLOCK_OUT)
    is_row = rows < num_rows
    # without the hints every number is loaded by itself
    is_column = columns < tl.multiple_of(tl.load(tile + 2), ALIGNMENT)
    at = tl.multiple_of(tl.load(tile + 1), ALIGNMENT) + columns
    tile_b = _rows_of_b(lora_b, items, first_item, end, rows, at, is_column, OUT)
    wait_for_inputs(IS_CHAINED)
    delta = tl.zeros([TILE, BLOCK_OUT], dtype=tl.float32)
    for item in range(first_item, end):
        next_b = _rows_of_b(lora_b, items, item + 1, end, rows, at, is_column, OUT)
        source = hidden + (item * NUM_PARTS + part) * NUM_PIECES * TILE * TILE
        source += rows[:, None] * TILE + rows[None, :]
        product = tl.zeros([TILE, TILE], dtype=tl.float32)
        for piece in tl.static_range(NUM_PIECES):
            product += tl.load(source + piece * TILE * TILE, mask=is_row[:, None], other=0.0)
        delta = tl.dot(product.to(tile_b.dtype), tile_b, delta, input_precision="ieee")
        tile_b = next_b
    target = y + (first_row + rows).to(tl.int64)[:, None] * y_stride + at[None, :]
    mask = is_row[:, None] & is_column[None, :]
    if not IS_APART:
        mask = mask & (first_item < end)
        delta += tl.load(target, mask=mask, other=0.0).to(tl.float32)
    tl.store(target, delta.to(y.dtype.element_ty), mask=mask)


@triton.jit  # type: ignore[untyped-decorator]
def _rows_of_b(
    lora_b: tl.tensor,
    items: tl.tensor,
    item: tl.tensor,
    end: tl.tensor,
    rows: tl.tensor,
    at: tl.tensor,
    is_column: tl.tensor,
    OUT: tl.constexpr,
) -> tl.tensor:
    """Return an item's tile of B; zeros behind the last item."""
    entry = items + item * _ITEM
    first_rank = tl.load(entry + 2, mask=item < end, other=0)
    is_rank = rows < tl.load(entry + 3, mask=item < end, other=0)
    b_rows = lora_b + (first_rank + rows).to(tl.int64) * OUT
    mask = is_rank[:, None] & is_column[None, :]
    return tl.load(b_rows[:, None] + at[None, :], mask=mask, other=0.0)
