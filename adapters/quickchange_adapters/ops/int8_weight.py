"""Weight-only quantisation: int8 numbers and one float32 scale for each output.

Symmetric, to the nearest: W[n, k] ≈ numbers[n, k] · scales[n], scales[n] = max |W[n, :]| / 127.
Products are computed with the exact numbers in float, and scaled after the sum.
"""

import torch
from torch import Tensor
from torch.nn import functional

LARGEST = 127


def quantise(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return numbers [out, in] int8 and scales [out] float32 of a matrix [out, in]."""
    scales = weight.float().abs().amax(dim=1) / LARGEST
    divisors = torch.where(scales > 0, scales, torch.ones_like(scales))
    numbers = (weight.float() / divisors[:, None]).round().clamp(-LARGEST, LARGEST)
    return numbers.to(torch.int8), scales


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
        return (self._numbers.float() * self._scales[:, None]).to(self._dtype)
