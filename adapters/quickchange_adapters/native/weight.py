"""Frozen matrices in the native library's packed form: the only resident copy, exact to unpack."""

import ctypes

import torch
from torch import Tensor

from quickchange_adapters.native.library import PANEL, Linear
from quickchange_adapters.ops.int8_weight import quantise, restore

PIECE_BYTES = 32 << 20


class PackedMemory:
    """Large pieces of memory, handed out in slices: where matrices lie together, pages can be huge.

    A piece goes when all its slices are gone, so what goes together shares one of these.
    """

    def __init__(self) -> None:
        self._piece = torch.empty(0, dtype=torch.uint8)
        self._used = 0

    def take(self, num_bytes: int) -> Tensor:
        """Return an uninitialised slice of bytes; slices begin at multiples of 64."""
        if self._used + num_bytes > self._piece.numel():
            self._piece = torch.empty(max(num_bytes, PIECE_BYTES), dtype=torch.uint8)
            self._used = 0
        start = self._used
        self._used = -(-(start + num_bytes) // 64) * 64
        return self._piece[start : start + num_bytes]


class _Packed:
    """A matrix [out, in] of bfloat16 or int8, packed; `in` is even."""

    def __init__(self, numbers: Tensor, library: ctypes.CDLL, memory: PackedMemory) -> None:
        self.library = library
        self.shape, self.dtype = numbers.shape, numbers.dtype
        num_rows = -(-self.shape[0] // PANEL) * PANEL
        self.bytes = memory.take(num_rows * self.shape[1] * numbers.itemsize)
        numbers = numbers.contiguous()  # held by this name until it has been read
        library.qc_pack(numbers.data_ptr(), *self._form(), self.bytes.data_ptr())

    def unpack(self) -> Tensor:
        numbers = torch.empty(self.shape, dtype=self.dtype)
        self.library.qc_unpack(self.bytes.data_ptr(), *self._form(), numbers.data_ptr())
        return numbers

    def product(self, x: Tensor, linear: Linear) -> Tensor:
        x = x.contiguous()
        y = x.new_empty(x.shape[0], self.shape[0])
        if self.library.qc_product(x.data_ptr(), x.shape[0], linear, *self.shape, y.data_ptr()):
            raise MemoryError("not enough memory for a product's buffers")
        return y

    def _form(self) -> tuple[int, int, int]:
        return (*self.shape, self.dtype.itemsize)


class NativeWeight:
    """W [out, in] in bfloat16, packed in panels of 32 outputs."""

    def __init__(self, weight: Tensor, library: ctypes.CDLL, memory: PackedMemory) -> None:
        self._packed = _Packed(weight, library, memory)

    @property
    def num_bytes(self) -> int:
        """Resident bytes, padding of the last panel included."""
        return self._packed.bytes.nbytes

    def describe(self, bias: Tensor | None) -> Linear:
        """Return the matrix as the library takes it."""
        return Linear(
            self._packed.bytes.data_ptr(), None if bias is None else bias.data_ptr(), None
        )

    def apply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Return x @ W.T + bias; x [tokens, in] -> [tokens, out]. Sums in float32, rounded once."""
        return self._packed.product(x, self.describe(bias))

    def dense(self) -> Tensor:
        """Unpack W exactly; a new tensor."""
        return self._packed.unpack()


class NativeInt8Weight:
    """W [out, in] in int8 with a float32 scale for each output, packed in panels of 32 outputs."""

    def __init__(self, weight: Tensor, library: ctypes.CDLL, memory: PackedMemory) -> None:
        numbers, scales = quantise(weight)
        self._packed = _Packed(numbers, library, memory)
        self._scales = torch.zeros(-(-scales.numel() // PANEL) * PANEL)
        self._scales[: scales.numel()] = scales
        self._dtype = weight.dtype

    @property
    def num_bytes(self) -> int:
        """Resident bytes of numbers and scales."""
        return self._packed.bytes.nbytes + self._scales.nbytes

    def describe(self, bias: Tensor | None) -> Linear:
        """Return the matrix as the library takes it."""
        address = None if bias is None else bias.data_ptr()
        return Linear(self._packed.bytes.data_ptr(), address, self._scales.data_ptr())

    def apply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Return x @ W.T + bias; x [tokens, in] -> [tokens, out]. Sums in float32, rounded once."""
        return self._packed.product(x, self.describe(bias))

    def dense(self) -> Tensor:
        """Return what the numbers and scales stand for, rounded to the base's dtype."""
        numbers = self._packed.unpack()
        return restore(numbers, self._scales[: len(numbers)], self._dtype)
