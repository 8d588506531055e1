"""Memory for KV that comes before it is needed: a little, behind what was used, and only there."""

import sys

import pytest
import torch
from quickchange_server.engine.attention import PIECE_BYTES, KvShape, KvStorage
from quickchange_server.engine.kv_cache import BlockManager

from tests.server.engine.scheduler_run import sequence_of

SHAPE = KvShape(num_heads=4, key_dim=64, value_dim=64)
BLOCK_BYTES = 16 * 4 * 64 * 2


def storage_of(num_blocks: int) -> KvStorage:
    return KvStorage([SHAPE, SHAPE], num_blocks, 16, torch.empty(0, dtype=torch.bfloat16))


def touch_all(storage: KvStorage, highest: int) -> int:
    count = 0
    while storage.touch_ahead(highest):
        count += 1
        assert count < 1000
    return count


@pytest.mark.skipif(sys.platform != "linux", reason="what is resident is known on Linux alone")
def test_a_piece_of_each_tensor_comes_ahead_and_no_more() -> None:
    storage = storage_of(16 * PIECE_BYTES // BLOCK_BYTES)
    assert storage.resident_bytes() == 0
    assert 4 <= touch_all(storage, highest=0) <= 8
    assert 4 * PIECE_BYTES // 2 <= storage.resident_bytes() <= 2 * 4 * PIECE_BYTES
    assert touch_all(storage, highest=0) == 0


def test_blocks_that_were_handed_out_stay_as_they_are() -> None:
    storage = storage_of(100)
    for tensor in (*storage.keys, *storage.values):
        tensor[:40] = 1.0
    touch_all(storage, highest=39)
    for tensor in (*storage.keys, *storage.values):
        assert (tensor[:40] == 1.0).all()
        assert not tensor[40:].any()


def test_it_ends_at_the_last_block() -> None:
    storage = storage_of(3)
    touch_all(storage, highest=0)
    assert touch_all(storage, highest=2) == 0


def test_the_highest_block_that_was_handed_out_is_known() -> None:
    blocks = BlockManager(8, 16, "base")
    assert blocks.highest_taken == 0
    first, second = sequence_of(40), sequence_of(1)
    assert blocks.grow(first, 33)
    assert blocks.highest_taken == max(first.blocks) == 3
    blocks.free(first)
    assert blocks.grow(second, 1)
    assert blocks.highest_taken == 4
