"""Weight-only quantisation: int8 numbers and one float32 scale for each output.

Symmetric, to the nearest: W[n, k] ≈ numbers[n, k] · scales[n], scales[n] = max |W[n, :]| / 127.
Products are computed with the exact numbers in float, and scaled after the sum.
"""

import torch
from torch import Tensor
from torch.nn import functional

LARGEST = 127
ROWS_TOGETHER = 64
"""Converted at once: few, so that a head as wide as the vocabulary is never there in float32."""


def quantise(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return numbers [out, in] int8 and scales [out] float32 of a matrix [out, in]."""
    numbers = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scales = torch.empty(weight.shape[0], device=weight.device)
    pieces = (torch.split(each, ROWS_TOGETHER) for each in (weight, numbers, scales))
    for rows, their_numbers, their_scales in zip(*pieces, strict=True):
        exact = rows.to(torch.float32, copy=True)
        their_scales.copy_(exact.abs().amax(dim=1) / LARGEST)
        divisors = torch.where(their_scales > 0, their_scales, torch.ones_like(their_scales))
        their_numbers.copy_(exact.div_(divisors[:, None]).round_().clamp_(-LARGEST, LARGEST))
    return numbers, scales


def restore(numbers: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what numbers [out, in] and scales [out] stand for, rounded to a dtype."""
    weight = torch.empty(numbers.shape, dtype=dtype, device=numbers.device)
    pieces = (torch.split(each, ROWS_TOGETHER) for each in (weight, numbers, scales))
    for rows, their_numbers, their_scales in zip(*pieces, strict=True):
        rows.copy_(their_numbers.float() * their_scales[:, None])
    return weight


class Int8Weight:
    """W [out, in] in int8 on any device: half the bytes, and slower than an unquantised product.

    The native library's form of it is the fast one; this is its portable twin.
    """

    def __init__(self, weight: Tensor) -> None:
        self._numbers, self._scales = quantise(weight)
        self._dtype = weight.dtype

    @property
    def num_bytes(self) -> int:
        """Resident bytes of numbers and scales."""
        return self._numbers.nbytes + self._scales.nbytes

    def apply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Return x @ W.T + bias; x [tokens, in] -> [tokens, out]. In float32, rounded once."""
        y = functional.linear(x.float(), self._numbers.float()) * self._scales
        return (y if bias is None else y + bias.float()).to(x.dtype)

    def dense(self) -> Tensor:
        """Return what the numbers and scales stand for, rounded to the base's dtype."""
        return restore(self._numbers, self._scales, self._dtype)
