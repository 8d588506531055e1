"""Add adapters' deltas to a fused projection's output: reference, by block, by window, exact.

All take y [tokens, out] (in place), x [tokens, in] and one layer of an arena:
lora_a [rows, parts, in], lora_b [rows, out]. For part p with columns c and a row block that uses
rank rows R with weight w:      y[block, c] += (w · x[block] @ lora_a[R, p].T) @ lora_b[R, c]

Source: Hu et al. 2021 (arXiv 2106.09685), section 4.1; segments as in Punica (arXiv 2310.18547).
"""

import torch
from torch import Tensor
from torch.nn import functional

from quickchange_adapters.layout import GroupShape
from quickchange_adapters.plan import DenseWindow, RowBlock, StepPlan
from quickchange_adapters.pool import Arena, RowRange

EXACT_TILE_ROWS = 16


def add_deltas(y: Tensor, x: Tensor, arena: Arena, layer: int, plan: StepPlan) -> None:
    """Add all deltas of a step to one projection's output, in place."""
    window = plan.windows.get(arena.shape.kind)
    if window is not None:
        num_dense = plan.num_dense_tokens
        add_window(y[:num_dense], x[:num_dense], arena, layer, window)
    for block in plan.blocks:
        add_block(y, x, arena, layer, block, is_exact=plan.is_exact)


def add_block(
    y: Tensor, x: Tensor, arena: Arena, layer: int, block: RowBlock, *, is_exact: bool = False
) -> None:
    """Add one row block's deltas, adapter by adapter, in place."""
    rows_of_block = slice(block.start, block.end)
    for term in block.terms:
        rows = term.slot.ranges.get(arena.shape.kind)
        if rows is None:
            continue
        if is_exact:
            _add_exact(y[rows_of_block], x[rows_of_block], arena, layer, (rows, term.weight))
        else:
            _add_plain(y[rows_of_block], x[rows_of_block], arena, layer, (rows, term.weight))


def add_window(y: Tensor, x: Tensor, arena: Arena, layer: int, window: DenseWindow) -> None:
    """Add the deltas of many one-row blocks with one product over the active window, in place.

    Foreign rank rows are overwritten with zero, never multiplied by it: a neighbour's infinity
    stays the neighbour's.
    """
    shape, num_rows = arena.shape, window.num_rows
    lora_a = arena.lora_a[layer, :num_rows].view(num_rows * shape.num_parts, shape.in_features)
    hidden = functional.linear(x, lora_a).view(-1, num_rows, shape.num_parts).permute(2, 0, 1)
    if window.weights is not None:
        hidden = (hidden.float() * window.weights).to(hidden.dtype)
    hidden = hidden.masked_fill(window.is_foreign, 0)
    for part, columns in enumerate(shape.part_slices):
        y[:, columns].addmm_(hidden[part], arena.lora_b[layer, :num_rows, columns])


def add_reference(y: Tensor, x: Tensor, arena: Arena, layer: int, block: RowBlock) -> None:
    """The plain oracle: float32, one row block, one adapter, one part after another."""
    rows_of_block = slice(block.start, block.end)
    for term in block.terms:
        rows = term.slot.ranges.get(arena.shape.kind)
        if rows is None:
            continue
        for part, columns in enumerate(arena.shape.part_slices):
            lora_a = arena.lora_a[layer, rows.start : rows.end, part].float()
            lora_b = arena.lora_b[layer, rows.start : rows.end, columns].float()
            delta = (x[rows_of_block].float() @ lora_a.t() * term.weight) @ lora_b
            y[rows_of_block, columns] += delta.to(y.dtype)


def _add_plain(
    y: Tensor, x: Tensor, arena: Arena, layer: int, weighted: tuple[RowRange, float]
) -> None:
    rows, weight = weighted
    shape = arena.shape
    hidden = functional.linear(x, _rows_of_a(arena, layer, rows))
    if weight != 1.0:
        hidden = (hidden.float() * weight).to(hidden.dtype)
    hidden = hidden.view(-1, rows.num_rows, shape.num_parts)
    for part, columns in enumerate(shape.part_slices):
        lora_b = arena.lora_b[layer, rows.start : rows.end, columns]
        y[:, columns].addmm_(hidden[:, :, part].contiguous(), lora_b)


def _add_exact(
    y: Tensor, x: Tensor, arena: Arena, layer: int, weighted: tuple[RowRange, float]
) -> None:
    """As `_add_plain`, in tiles of fixed height: a row's bits do not depend on the block's size."""
    rows, weight = weighted
    lora_a = _rows_of_a(arena, layer, rows)
    for start in range(0, x.shape[0], EXACT_TILE_ROWS):
        tile = x[start : start + EXACT_TILE_ROWS]
        num = tile.shape[0]
        tile = functional.pad(tile, (0, 0, 0, EXACT_TILE_ROWS - num))
        hidden = functional.linear(tile, lora_a) * weight
        for columns, delta in _expand_tile(hidden, arena.shape, arena.lora_b[layer], rows):
            y[start : start + num, columns] += delta[:num]


def _expand_tile(
    hidden: Tensor, shape: GroupShape, lora_b: Tensor, rows: RowRange
) -> list[tuple[slice, Tensor]]:
    by_part = hidden.view(-1, rows.num_rows, shape.num_parts).permute(2, 0, 1).contiguous()
    return [
        (columns, torch.mm(by_part[part], lora_b[rows.start : rows.end, columns]))
        for part, columns in enumerate(shape.part_slices)
    ]


def _rows_of_a(arena: Arena, layer: int, rows: RowRange) -> Tensor:
    lora_a = arena.lora_a[layer, rows.start : rows.end]
    return lora_a.view(rows.num_rows * arena.shape.num_parts, arena.shape.in_features)
