"""The numbers of a file's tensors, read block by block: memory does not grow with an upload.

Knows no adapters, and not what numbers are good for.
"""

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from io import BufferedReader
from typing import Any

import numpy as np
import numpy.typing as npt

from quickchange_adapters.header import ITEM_BYTES, TensorEntry, read_bytes, to_float32

BLOCK_VALUES = 1 << 20

FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class FactorSummary:
    """One factor of a low-rank update: its largest magnitude, and its Gram matrix [rank, rank].

    `largest` is NaN or infinite when a value is, and `gram` then means nothing.
    """

    largest: float
    gram: npt.NDArray[np.float64]


def flat_blocks(file: BufferedReader, entry: TensorEntry) -> Iterator[FloatArray]:
    """Yield a tensor's values in the file's order, a block at a time.

    Raises: HeaderRefused when the file is shorter than its header said.
    """
    num_values = math.prod(entry.shape)
    for start in range(0, num_values, BLOCK_VALUES):
        yield _read_values(file, entry, start, min(start + BLOCK_VALUES, num_values))


def largest_magnitude(file: BufferedReader, entry: TensorEntry) -> float:
    """Return the largest magnitude of a tensor's values; NaN or infinity if one is there.

    Raises: HeaderRefused.
    """
    largest = 0.0
    for block in flat_blocks(file, entry):
        largest = max(largest, _largest(block))
        if not math.isfinite(largest):
            break
    return largest


def values_sha256(file: BufferedReader, entry: TensorEntry) -> str:
    """Digest of a tensor's values as little-endian float32, whatever dtype they are stored in.

    Raises: HeaderRefused.
    """
    digest = hashlib.sha256()
    for block in flat_blocks(file, entry):
        digest.update(np.ascontiguousarray(block, "<f4").data)
    return digest.hexdigest()


def summarize_factor(file: BufferedReader, entry: TensorEntry, rank_axis: int) -> FactorSummary:
    """Read lora_a [rank, in] (rank_axis 0: gram is A·Aᵀ) or lora_b [out, rank] (1: Bᵀ·B).

    Raises: HeaderRefused.
    """
    rank = entry.shape[rank_axis]
    gram = np.zeros((rank, rank))
    largest = 0.0
    for block in _row_blocks(file, entry) if rank_axis else _column_blocks(file, entry):
        largest = max(largest, _largest(block))
        if not math.isfinite(largest):
            break
        values = block.astype(np.float64)
        gram += values.T @ values if rank_axis else values @ values.T
    return FactorSummary(largest, gram)


def _largest(block: FloatArray) -> float:
    """Return the largest magnitude; infinity for NaN, which `max` could lose."""
    largest = float(np.max(np.abs(block), initial=0.0))
    return math.inf if math.isnan(largest) else largest


def _row_blocks(file: BufferedReader, entry: TensorEntry) -> Iterator[FloatArray]:
    num_rows, width = entry.shape
    step = max(1, BLOCK_VALUES // max(width, 1))
    for start in range(0, num_rows, step):
        end = min(start + step, num_rows)
        yield _read_values(file, entry, start * width, end * width).reshape(-1, width)


def _column_blocks(file: BufferedReader, entry: TensorEntry) -> Iterator[FloatArray]:
    """Yield strips of columns; a tensor that fits into one block is one strip, read at once."""
    num_rows, width = entry.shape
    if num_rows * width <= BLOCK_VALUES:
        yield _read_values(file, entry, 0, num_rows * width).reshape(num_rows, width)
        return
    step = max(1, BLOCK_VALUES // num_rows)
    for start in range(0, width, step):
        end = min(start + step, width)
        rows = range(0, num_rows * width, width)
        yield np.stack([_read_values(file, entry, row + start, row + end) for row in rows])


def _read_values(
    file: BufferedReader, entry: TensorEntry, start: int, end: int
) -> npt.NDArray[Any]:
    """Return values [start, end) of a tensor, counted in the file's order."""
    item = ITEM_BYTES[entry.dtype]
    return to_float32(
        read_bytes(file, entry, entry.begin + start * item, entry.begin + end * item), entry.dtype
    )
