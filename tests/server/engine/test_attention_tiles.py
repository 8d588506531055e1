"""The tables that the attention kernels look up."""

import pytest
from quickchange_server.engine.attention_tiles import (
    MAX_PIECES,
    MIN_PIECE,
    Cut,
    KvRow,
    max_row_ints,
    piece_size,
    tile_table,
)


def test_tiles_come_first_and_tables_follow_the_work() -> None:
    chunk = KvRow(start=0, position=3, num_tokens=5, blocks=[9, 8, 7])
    decode = KvRow(start=5, position=4, num_tokens=1, blocks=[2, 3, 4])
    table = tile_table([chunk, decode], Cut(least_piece=8, tile_tokens=2, block_size=4))
    assert (table.num_pieces, table.num_joined, table.num_tiles) == (1, 0, 3)
    assert table.numbers[:4] == [1, 16, 0, 22]
    assert table.numbers[4:16] == [0, 2, 3, 24, 2, 2, 5, 24, 4, 1, 7, 24]
    assert table.numbers[16:22] == [5, 4, 0, 5, 22, -1]
    assert table.numbers[22:] == [2, 3, 9, 8]


def test_a_long_context_is_cut_into_pieces_by_its_own_length_alone() -> None:
    rows = [KvRow(0, 2, 1, [1]), KvRow(1, 20, 1, [2, 3, 4, 5, 6, 7])]
    cut = Cut(least_piece=8, tile_tokens=2, block_size=4)
    table = tile_table(rows, cut)
    assert (table.num_pieces, table.num_joined, table.num_partials) == (4, 1, 3)
    assert table.numbers[10:28] == [1, 20, 0, 8, 32, 0, 1, 20, 8, 16, 32, 1, 1, 20, 16, 21, 32, 2]
    assert table.numbers[28:31] == [1, 0, 3]
    alone = tile_table(rows[1:], cut)
    assert alone.numbers[6:8] == [0, 8]
    assert alone.num_partials == 3


def test_blocks_that_hold_no_position_yet_are_left_out() -> None:
    table = tile_table([KvRow(0, 7, 1, [1, 2, 3, 4])], Cut(16, 8, 4))
    assert table.numbers == [1, 4, 0, 10, 0, 7, 0, 8, 10, -1, 1, 2]


@pytest.mark.parametrize("length", [1, 128, 129, 4096, 4097, 131072])
def test_no_row_takes_more_than_was_kept_for_it(length: int) -> None:
    blocks = list(range(-(-length // 16)))
    row = KvRow(0, length - 1, 1, blocks)
    table = tile_table([row], Cut(MIN_PIECE, 16, 16))
    assert table.num_pieces == -(-length // piece_size(row))
    assert table.num_pieces <= MAX_PIECES
    assert len(table.numbers) <= 4 + max_row_ints(len(blocks))


@pytest.mark.parametrize(("length", "size"), [(1, 128), (4096, 128), (4097, 256), (131072, 4096)])
def test_pieces_are_as_small_as_their_number_allows(length: int, size: int) -> None:
    assert piece_size(KvRow(0, length - 1, 1, [])) == size
