"""The check of values against torch's own, at every place where one may hide."""

import math

import pytest
import torch
from quickchange_adapters.finite import all_finite

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_one_bad_value_is_found_wherever_it_is(dtype: torch.dtype, bad: float) -> None:
    for size in (1, 7, 33, 1000):
        for place in {0, 1 % size, size // 2, size - 1}:
            values = torch.linspace(-5, 5, size).to(dtype)
            assert all_finite(values)
            values[place] = bad
            assert not all_finite(values), (size, place)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_largest_numbers_are_numbers(dtype: torch.dtype) -> None:
    bounds = torch.finfo(dtype)
    assert all_finite(torch.tensor([[bounds.max, bounds.min], [bounds.tiny, 0]], dtype=dtype))


def test_parts_of_a_tensor_and_nothing_at_all() -> None:
    values = torch.zeros(8, 8)
    values[3, 5] = math.nan
    assert not all_finite(values.t()[5])
    assert all_finite(values[:, ::2])
    assert all_finite(torch.zeros(0, 4))
