"""The tables of short row blocks: what a kernel would find at which address."""

import struct

import torch
from quickchange_adapters.arena import RowRange
from quickchange_adapters.ops.delta_tables import (
    BLOCK_INTS,
    HEADER_INTS,
    ITEM_INTS,
    MAX_BLOCK_ROWS,
    RANK_TILE,
    DeltaTables,
    output_tiles,
)
from quickchange_adapters.plan import RowBlock, Term
from quickchange_adapters.pool import Slot

CPU = torch.device("cpu")


def slot_of(name: str, start: int, num_rows: int, *, kind: str = "qkv", bias: bool = False) -> Slot:
    return Slot(name, {kind: RowRange(start, start + num_rows, bias)}, 0)


def tables_of(max_blocks: int = 8, max_items: int = 16) -> DeltaTables:
    return DeltaTables(["qkv", "o"], max_blocks, max_items, CPU)


def entries(tables: DeltaTables, kind: str) -> tuple[list[list[int]], list[list[int]]]:
    """Read (items, blocks) of a kind the way a kernel does."""
    at = tables.kinds.index(kind) * HEADER_INTS
    values: list[int] = tables.values.tolist()
    num_items, first_item, num_blocks, first_block = values[at : at + HEADER_INTS]
    items = [values[first_item + i * ITEM_INTS :][:ITEM_INTS] for i in range(num_items)]
    blocks = [values[first_block + i * BLOCK_INTS :][:BLOCK_INTS] for i in range(num_blocks)]
    return items, blocks


def bits(weight: float) -> int:
    return int(struct.unpack("<i", struct.pack("<f", weight))[0])


def test_every_tile_of_rank_rows_of_every_term_is_an_item() -> None:
    large, small = slot_of("large", 8, 40), slot_of("small", 48, 8, bias=True)
    only_o = slot_of("only-o", 0, 8, kind="o")
    tables = tables_of()
    blocks = [
        RowBlock(0, 1, (Term(large), Term(small, -0.5))),
        RowBlock(2, 3, (Term(only_o, 2.0),)),
    ]
    assert tables.fill(blocks) == 2
    items, rows = entries(tables, "qkv")
    one = bits(1.0)
    assert items == [
        [0, 1, 8, 16, -1, one],
        [0, 1, 24, 16, -1, one],
        [0, 1, 40, 8, -1, one],
        [0, 1, 48, 8, 7, bits(-0.5)],
    ]
    assert rows == [[0, 1, 0, 4], [2, 1, 4, 4]]
    items, rows = entries(tables, "o")
    assert items == [[2, 1, 0, 8, -1, bits(2.0)]]
    assert rows == [[0, 1, 0, 0], [2, 1, 0, 1]]
    assert (tables.num_items, tables.num_blocks) == (4, 2)


def test_a_bias_is_in_the_last_tile_only() -> None:
    tables = tables_of()
    tables.fill([RowBlock(0, 1, (Term(slot_of("a", 0, 24, bias=True)),))])
    items, _ = entries(tables, "qkv")
    assert [item[4] for item in items] == [-1, 7]


def test_neighbours_with_the_same_adapters_and_weights_become_one_block() -> None:
    a, b = slot_of("a", 0, 8), slot_of("b", 8, 8)
    rows = [Term(a), Term(a), Term(b), Term(b, 0.5), Term(b, 0.5)]
    blocks = [RowBlock(i, i + 1, (term,)) for i, term in enumerate(rows)]
    blocks.append(RowBlock(6, 7, (Term(b, 0.5),)))  # a row of the base lies between
    tables = tables_of()
    assert tables.fill(blocks) == 6
    _, found = entries(tables, "qkv")
    assert [block[:2] for block in found] == [[0, 2], [2, 1], [3, 2], [6, 1]]


def test_joining_stops_at_the_height_of_a_tile() -> None:
    a = slot_of("a", 0, 8)
    tables = tables_of(max_blocks=64, max_items=64)
    blocks = [RowBlock(i, i + 1, (Term(a),)) for i in range(MAX_BLOCK_ROWS + 3)]
    assert tables.fill(blocks) == len(blocks)
    _, found = entries(tables, "qkv")
    assert [block[:2] for block in found] == [[0, MAX_BLOCK_ROWS], [MAX_BLOCK_ROWS, 3]]


def test_a_long_block_is_cut_and_taken_whole_or_not_at_all() -> None:
    a = slot_of("a", 0, 8)
    lengths = [1, 2 * MAX_BLOCK_ROWS + 1, 1]
    starts = [0, 2, 40]
    blocks = [RowBlock(s, s + n, (Term(a),)) for s, n in zip(starts, lengths, strict=True)]
    tables = tables_of(max_blocks=5)
    assert tables.fill(blocks) == 3
    items, found = entries(tables, "qkv")
    assert [block[:2] for block in found] == [
        [0, 1],
        [2, MAX_BLOCK_ROWS],
        [2 + MAX_BLOCK_ROWS, MAX_BLOCK_ROWS],
        [2 + 2 * MAX_BLOCK_ROWS, 1],
        [40, 1],
    ]
    assert [item[:4] for item in items] == [[*block[:2], 0, 8] for block in found]
    assert tables_of(max_blocks=3).fill(blocks) == 1
    assert tables_of(max_items=3).fill(blocks) == 1


def test_only_what_fits_is_taken() -> None:
    blocks = [RowBlock(2 * i, 2 * i + 1, (Term(slot_of(str(i), 0, 24)),)) for i in range(6)]
    assert tables_of(max_blocks=4, max_items=99).fill(blocks) == 4
    assert tables_of(max_blocks=9, max_items=5).fill(blocks) == 2
    assert tables_of().fill([]) == 0


def test_the_address_stays_and_nothing_of_the_last_step_is_left() -> None:
    a = slot_of("a", 0, 3 * RANK_TILE)
    tables = tables_of()
    address = tables.values.data_ptr()
    tables.fill([RowBlock(i, i + 1, (Term(a, i + 1.0),)) for i in range(5)])
    tables.fill([RowBlock(7, 8, (Term(a),))])
    assert tables.values.data_ptr() == address
    items, blocks = entries(tables, "qkv")
    assert [item[0] for item in items] == [7, 7, 7]
    assert blocks == [[7, 1, 0, 3]]
    assert entries(tables, "o") == ([], [[7, 1, 0, 0]])


def test_output_tiles_do_not_cross_parts() -> None:
    tiles = output_tiles((130, 16, 64), 64).tolist()
    assert tiles == [[0, 0, 64], [0, 64, 64], [0, 128, 2], [1, 130, 16], [2, 146, 64]]
