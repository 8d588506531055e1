"""A step's rows as tiles and block tables that an attention kernel can look up. Knows no kernel.

A tile is up to `positions_per_tile` consecutive tokens of one request. One-token tiles come first,
so that they can be computed with less height. Layout of the integers:

| part | integers | content |
|---|---|---|
| tile | 4 | first packed row, tokens, position of the first, where the block table starts |
| block table, per request | as many as it has blocks | block numbers in the order of positions |
"""

from collections.abc import Sequence
from dataclasses import dataclass

TILE_INTS = 4


@dataclass(frozen=True, slots=True)
class KvRow:
    """Packed rows [start, start + num_tokens) of one request, from `position` on."""

    start: int
    position: int
    num_tokens: int
    blocks: Sequence[int]


@dataclass(frozen=True, slots=True)
class TileTable:
    """The integers of one step, and how many tiles of either kind lie in front."""

    numbers: list[int]
    num_single: int
    num_long: int


def tile_table(rows: Sequence[KvRow], block_size: int, positions_per_tile: int) -> TileTable:
    """Lay out a step; the order of rows does not matter."""
    single = [row for row in rows if row.num_tokens == 1]
    long = [row for row in rows if row.num_tokens > 1]
    num_long = sum(-(-row.num_tokens // positions_per_tile) for row in long)
    tiles: list[int] = []
    blocks: list[int] = []
    first_block = TILE_INTS * (len(single) + num_long)
    for row in (*single, *long):
        for offset in range(0, row.num_tokens, positions_per_tile):
            count = min(positions_per_tile, row.num_tokens - offset)
            tiles += (row.start + offset, count, row.position + offset, first_block + len(blocks))
        num_blocks = -(-(row.position + row.num_tokens) // block_size)
        blocks += row.blocks[:num_blocks]
    return TileTable(tiles + blocks, len(single), num_long)
