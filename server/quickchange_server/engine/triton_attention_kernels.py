"""The kernels of `triton_attention`. Tables are laid out as `attention_tiles` says."""

import triton
import triton.language as tl
from quickchange_adapters.ops.triton_chain import let_next_start, wait_for_inputs

from quickchange_server.engine.attention_tiles import (
    HEADER_INTS,
    JOINED_INTS,
    PIECE_INTS,
    TILE_INTS,
)

_HEADER = tl.constexpr(HEADER_INTS)
_PIECE = tl.constexpr(PIECE_INTS)
_JOINED = tl.constexpr(JOINED_INTS)
_TILE = tl.constexpr(TILE_INTS)


@triton.jit  # type: ignore[untyped-decorator]
def attend_pieces(
    table: tl.tensor,  # all integers of the step
    query: tl.tensor,  # [heads, tokens, KEY_DIM]
    keys: tl.tensor,  # [blocks, BLOCK_SIZE, NUM_KV, KEY_DIM]
    values: tl.tensor,  # [blocks, BLOCK_SIZE, NUM_KV, VALUE_DIM]
    out: tl.tensor,  # [tokens, heads, VALUE_DIM]
    partial_mixed: tl.tensor,  # [partials, heads, VALUE_DIM] float32
    partial_stats: tl.tensor,  # [partials, heads, 2] float32: highest score, sum of weights
    scaling: tl.tensor,
    softcap: tl.tensor,
    window: tl.tensor,
    head_stride: tl.tensor,
    token_stride: tl.tensor,
    BLOCK_SIZE: tl.constexpr,
    NUM_KV: tl.constexpr,
    GROUPS: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    KEY_TILE: tl.constexpr,
    VALUE_TILE: tl.constexpr,
    ROW_TILE: tl.constexpr,
    POSITION_TILE: tl.constexpr,
    HAS_CAP: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    IS_CHAINED: tl.constexpr,
) -> None:
    """Grid (any number, NUM_KV): each program takes every so manieth piece."""
    let_next_start(IS_CHAINED)
    kv_head = tl.program_id(1)
    num_pieces = tl.load(table)
    rows = tl.arange(0, ROW_TILE)
    is_row = rows < GROUPS
    heads = kv_head * GROUPS + rows
    key_columns = tl.arange(0, KEY_TILE)
    value_columns = tl.arange(0, VALUE_TILE)
    is_value = is_row[:, None] & (value_columns < VALUE_DIM)[None, :]
    piece = tl.program_id(0)
    # the next piece's numbers are there before the last one's sums are
    token, position, start, end, blocks, partial = _piece(table, piece, num_pieces)
    wait_for_inputs(IS_CHAINED)
    while piece < num_pieces:
        q = tl.load(
            query + (heads * head_stride + token * token_stride)[:, None] + key_columns[None, :],
            mask=is_row[:, None] & (key_columns < KEY_DIM)[None, :],
            other=0.0,
        )
        if HAS_WINDOW:
            start = tl.maximum(start, position - window + 1)
        own = position + tl.zeros([ROW_TILE], dtype=tl.int32)
        highest, total, mixed = _walk(
            q, own, start, end, table + blocks, keys, values, kv_head, scaling, softcap, window,
            BLOCK_SIZE, NUM_KV, KEY_DIM, VALUE_DIM, KEY_TILE, VALUE_TILE, ROW_TILE,
            POSITION_TILE, HAS_CAP, HAS_WINDOW,
        )  # fmt: skip
        if partial < 0:
            target = out + ((token * NUM_KV * GROUPS + heads) * VALUE_DIM)[:, None]
            result = (mixed / total[:, None]).to(out.dtype.element_ty)
            tl.store(target + value_columns[None, :], result, mask=is_value)
        else:
            place = partial * NUM_KV * GROUPS + heads
            sums = partial_mixed + (place * VALUE_DIM)[:, None] + value_columns[None, :]
            tl.store(sums, mixed, mask=is_value)
            tl.store(partial_stats + place * 2, highest, mask=is_row)
            tl.store(partial_stats + place * 2 + 1, total, mask=is_row)
        piece += tl.num_programs(0)
        token, position, start, end, blocks, partial = _piece(table, piece, num_pieces)


