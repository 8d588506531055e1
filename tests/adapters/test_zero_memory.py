"""Zeros that take memory when they are written, and give it back."""

import ctypes
import os

import psutil
import pytest
import torch
from quickchange_adapters.zero_memory import lazy_zeros

CPU = torch.device("cpu")
MIB = 1 << 20


@pytest.mark.parametrize("shape", [(3, 5), (0, 4), (1000, 1000)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_they_are_zeros_to_write_to(shape: tuple[int, int], dtype: torch.dtype) -> None:
    zeros = lazy_zeros(shape, dtype, CPU)
    assert zeros.shape == shape
    assert zeros.dtype == dtype
    assert not zeros.any()
    zeros[1:, 2] = 7
    assert zeros.sum() == 7 * max(shape[0] - 1, 0)
    assert not lazy_zeros(shape, dtype, CPU).any()


def test_memory_comes_with_the_first_write_and_goes_with_the_tensor() -> None:
    process = psutil.Process()
    before = process.memory_info().rss
    zeros = lazy_zeros((512, MIB), torch.bfloat16, CPU)
    assert process.memory_info().rss - before < 100 * MIB
    zeros[:200] = 1
    assert process.memory_info().rss - before > 300 * MIB
    del zeros
    assert process.memory_info().rss - before < 100 * MIB


def test_a_forked_process_writes_to_its_own() -> None:
    zeros = lazy_zeros((4, MIB), torch.bfloat16, CPU)
    address = zeros.data_ptr()
    child = os.fork()
    if child == 0:
        ctypes.memset(address, 255, 64)
        os._exit(0)
    os.waitpid(child, 0)
    assert not zeros.any()
