"""Add adapters' deltas to a fused projection's output: reference, by block, by window, exact.

All take y [tokens, out] (in place), x [tokens, in] and one layer of an arena:
lora_a [rows, parts, in], lora_b [rows, out]. For part p with columns c and a row block that uses
rank rows R with weight w:      y[block, c] += (w · x[block] @ lora_a[R, p].T) @ lora_b[R, c]

Source: Hu et al. 2021 (arXiv 2106.09685), section 4.1; segments as in Punica (arXiv 2310.18547).
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from quickchange_adapters.arena import Arena, RowRange
from quickchange_adapters.plan import DenseWindow, RowBlock, StepPlan
from quickchange_adapters.weights import LoraPair

EXACT_TILE_ROWS = 16


def start_deltas(x: Tensor, arena: Arena, layer: int, plan: StepPlan) -> None:
    """Begin what can be computed beside the base's own product of the same input."""
    if plan.tables is not None:
        plan.tables.start(x, arena, layer)


def add_deltas(y: Tensor, x: Tensor, arena: Arena, layer: int, plan: StepPlan) -> None:
    """Add all deltas of a step to one projection's output, in place, behind `start_deltas`."""
    window = plan.windows.get(arena.shape.kind)
    if window is not None:
        num_dense = plan.num_dense_tokens
        add_window(y[:num_dense], x[:num_dense], arena, layer, window)
    if plan.tables is not None:
        plan.tables.add(y, arena, layer)
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
    if window.constants is not None:
        hidden += window.constants
    for part, columns in enumerate(shape.part_slices):
        y[:, columns].addmm_(hidden[part], arena.lora_b[layer, :num_rows, columns])


def add_head(y: Tensor, x: Tensor, block: RowBlock, *, is_exact: bool = False) -> None:
    """Add a row block's updates of the head, in place; y [rows, vocabulary], x [rows, width]."""
    rows = slice(block.start, block.end)
    for term in block.terms:
        if term.slot.head is not None:
            product = partial(_low_rank, pair=term.slot.head, weight=term.weight)
            y[rows] += _in_tiles(x[rows], product, is_exact=is_exact)


def add_embedding(
    embeds: Tensor, token_ids: Tensor, block: RowBlock, *, is_exact: bool = False
) -> None:
    """Add a row block's updates of the embedding, in place; embeds [tokens, width]."""
    rows = slice(block.start, block.end)
    for term in block.terms:
        if term.slot.embedding is not None:
            pair = term.slot.embedding
            hidden = pair.lora_a.t()[token_ids[rows]] * term.weight
            product = partial(functional.linear, weight=pair.lora_b)
            embeds[rows] += _in_tiles(hidden, product, is_exact=is_exact)


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
            hidden = x[rows_of_block].float() @ lora_a.t()
            if rows.has_bias:
                hidden[:, -1] = 1
            delta = hidden * term.weight @ lora_b
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
    if rows.has_bias:
        hidden[:, -1] = weight
    for part, columns in enumerate(shape.part_slices):
        lora_b = arena.lora_b[layer, rows.start : rows.end, columns]
        y[:, columns].addmm_(hidden[:, :, part].contiguous(), lora_b)


def _add_exact(
    y: Tensor, x: Tensor, arena: Arena, layer: int, weighted: tuple[RowRange, float]
) -> None:
    """As `_add_plain`, in tiles of fixed height: a row's bits do not depend on the block's size."""
    rows, weight = weighted
    shape, lora_a = arena.shape, _rows_of_a(arena, layer, rows)
    lora_b = arena.lora_b[layer, rows.start : rows.end]

    def product(tile: Tensor) -> Tensor:
        hidden = functional.linear(tile, lora_a) * weight
        by_part = hidden.view(-1, rows.num_rows, shape.num_parts).permute(2, 0, 1).contiguous()
        if rows.has_bias:
            by_part[:, :, -1] = weight
        parts = zip(by_part, shape.part_slices, strict=True)
        return torch.cat([torch.mm(part, lora_b[:, columns]) for part, columns in parts], dim=1)

    y += _in_tiles(x, product, is_exact=True)


def _in_tiles(x: Tensor, product: Callable[[Tensor], Tensor], *, is_exact: bool) -> Tensor:
    """Apply a product to x [rows, in]; exact: padded tiles of one height, one after another."""
    if not is_exact:
        return product(x)
    tiles = []
    for tile in torch.split(x, EXACT_TILE_ROWS):
        padding = EXACT_TILE_ROWS - tile.shape[0]
        tiles.append(product(functional.pad(tile, (0, 0, 0, padding)))[: tile.shape[0]])
    return torch.cat(tiles)


def _low_rank(x: Tensor, pair: LoraPair, weight: float) -> Tensor:
    return functional.linear(functional.linear(x, pair.lora_a) * weight, pair.lora_b)


def _rows_of_a(arena: Arena, layer: int, rows: RowRange) -> Tensor:
    lora_a = arena.lora_a[layer, rows.start : rows.end]
    return lora_a.view(rows.num_rows * arena.shape.num_parts, arena.shape.in_features)
