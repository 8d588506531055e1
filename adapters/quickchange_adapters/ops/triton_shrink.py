"""The first half of the deltas, for GPUs. Import it only where Triton is.

    hidden[item, part, piece] = weight · (x[rows, piece] @ lora_a[ranks, part, piece].T)

The input's columns are cut into pieces, so that one row block keeps more than one multiprocessor
busy. A task is one piece of one part of one item; programs take tasks in turn.
"""

from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from quickchange_adapters.layout import GroupShape
from quickchange_adapters.ops.delta_tables import HEADER_INTS, ITEM_INTS, RANK_TILE

MAX_INPUT_TILE = 256
PIECE_COLUMNS = 1024
"""Of the input, for each task."""
MAX_PROGRAMS = 1056
"""Eight for each multiprocessor of a large GPU; more tasks take turns."""
_HEADER = tl.constexpr(HEADER_INTS)
_ITEM = tl.constexpr(ITEM_INTS)


@dataclass(frozen=True, slots=True)
class ShrinkInputs:
    """What one projection's x [tokens, in] is shrunk with: tables, one layer of A, where to.

    `kind`: the group's number in the tables; `num_items`: how many items there are, or more.
    """

    table: Tensor
    hidden: Tensor
    x: Tensor
    lora_a: Tensor
    shape: GroupShape
    kind: int
    num_items: int

    @property
    def num_tasks(self) -> int:
        """How many tasks there are, or more."""
        return self.num_items * self.shape.num_parts * num_pieces(self.shape)

    def constants(self) -> dict[str, Any]:
        """Return what a kernel that shrinks is compiled for."""
        width = self.shape.in_features
        return {
            **group_constants(self.shape, self.kind),
            "WIDTH": width,
            "BLOCK_IN": min(MAX_INPUT_TILE, max(16, triton.next_power_of_2(width))),
            "PIECE": PIECE_COLUMNS,
        }


def num_pieces(shape: GroupShape) -> int:
    """Return how many pieces a group's input is cut into."""
    return -(-shape.in_features // PIECE_COLUMNS)


def group_constants(shape: GroupShape, kind: int) -> dict[str, Any]:
    """Return what both kernels of the deltas are compiled for; `kind`: its number in the tables."""
    return {
        "KIND": kind,
        "NUM_PARTS": shape.num_parts,
        "NUM_PIECES": num_pieces(shape),
        "TILE": RANK_TILE,
    }


def shrink(inputs: ShrinkInputs) -> None:
    """Fill the inputs' hidden sums."""
    _shrink[(min(MAX_PROGRAMS, inputs.num_tasks),)](
        inputs.table, inputs.hidden, inputs.x, inputs.lora_a, inputs.x.stride(0),
        **inputs.constants(), num_warps=4, num_stages=3,
    )  # fmt: skip


@triton.jit  # type: ignore[untyped-decorator]
def _shrink(
    table: tl.tensor,  # [header and rows of every kind]
    hidden: tl.tensor,  # [items, parts, pieces, TILE, TILE] float32
    x: tl.tensor,  # [tokens, WIDTH]
    lora_a: tl.tensor,  # [rank rows, parts, WIDTH] of one layer
    x_stride: tl.tensor,
    KIND: tl.constexpr,
    NUM_PARTS: tl.constexpr,
    NUM_PIECES: tl.constexpr,
    TILE: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    PIECE: tl.constexpr,
) -> None:
    """Grid (any number): each program does every so manieth task."""
    num_tasks = tl.load(table + KIND * _HEADER) * NUM_PARTS * NUM_PIECES
    items = table + tl.load(table + KIND * _HEADER + 1)
    rows = tl.arange(0, TILE)
    columns = tl.arange(0, BLOCK_IN)
    task = tl.program_id(0)
    while task < num_tasks:
        piece = task % NUM_PIECES
        part = task // NUM_PIECES % NUM_PARTS
        entry = items + task // (NUM_PIECES * NUM_PARTS) * _ITEM
        is_row = rows < tl.load(entry + 1)
        is_rank = rows < tl.load(entry + 3)
        x_rows = x + (tl.load(entry) + rows).to(tl.int64) * x_stride
        a_rows = lora_a + ((tl.load(entry + 2) + rows).to(tl.int64) * NUM_PARTS + part) * WIDTH
        product = tl.zeros([TILE, TILE], dtype=tl.float32)
        for offset in range(0, PIECE, BLOCK_IN):
            at = piece * PIECE + offset + columns
            is_column = at < WIDTH
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
        target = hidden + task.to(tl.int64) * TILE * TILE
        tl.store(target + rows[:, None] * TILE + rows[None, :], product, mask=is_row[:, None])
        task += tl.num_programs(0)
