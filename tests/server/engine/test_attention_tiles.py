"""The tables that the attention kernel looks up."""

from quickchange_server.engine.attention_tiles import KvRow, tile_table


def test_single_tokens_come_first_and_tables_follow_the_tiles() -> None:
    chunk = KvRow(start=0, position=3, num_tokens=5, blocks=[9, 8, 7])
    decode = KvRow(start=5, position=4, num_tokens=1, blocks=[2, 3, 4])
    table = tile_table([chunk, decode], block_size=4, positions_per_tile=2)
    assert (table.num_single, table.num_long) == (1, 3)
    single, *long = [table.numbers[i : i + 4] for i in range(0, 16, 4)]
    assert single == [5, 1, 4, 16]
    assert long == [[0, 2, 3, 18], [2, 2, 5, 18], [4, 1, 7, 18]]
    assert table.numbers[16:] == [2, 3, 9, 8]


def test_blocks_that_hold_no_position_yet_are_left_out() -> None:
    table = tile_table([KvRow(0, 7, 1, [1, 2, 3, 4])], block_size=4, positions_per_tile=8)
    assert table.numbers == [0, 1, 7, 4, 1, 2]
