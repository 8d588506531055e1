"""A frozen weight matrix as it is resident: plain, or packed by oneDNN. Only one copy exists."""

from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional


class LinearWeight(Protocol):
    """One resident matrix W [out, in]."""

    @property
    def num_bytes(self) -> int:
        """Resident bytes."""

    def apply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Return x @ W.T + bias; x [tokens, in] -> [tokens, out]."""

    def dense(self) -> Tensor:
        """Return W exactly, as a plain tensor [out, in]."""


class PlainWeight:
    """W as an ordinary tensor; used where no packing exists (CUDA, odd dtypes)."""

    def __init__(self, weight: Tensor) -> None:
        self._weight = weight

    @property
    def num_bytes(self) -> int:
        """Resident bytes."""
        return self._weight.nbytes

    def apply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Return x @ W.T + bias."""
        return functional.linear(x, self._weight, bias)

    def dense(self) -> Tensor:
        """Return W itself."""
        return self._weight


class PackedWeight:
    """W in oneDNN's blocked layout: same bytes, faster products.

    In float32 a row's bits are the same whatever other rows (M >= 2) are computed with it.
    Source: torch.ops.mkldnn, private but used by Inductor since torch 2.0.
    """

    def __init__(self, weight: Tensor) -> None:
        self._shape = weight.shape
        self._bytes = weight.nbytes
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())

    @property
    def num_bytes(self) -> int:
        """Resident bytes: oneDNN's blocks pad nothing at these widths."""
        return self._bytes

    def apply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Return x @ W.T + bias. In float32 a single row is computed beside a copy of itself."""
        if x.shape[0] == 1 and x.dtype == torch.float32:
            return self._product(x.expand(2, -1).contiguous(), bias)[:1]
        return self._product(x, bias)

    def dense(self) -> Tensor:
        """Unpack W exactly; a new tensor."""
        dense: Tensor = self._packed.to_dense()
        return dense.view(self._shape)

    def _product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        result: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._packed, bias, "none", [], "")
        return result


def can_pack(weight: Tensor) -> bool:
    """Whether oneDNN packs this matrix on this machine."""
    return (
        weight.device.type == "cpu"
        and torch._C._has_mkldnn
        and weight.dtype in (torch.float32, torch.bfloat16)
        and (weight.dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported())
    )


def make_linear_weight(weight: Tensor) -> LinearWeight:
    """Make W resident in the fastest exact form this machine has."""
    return PackedWeight(weight) if can_pack(weight) else PlainWeight(weight)