@triton.jit  # type: ignore[untyped-decorator]
def _piece(
    table: tl.tensor, piece: tl.tensor, num_pieces: tl.tensor
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Return a piece's token, position, start, end, block table and partial; zeros behind all."""
    is_there = piece < num_pieces
    entry = table + tl.load(table + 1) + piece * _PIECE
    return (
        tl.load(entry, mask=is_there, other=0).to(tl.int64),
        tl.load(entry + 1, mask=is_there, other=0),
        tl.load(entry + 2, mask=is_there, other=0),
        tl.load(entry + 3, mask=is_there, other=0),
        tl.load(entry + 4, mask=is_there, other=0),
        tl.load(entry + 5, mask=is_there, other=0).to(tl.int64),
    )


@triton.jit  # type: ignore[untyped-decorator]
def join_pieces(
    table: tl.tensor,
    out: tl.tensor,  # [tokens, heads, VALUE_DIM]
    partial_mixed: tl.tensor,
    partial_stats: tl.tensor,
    NUM_KV: tl.constexpr,
    GROUPS: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_TILE: tl.constexpr,
    ROW_TILE: tl.constexpr,
    PIECE_TILE: tl.constexpr,
    IS_CHAINED: tl.constexpr,
) -> None:
    """Grid (joined rows or more, NUM_KV): some of a row's pieces at a time, in their order."""
    let_next_start(IS_CHAINED)
    wait_for_inputs(IS_CHAINED)
    if tl.program_id(0) < tl.load(table + 2):
        entry = table + tl.load(table + 3) + tl.program_id(0) * _JOINED
        token = tl.load(entry).to(tl.int64)
        first = tl.load(entry + 1).to(tl.int64)
        count = tl.load(entry + 2)
        rows = tl.arange(0, ROW_TILE)
        columns = tl.arange(0, VALUE_TILE)
        is_row = rows < GROUPS
        mask = is_row[:, None] & (columns < VALUE_DIM)[None, :]
        heads = tl.program_id(1) * GROUPS + rows
        highest = tl.full([ROW_TILE], float("-inf"), dtype=tl.float32)
        total = tl.zeros([ROW_TILE], dtype=tl.float32)
        mixed = tl.zeros([ROW_TILE, VALUE_TILE], dtype=tl.float32)
        for index in range(0, count, PIECE_TILE):
            pieces = index + tl.arange(0, PIECE_TILE)
            is_piece = pieces < count
            place = (first + pieces)[:, None] * NUM_KV * GROUPS + heads[None, :]
            is_own = is_piece[:, None] & is_row[None, :]
            own_highest = tl.load(partial_stats + place * 2, mask=is_own, other=float("-inf"))
            own_total = tl.load(partial_stats + place * 2 + 1, mask=is_own, other=0.0)
            sums = partial_mixed + (place * VALUE_DIM)[:, :, None] + columns[None, None, :]
            own_mixed = tl.load(sums, mask=is_piece[:, None, None] & mask[None, :, :], other=0.0)
            new_highest = tl.maximum(highest, tl.max(own_highest, 0))
            base = tl.where(new_highest == float("-inf"), 0.0, new_highest)
            keep = tl.exp(highest - base)
            take = tl.exp(own_highest - base[None, :])
            mixed = mixed * keep[:, None] + tl.sum(own_mixed * take[:, :, None], 0)
            total = total * keep + tl.sum(own_total * take, 0)
            highest = new_highest
        target = out + ((token * NUM_KV * GROUPS + heads) * VALUE_DIM)[:, None]
        result = (mixed / total[:, None]).to(out.dtype.element_ty)
        tl.store(target + columns[None, :], result, mask=mask)


@triton.jit  # type: ignore[untyped-decorator]
def attend_tiles(
    table: tl.tensor,  # all integers of the step
    query: tl.tensor,  # [heads, tokens, KEY_DIM]
    keys: tl.tensor,  # [blocks, BLOCK_SIZE, NUM_KV, KEY_DIM]
    values: tl.tensor,  # [blocks, BLOCK_SIZE, NUM_KV, VALUE_DIM]
    out: tl.tensor,  # [tokens, heads, VALUE_DIM]
    scaling: tl.tensor,
    softcap: tl.tensor,
    window: tl.tensor,
    head_stride: tl.tensor,
    token_stride: tl.tensor,
    BLOCK_SIZE: tl.constexpr,
    NUM_KV: tl.constexpr,
    GROUPS: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    KEY_TILE: tl.constexpr,
    VALUE_TILE: tl.constexpr,
    ROW_TILE: tl.constexpr,
    POSITION_TILE: tl.constexpr,
    HAS_CAP: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    IS_CHAINED: tl.constexpr,
) -> None:
    """Grid (tiles, NUM_KV). A tile's row r is token r // GROUPS, query head r % GROUPS."""
    let_next_start(IS_CHAINED)
    wait_for_inputs(IS_CHAINED)
    tile = table + _HEADER + tl.program_id(0) * _TILE
    kv_head = tl.program_id(1)
    num_tokens = tl.load(tile + 1)
    first_position = tl.load(tile + 2)
    rows = tl.arange(0, ROW_TILE)
    is_row = rows < num_tokens * GROUPS
    tokens = (tl.load(tile) + rows // GROUPS).to(tl.int64)
    heads = kv_head * GROUPS + rows % GROUPS
    own = tl.where(is_row, first_position + rows // GROUPS, first_position)
    key_columns = tl.arange(0, KEY_TILE)
    value_columns = tl.arange(0, VALUE_TILE)
    q = tl.load(
        query + (heads * head_stride + tokens * token_stride)[:, None] + key_columns[None, :],
        mask=is_row[:, None] & (key_columns < KEY_DIM)[None, :],
        other=0.0,
    )
    start = first_position * 0
    if HAS_WINDOW:
        start = tl.maximum(first_position - window + 1, 0)
    highest, total, mixed = _walk(
        q, own, start, first_position + num_tokens, table + tl.load(tile + 3), keys, values,
        kv_head, scaling, softcap, window,
        BLOCK_SIZE, NUM_KV, KEY_DIM, VALUE_DIM, KEY_TILE, VALUE_TILE, ROW_TILE,
        POSITION_TILE, HAS_CAP, HAS_WINDOW,
    )  # fmt: skip
    target = out + ((tokens * NUM_KV * GROUPS + heads) * VALUE_DIM)[:, None]
    tl.store(
        target + value_columns[None, :],
        (mixed / total[:, None]).to(out.dtype.element_ty),
        mask=is_row[:, None] & (value_columns < VALUE_DIM)[None, :],
    )


@triton.jit  # type: ignore[untyped-decorator]
def _walk(
    q: tl.tensor,  # [ROW_TILE, KEY_TILE]
    own: tl.tensor,  # [ROW_TILE]: each row's position
    start: tl.tensor,
    end: tl.tensor,
    block_table: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    kv_head: tl.tensor,
    scaling: tl.tensor,
    softcap: tl.tensor,
    window: tl.tensor,
    BLOCK_SIZE: tl.constexpr,
    NUM_KV: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    KEY_TILE: tl.constexpr,
    VALUE_TILE: tl.constexpr,
    ROW_TILE: tl.constexpr,
    POSITION_TILE: tl.constexpr,
    HAS_CAP: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Mix the values of positions [start, end): (highest score, sum of weights, mixed)."""
    highest = tl.full([ROW_TILE], float("-inf"), dtype=tl.float32)
    total = tl.zeros([ROW_TILE], dtype=tl.float32)
    mixed = tl.zeros([ROW_TILE, VALUE_TILE], dtype=tl.float32)
    key_columns = tl.arange(0, KEY_TILE)
    value_columns = tl.arange(0, VALUE_TILE)
    for first in range(start, end, POSITION_TILE):
        positions = first + tl.arange(0, POSITION_TILE)
        is_there = positions < end
        block = tl.load(block_table + positions // BLOCK_SIZE, mask=is_there, other=0)
        slot = block.to(tl.int64) * BLOCK_SIZE + positions % BLOCK_SIZE
        k = tl.load(
            keys + ((slot * NUM_KV + kv_head) * KEY_DIM)[None, :] + key_columns[:, None],
            mask=is_there[None, :] & (key_columns < KEY_DIM)[:, None],
            other=0.0,
        )
        scores = tl.dot(q, k, input_precision="ieee") * scaling
        if HAS_CAP:
            scores = softcap * (2 * tl.sigmoid(2 * scores / softcap) - 1)
        is_seen = (positions[None, :] <= own[:, None]) & is_there[None, :]
        if HAS_WINDOW:
            is_seen = is_seen & (positions[None, :] > own[:, None] - window)
        scores = tl.where(is_seen, scores, float("-inf"))
        new_highest = tl.maximum(highest, tl.max(scores, 1))
        base = tl.where(new_highest == float("-inf"), 0.0, new_highest)
        weights = tl.exp(scores - base[:, None])
        keep = tl.exp(highest - base)
        v = tl.load(
            values + ((slot * NUM_KV + kv_head) * VALUE_DIM)[:, None] + value_columns[None, :],
            mask=is_there[:, None] & (value_columns < VALUE_DIM)[None, :],
            other=0.0,
        )
        mixed = tl.dot(weights.to(v.dtype), v, mixed * keep[:, None], input_precision="ieee")
        total = total * keep + tl.sum(weights, 1)
        highest = new_highest
    return highest, total, mixed
