"""Which rows of a step use which adapters. Built once a step, read by every linear."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from quickchange_adapters.arena import Arena
from quickchange_adapters.merge import MergedCopy
from quickchange_adapters.ops.linear_weight import LinearWeight
from quickchange_adapters.pool import AdapterPool, Slot


@dataclass(frozen=True, slots=True)
class Term:
    """One adapter of a row block and its weight in the mix."""

    slot: Slot
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class RowBlock:
    """Rows [start, end) of the packed step that share the same adapters and weights."""

    start: int
    end: int
    terms: tuple[Term, ...]

    @property
    def num_rows(self) -> int:
        """How many rows."""
        return self.end - self.start


def join_blocks(blocks: Sequence[RowBlock]) -> list[RowBlock]:
    """Join neighbours with the same adapters and weights."""
    joined: list[RowBlock] = []
    for block in blocks:
        last = joined[-1] if joined else None
        if last is not None and last.end == block.start and last.terms == block.terms:
            joined[-1] = RowBlock(last.start, block.end, block.terms)
        else:
            joined.append(block)
    return joined


@dataclass(frozen=True, slots=True)
class DenseWindow:
    """One group's active rows for the leading blocks of a step.

    `is_foreign` [tokens, rows]: True where a rank row belongs to none of the token's adapters.
    `weights` [tokens, rows] float32, or None when every weight is 1. `constants` [tokens, rows]:
    what the rank rows that are biases give instead of x·A, or None when there are none.
    """

    num_rows: int
    is_foreign: Tensor
    weights: Tensor | None = None
    constants: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Projection:
    """A projection's output [tokens, out], and what whoever reads it has still to add.

    `deltas`: [tokens, out] float32, valid until the next projection of the kind; None: nothing.
    """

    output: Tensor
    deltas: Tensor | None = None


class StepTables(Protocol):
    """Row blocks of the current step, computed by kernels that look them up in tables."""

    def fill(self, blocks: Sequence[RowBlock]) -> int:
        """Take the leading blocks, as many as fit; return how many were taken."""

    def launch_for(self, max_blocks: int) -> None:
        """Launch enough programs for any later step of so many blocks: for a step to capture."""

    def start(self, x: Tensor, arena: Arena, layer: int) -> None:
        """Begin the taken blocks' deltas of one projection's input, beside what is queued next."""

    def project(
        self, weight: LinearWeight, x: Tensor, bias: Tensor | None, arena: Arena, layer: int
    ) -> Projection:
        """Return x @ W.T + bias with the taken blocks' deltas of x, in place or apart."""

    def add(self, y: Tensor, arena: Arena, layer: int) -> None:
        """Add what was begun to the projection's output, in place."""


@dataclass(frozen=True, slots=True)
class StepPlan:
    """Deltas of one step.

    Attributes:
        num_tokens: rows of the packed step.
        tables: computes the leading blocks instead of `windows`, where there are kernels.
        windows: by group kind; computed for rows [0, num_dense_tokens) at once.
        num_dense_tokens: rows covered by `windows`.
        blocks: row blocks behind the dense rows, computed one after another.
        is_exact: compute in tiles of fixed height, so that a row's bits depend on nothing else.
        head_blocks: row blocks over the rows whose logits are wanted (the head's plan).
        merged: all rows use this copy; there are no deltas then.
    """

    num_tokens: int
    windows: dict[str, DenseWindow] = field(default_factory=dict)
    num_dense_tokens: int = 0
    blocks: tuple[RowBlock, ...] = ()
    head_blocks: tuple[RowBlock, ...] = ()
    is_exact: bool = False
    merged: MergedCopy | None = None
    tables: StepTables | None = None

    @property
    def has_deltas(self) -> bool:
        """Whether any row needs an adapter's delta."""
        return bool(self.windows or self.blocks or self.tables)


def build_plan(
    blocks: Sequence[RowBlock],
    num_tokens: int,
    pool: AdapterPool,
    *,
    is_exact: bool,
    tables: StepTables | None = None,
) -> StepPlan:
    """Choose how to compute a step's deltas: short leading blocks together, long ones singly.

    `blocks` are in row order and leave out rows of the base. Decode rows come first in a step, so
    the leading run of short blocks is the decode part; there a product over the whole active
    window costs less than a pair of small products per adapter and layer. `tables` take the
    leading blocks, long ones too, where they are given.
    """
    if is_exact:
        return StepPlan(num_tokens, blocks=tuple(blocks), is_exact=True)
    if tables is not None:
        num_taken = tables.fill(blocks)
        rest = tuple(blocks[num_taken:])
        return StepPlan(num_tokens, blocks=rest, tables=tables if num_taken else None)
    num_short = next((i for i, b in enumerate(blocks) if b.num_rows > 1), len(blocks))
    short = blocks[:num_short] if _is_window_worthwhile(blocks[:num_short]) else ()
    if not short:
        return StepPlan(num_tokens, blocks=tuple(blocks))
    num_dense = short[-1].end
    windows = {
        kind: window
        for kind, arena in pool.arenas.items()
        if (window := _build_window(short, num_dense, arena)) is not None
    }
    return StepPlan(num_tokens, windows, num_dense, tuple(blocks[len(short) :]))


def _is_window_worthwhile(blocks: Sequence[RowBlock]) -> bool:
    return len(blocks) > 1


def _build_window(blocks: Sequence[RowBlock], num_tokens: int, arena: Arena) -> DenseWindow | None:
    kind = arena.shape.kind
    entries = [
        (block, rows, term.weight)
        for block in blocks
        for term in block.terms
        if (rows := term.slot.ranges.get(kind)) is not None
    ]
    if not entries:
        return None
    num_rows = max(rows.end for _, rows, _ in entries)
    is_foreign = torch.ones(num_tokens, num_rows, dtype=torch.bool)
    weights = torch.ones(num_tokens, num_rows)
    constants = torch.zeros(num_tokens, num_rows)
    for block, rows, weight in entries:
        is_foreign[block.start : block.end, rows.start : rows.end] = False
        weights[block.start : block.end, rows.start : rows.end] = weight
        if rows.has_bias:
            constants[block.start : block.end, rows.end - 1] = weight
    device, dtype = arena.lora_a.device, arena.lora_a.dtype
    is_weighted = any(weight != 1.0 for _, _, weight in entries)
    has_bias = any(rows.has_bias for _, rows, _ in entries)
    return DenseWindow(
        num_rows,
        is_foreign.to(device, non_blocking=True),
        weights.to(device, non_blocking=True) if is_weighted else None,
        constants.to(device, dtype, non_blocking=True) if has_bias else None,
    )
