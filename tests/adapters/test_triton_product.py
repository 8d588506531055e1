"""The GPU's product for few rows against PyTorch's, in Triton's interpreter."""

import os

os.environ["TRITON_INTERPRET"] = "1"

import pytest
import torch
from torch.nn import functional

pytest.importorskip("triton", reason="the kernel needs Triton, which is made for Linux only")

from quickchange_adapters.ops import triton_product
from quickchange_adapters.ops.triton_product import MAX_ROWS, TILING, SkinnyWeight


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("num_rows", [1, 2, 7, MAX_ROWS, MAX_ROWS + 1])
@pytest.mark.parametrize(("width", "num_columns"), [(40, 50), (600, 33)])
def test_it_agrees_with_a_plain_product(
    num_rows: int, width: int, num_columns: int, *, has_bias: bool
) -> None:
    """Also where neither width is a multiple of a block's, and x is part of something wider."""
    weight = torch.randn(num_columns, width)
    bias = torch.randn(num_columns) if has_bias else None
    x = torch.randn(num_rows, 2 * width)[:, width:]
    skinny = SkinnyWeight(weight)
    expected = functional.linear(x, weight, bias)
    torch.testing.assert_close(skinny.apply(x, bias), expected, atol=1e-4, rtol=1e-4)
    assert skinny.dense() is weight
    assert skinny.num_bytes == weight.nbytes


def test_a_row_has_the_same_bits_whatever_rows_share_the_product() -> None:
    skinny = SkinnyWeight(torch.randn(64, 300))
    x = torch.randn(5, 300)
    together = skinny.apply(x, None)
    for row in range(5):
        assert torch.equal(skinny.apply(x[row : row + 1], None)[0], together[row])


def test_infinities_of_a_row_stay_in_it() -> None:
    skinny = SkinnyWeight(torch.randn(20, 32))
    x = torch.randn(3, 32)
    x[1] = float("inf")
    out = skinny.apply(x, None)
    assert not torch.isfinite(out[1]).any()
    assert torch.isfinite(out[[0, 2]]).all()


@pytest.mark.parametrize(
    ("kilobytes", "dtype", "num_columns", "is_alone", "expected"),
    [
        (227, torch.bfloat16, 4096, True, 6),
        (227, torch.bfloat16, 4096, False, 5),
        (227, torch.bfloat16, 6144, True, 5),  # a second round would be half empty
        (227, torch.bfloat16, 28672, True, 6),
        (227, torch.float32, 4096, True, 6),
        (99, torch.bfloat16, 4096, True, 5),
        (64, torch.bfloat16, 4096, True, 3),
    ],
)
def test_no_more_stages_are_taken_than_shared_memory_has_room_for(
    monkeypatch: pytest.MonkeyPatch,
    kilobytes: int,
    dtype: torch.dtype,
    num_columns: int,
    expected: int,
    *,
    is_alone: bool,
) -> None:
    monkeypatch.setattr(triton_product, "_sizes", lambda device: (132, kilobytes << 10))
    like = torch.empty(0, dtype=dtype)
    found = TILING.constants(num_columns, like, is_alone=is_alone)
    assert found["num_stages"] == expected
    rows = found["BLOCK_COLUMNS"] + found["ROW_TILE"]
    stage_bytes = rows * found["BLOCK_INNER"] * dtype.itemsize
    assert (expected - 1) * stage_bytes <= kilobytes << 10
