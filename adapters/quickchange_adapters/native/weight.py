"""A frozen matrix in the native library's packed form: the only resident copy, exact to unpack."""

import ctypes

import torch
from torch import Tensor

from quickchange_adapters.native.library import PANEL

PIECE_ELEMENTS = 16 << 20


class PackedMemory:
    """Large pieces of memory, handed out in slices: where matrices lie together, pages can be huge.

    A piece goes when all its slices are gone, so what goes together shares one of these.
    """

    def __init__(self) -> None:
        self._piece = torch.empty(0, dtype=torch.bfloat16)
        self._used = 0

    def take(self, num_elements: int) -> Tensor:
        """Return an uninitialised slice of bfloat16 numbers."""
        if self._used + num_elements > self._piece.numel():
            self._piece = torch.empty(max(num_elements, PIECE_ELEMENTS), dtype=torch.bfloat16)
            self._used = 0
        start, self._used = self._used, self._used + num_elements
        return self._piece[start : self._used]


class NativeWeight:
    """W [out, in] in bfloat16, packed in panels of 32 outputs; `in` is even."""

    def __init__(self, weight: Tensor, library: ctypes.CDLL, memory: PackedMemory) -> None:
        self._library = library
        self._num_outputs, self._num_inputs = weight.shape
        num_panels = -(-self._num_outputs // PANEL)
        self._packed = memory.take(num_panels * PANEL * self._num_inputs)
        source = weight.contiguous()
        library.qc_pack(
            source.data_ptr(), self._num_outputs, self._num_inputs, self._packed.data_ptr()
        )

    @property
    def num_bytes(self) -> int:
        """Resident bytes, padding of the last panel included."""
        return self._packed.nbytes

    @property
    def address(self) -> int:
        """Where the packed numbers begin; valid as long as this object lives."""
        return self._packed.data_ptr()

    def apply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Return x @ W.T + bias; x [tokens, in] -> [tokens, out]. Sums in float32, rounded once."""
        x = x.contiguous()
        y = x.new_empty(x.shape[0], self._num_outputs)
        self._library.qc_product(
            x.data_ptr(),
            x.shape[0],
            self.address,
            None if bias is None else bias.data_ptr(),
            self._num_outputs,
            self._num_inputs,
            y.data_ptr(),
        )
        return y

    def dense(self) -> Tensor:
        """Unpack W exactly; a new tensor."""
        weight = torch.empty(self._num_outputs, self._num_inputs, dtype=torch.bfloat16)
        self._library.qc_unpack(
            self.address, self._num_outputs, self._num_inputs, weight.data_ptr()
        )
        return weight
