"""A step's rows as work and block tables that an attention kernel can look up. Knows no kernel.

A row of one token is cut into pieces of so many positions of its context, by its own length alone:
its bits do not depend on its neighbours, and a long context keeps more than one program busy. A
longer row is cut into tiles of up to `positions_per_tile` consecutive tokens. Layout of the
integers, behind a header that says how many there are of pieces and joined rows, and where:

| part | integers | content |
|---|---|---|
| header | 4 | number of pieces, their start, number of joined rows, their start |
| tile | 4 | first packed row, tokens, position of the first, its block table's start |
| piece | 6 | packed row, its position, first position, end, its block table's start, partial |
| joined row | 3 | packed row, first partial, how many: a row of several pieces |
| block table, per row | as many as it has blocks | block numbers in the order of positions |

`partial`: where a piece's sums go, -1 for a row of one piece, which needs no joining.
"""

from collections.abc import Sequence
from dataclasses import dataclass

HEADER_INTS, PIECE_INTS, JOINED_INTS, TILE_INTS = 4, 6, 3, 4
MIN_PIECE = 128
MAX_PIECES = 32


@dataclass(frozen=True, slots=True)
class KvRow:
    """Packed rows [start, start + num_tokens) of one request, from `position` on."""

    start: int
    position: int
    num_tokens: int
    blocks: Sequence[int]


@dataclass(frozen=True, slots=True)
class Cut:
    """How rows are cut: least positions of a piece, tokens of a tile, tokens of a KV block."""

    least_piece: int
    tile_tokens: int
    block_size: int


@dataclass(frozen=True, slots=True)
class TileTable:
    """The integers of one step, and how many of each part there are."""

    numbers: list[int]
    num_pieces: int
    num_joined: int
    num_partials: int
    num_tiles: int


def piece_size(row: KvRow, least: int = MIN_PIECE) -> int:
    """Return how many positions a row's pieces have: it has no more than `MAX_PIECES`."""
    needed = -(-(row.position + 1) // MAX_PIECES)
    return max(least, 1 << (needed - 1).bit_length())


def max_row_ints(max_blocks: int) -> int:
    """Return the most integers that a row of one token, with so many blocks, can take."""
    return MAX_PIECES * PIECE_INTS + JOINED_INTS + max_blocks


def tile_table(rows: Sequence[KvRow], cut: Cut) -> TileTable:
    """Lay out a step; the order of rows does not matter."""
    single = [row for row in rows if row.num_tokens == 1]
    long = [row for row in rows if row.num_tokens > 1]
    sizes = [piece_size(row, cut.least_piece) for row in single]
    counts = [row.position // size + 1 for row, size in zip(single, sizes, strict=True)]
    num_pieces, num_joined = sum(counts), sum(count > 1 for count in counts)
    num_tiles = sum(-(-row.num_tokens // cut.tile_tokens) for row in long)
    first_piece = HEADER_INTS + TILE_INTS * num_tiles
    first_joined = first_piece + PIECE_INTS * num_pieces
    first_block = first_joined + JOINED_INTS * num_joined
    pieces: list[int] = []
    joined: list[int] = []
    tiles: list[int] = []
    blocks: list[int] = []
    num_partials = 0
    for row, size, count in zip(single, sizes, counts, strict=True):
        partial = num_partials if count > 1 else -1
        pieces += _pieces(row, partial, first_block + len(blocks), size)
        if count > 1:
            joined += (row.start, partial, count)
            num_partials += count
        blocks += _table(row, cut.block_size)
    for row in long:
        tiles += _tiles(row, first_block + len(blocks), cut.tile_tokens)
        blocks += _table(row, cut.block_size)
    header = [num_pieces, first_piece, num_joined, first_joined]
    numbers = [*header, *tiles, *pieces, *joined, *blocks]
    return TileTable(numbers, num_pieces, num_joined, num_partials, num_tiles)


def _pieces(row: KvRow, partial: int, table: int, size: int) -> list[int]:
    numbers: list[int] = []
    end = row.position + 1
    for index, first in enumerate(range(0, end, size)):
        own = partial + index if partial >= 0 else -1
        numbers += (row.start, row.position, first, min(first + size, end), table, own)
    return numbers


def _tiles(row: KvRow, table: int, size: int) -> list[int]:
    numbers: list[int] = []
    for offset in range(0, row.num_tokens, size):
        count = min(size, row.num_tokens - offset)
        numbers += (row.start + offset, count, row.position + offset, table)
    return numbers


def _table(row: KvRow, block_size: int) -> Sequence[int]:
    return row.blocks[: -(-(row.position + row.num_tokens) // block_size)]
