"""Tensors read in blocks give what they give when read whole."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from quickchange_adapters.header import TensorEntry, read_header
from quickchange_adapters.tensor_values import (
    BLOCK_VALUES,
    FactorSummary,
    flat_blocks,
    largest_magnitude,
    summarize_factor,
    values_sha256,
)

from tests.adapters.adapter_files import Array, weights_bytes

WIDE = BLOCK_VALUES // 3 + 7


def written(folder: Path, array: Array) -> tuple[Path, TensorEntry]:
    path = folder / "weights"
    path.write_bytes(weights_bytes({"a": np.ones(3, np.float32), "t": array}))
    return path, read_header(path, 1 << 20).tensors["t"]


def summary(folder: Path, array: Array, rank_axis: int) -> FactorSummary:
    path, entry = written(folder, array)
    with path.open("rb") as file:
        return summarize_factor(file, entry, rank_axis)


@pytest.mark.parametrize("shape", [(4, 64), (5, WIDE), (1, 1), (1, BLOCK_VALUES + 1)])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_a_factor_in_blocks_is_the_factor(
    tmp_path: Path, shape: tuple[int, int], dtype: Any
) -> None:
    a = np.random.default_rng(1).standard_normal(shape).astype(dtype)
    exact = a.astype(np.float64)
    found = summary(tmp_path, a, 0)
    assert found.largest == np.abs(a).max()
    np.testing.assert_allclose(found.gram, exact @ exact.T, rtol=1e-9, atol=1e-6)
    np.testing.assert_array_equal(summary(tmp_path, a.T.copy(), 1).gram.shape, found.gram.shape)
    np.testing.assert_allclose(summary(tmp_path, a.T.copy(), 1).gram, found.gram, atol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, -1])
@pytest.mark.parametrize("rank_axis", [0, 1])
def test_a_bad_value_in_any_block_is_found(
    tmp_path: Path, bad: float, place: int, rank_axis: int
) -> None:
    array = np.ones((4, WIDE) if rank_axis == 0 else (WIDE, 4), np.float32)
    array.reshape(-1)[place] = bad
    assert summary(tmp_path, array, rank_axis).largest == np.inf
    path, entry = written(tmp_path, array)
    with path.open("rb") as file:
        assert largest_magnitude(file, entry) == np.inf


def test_blocks_are_small_and_in_order_and_the_digest_is_of_the_whole(tmp_path: Path) -> None:
    array = np.arange(2 * BLOCK_VALUES + 5, dtype=np.float32)
    path, entry = written(tmp_path, array)
    with path.open("rb") as file:
        blocks = [block.copy() for block in flat_blocks(file, entry)]
        assert [block.size for block in blocks] == [BLOCK_VALUES, BLOCK_VALUES, 5]
        assert np.array_equal(np.concatenate(blocks), array)
        assert values_sha256(file, entry) == hashlib.sha256(array.tobytes()).hexdigest()


def test_tensors_without_values_are_zero(tmp_path: Path) -> None:
    found = summary(tmp_path, np.ones((4, 0), np.float32), 0)
    assert (found.largest, found.gram.shape) == (0.0, (4, 4))
