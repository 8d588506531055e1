"""Row blocks of a step as integers that a kernel can look up. Knows no kernel.

Row blocks are joined with neighbours that use the same, and cut into such of `MAX_BLOCK_ROWS`. Each
group kind has items, one for up to `RANK_TILE` rank rows of one adapter of one row block, and row
blocks that point at their items (CSR). All kinds lie in one tensor, behind one header:

| part | integers | content |
|---|---|---|
| header, per kind | 4 | number of items, where they start, number of blocks, where they start |
| item | 6 | first row, rows, first rank row, rank rows, bias, weight |
| block | 4 | first row, rows, first item, end of its items |

`bias` is the rank row within the item that is a bias, or -1; `weight` is a float32's bits.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quickchange_adapters.ops.staged_ints import StagedInts
from quickchange_adapters.plan import RowBlock, Term, join_blocks

RANK_TILE = 16
MAX_BLOCK_ROWS = 16
HEADER_INTS, ITEM_INTS, BLOCK_INTS = 4, 6, 4


@dataclass(slots=True)
class _KindTable:
    """One kind's items and blocks, flat."""

    items: list[int]
    blocks: list[int]

    @property
    def num_items(self) -> int:
        return len(self.items) // ITEM_INTS

    @property
    def num_blocks(self) -> int:
        return len(self.blocks) // BLOCK_INTS


class DeltaTables:
    """The tables of the current step, at one address for good.

    `num_items` and `num_blocks` are the largest of any kind: how many programs the kernels need.
    """

    def __init__(
        self, kinds: Sequence[str], max_blocks: int, max_items: int, device: torch.device
    ) -> None:
        self.kinds = tuple(kinds)
        self.max_blocks = max_blocks
        self.max_items = max_items
        per_kind = HEADER_INTS + max_blocks * BLOCK_INTS + max_items * ITEM_INTS
        self._staged = StagedInts(len(self.kinds) * per_kind, device)
        self.num_items = 0
        self.num_blocks = 0

    @property
    def values(self) -> Tensor:
        """The integers on the device; always the same tensor."""
        return self._staged.values

    def fill(self, blocks: Sequence[RowBlock]) -> int:
        """Take the leading blocks, as many as fit; return how many were taken."""
        num_taken = self._num_fitting(blocks)
        cut = _cut(join_blocks(blocks[:num_taken]))
        tables = [_kind_table(kind, cut) for kind in self.kinds]
        self.num_items = max((table.num_items for table in tables), default=0)
        self.num_blocks = len(cut)
        self._staged.upload(_flatten(tables))
        return num_taken

    def _num_fitting(self, blocks: Sequence[RowBlock]) -> int:
        num_items = num_blocks = 0
        for index, block in enumerate(blocks):
            count = -(-block.num_rows // MAX_BLOCK_ROWS)
            num_blocks += count
            num_items += count * max((_num_items(kind, block) for kind in self.kinds), default=0)
            if num_items > self.max_items or num_blocks > self.max_blocks:
                return index
        return len(blocks)


def _cut(blocks: Sequence[RowBlock]) -> list[RowBlock]:
    return [
        RowBlock(start, min(start + MAX_BLOCK_ROWS, block.end), block.terms)
        for block in blocks
        for start in range(block.start, block.end, MAX_BLOCK_ROWS)
    ]


def _num_items(kind: str, block: RowBlock) -> int:
    ranges = [term.slot.ranges.get(kind) for term in block.terms]
    return sum(-(-rows.num_rows // RANK_TILE) for rows in ranges if rows is not None)


def _kind_table(kind: str, blocks: Sequence[RowBlock]) -> _KindTable:
    table = _KindTable([], [])
    for block in blocks:
        first_item = table.num_items
        for term in block.terms:
            table.items.extend(_items(kind, block, term))
        table.blocks += (block.start, block.num_rows, first_item, table.num_items)
    return table


def _items(kind: str, block: RowBlock, term: Term) -> list[int]:
    rows = term.slot.ranges.get(kind)
    if rows is None:
        return []
    items: list[int] = []
    weight = struct.unpack("<i", struct.pack("<f", term.weight))[0]
    for start in range(rows.start, rows.end, RANK_TILE):
        num_ranks = min(RANK_TILE, rows.end - start)
        is_last = start + num_ranks == rows.end
        bias = num_ranks - 1 if rows.has_bias and is_last else -1
        items += (block.start, block.num_rows, start, num_ranks, bias, weight)
    return items


def _flatten(tables: Sequence[_KindTable]) -> list[int]:
    header: list[int] = []
    body: list[int] = []
    start = len(tables) * HEADER_INTS
    for table in tables:
        first_item = start + len(body)
        body += table.items
        header += (table.num_items, first_item, table.num_blocks, start + len(body))
        body += table.blocks
    return header + body


def output_tiles(part_outs: Sequence[int], tile_columns: int) -> Tensor:
    """Cut a fused output into tiles within parts: [tiles, 3] of part, first column, columns."""
    tiles: list[tuple[int, int, int]] = []
    start = 0
    for part, width in enumerate(part_outs):
        for column in range(0, width, tile_columns):
            tiles.append((part, start + column, min(tile_columns, width - column)))
        start += width
    return torch.tensor(tiles, dtype=torch.int32)
