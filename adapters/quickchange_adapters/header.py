"""The header of a safetensors file, read by ourselves before anything is allocated for it.

    8 bytes     length n of the header, little-endian
    n bytes     JSON: name -> {"dtype", "shape", "data_offsets": [begin, end]}, "__metadata__"
    the rest    the tensors' bytes, without holes or overlaps

Tensors are read with plain reads, never mapped: a file that shrinks must not kill the process.
Knows no adapters. Source: the safetensors format description.
"""

import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from quickchange_adapters.errors import AdapterError
from quickchange_adapters.strict_json import JsonRefused, parse_object

ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2}
SIZE_BYTES = 8

# How files begin that are weights in another format.
_OTHER_FORMATS = (
    (b"PK\x03\x04", "a zip archive, as torch.save writes it"),
    (b"\x80\x02", "a pickle"),
    (b"\x80\x03", "a pickle"),
    (b"\x80\x04", "a pickle"),
    (b"\x80\x05", "a pickle"),
    (b"GGUF", "a GGUF file"),
    (b"\x89HDF", "an HDF5 file"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself"),
)


class HeaderRefused(AdapterError):
    """The file is not one of safetensors that we read; `code` is the contract's."""

    def __init__(self, code: str, message: str, hint: str = "", where: str = "") -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.hint = hint
        self.where = where


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of the file; `begin` and `end` count from the file's first byte."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class WeightsHeader:
    """All tensors of a file by name, and the file's own notes."""

    tensors: dict[str, TensorEntry]
    metadata: dict[str, str]


def read_header(path: Path, max_header_bytes: int) -> WeightsHeader:
    """Read and check the header of a safetensors file.

    Raises: HeaderRefused (weights_not_safetensors, weights_invalid).
    """
    with path.open("rb") as file:
        file_bytes = os.fstat(file.fileno()).st_size
        raw, data_begin = _read_raw(file, file_bytes, max_header_bytes)
    metadata = _metadata(raw.pop("__metadata__", {}))
    tensors = {name: _entry(name, value, data_begin) for name, value in raw.items()}
    _check_offsets(tensors.values(), data_begin, file_bytes)
    return WeightsHeader(tensors, metadata)


def read_array(file: BufferedReader, entry: TensorEntry) -> npt.NDArray[Any]:
    """Read one tensor of an open file; bfloat16 comes as its bits, uint16.

    Raises: HeaderRefused when the file is shorter than its header said.
    """
    return read_bytes(file, entry, entry.begin, entry.end).reshape(entry.shape)


def read_bytes(file: BufferedReader, entry: TensorEntry, begin: int, end: int) -> npt.NDArray[Any]:
    """Read the values of a tensor that lie in bytes [begin, end) of an open file, flat.

    Raises: HeaderRefused.
    """
    file.seek(begin)
    data = bytearray(end - begin)
    if file.readinto(data) != len(data):
        raise HeaderRefused("weights_invalid", f"the bytes of {entry.name!r} are missing")
    dtype = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}[entry.dtype]
    return np.frombuffer(data, dtype=dtype)


def to_float32(array: npt.NDArray[Any], dtype: str) -> npt.NDArray[np.float32]:
    """Return the values of a tensor read by `read_array`; exact for all three dtypes."""
    if dtype == "BF16":
        return (array.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return array.astype(np.float32)


def _read_raw(file: BufferedReader, file_bytes: int, max_bytes: int) -> tuple[dict[str, Any], int]:
    """Return the header's JSON object and where the tensors' bytes begin."""
    start = file.read(SIZE_BYTES + 17)
    header_bytes = int.from_bytes(start[:SIZE_BYTES], "little")
    for prefix, what in _OTHER_FORMATS:
        if start.startswith(prefix) and start[SIZE_BYTES : SIZE_BYTES + 1] != b"{":
            raise _not_safetensors(f"the weights are {what}")
    if start[SIZE_BYTES : SIZE_BYTES + 1] != b"{":
        raise _not_safetensors("the weights are not a safetensors file")
    if header_bytes > max_bytes:
        raise _invalid(f"the header says it has {header_bytes} bytes; at most {max_bytes} are read")
    if SIZE_BYTES + header_bytes > file_bytes:
        raise _invalid(f"the header says it has {header_bytes} bytes, the file has {file_bytes}")
    file.seek(SIZE_BYTES)
    try:
        return parse_object(file.read(header_bytes)), SIZE_BYTES + header_bytes
    except JsonRefused as error:
        raise _invalid(f"the header is not valid: {error}") from error


def _metadata(raw: object) -> dict[str, str]:
    if not isinstance(raw, dict) or not all(isinstance(v, str) for v in raw.values()):
        raise _invalid("__metadata__ is not an object of strings")
    return raw


def _entry(name: str, raw: object, data_begin: int) -> TensorEntry:
    if not isinstance(raw, dict) or set(raw) != {"dtype", "shape", "data_offsets"}:
        raise _invalid("an entry needs exactly dtype, shape and data_offsets", name)
    dtype, shape, offsets = raw["dtype"], raw["shape"], raw["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        known = ", ".join(ITEM_BYTES)
        raise _invalid(f"the dtype is {str(dtype)[:20]!r}; {known} are read", name)
    if not _are_sizes(shape) or len(shape) > 8:
        raise _invalid("the shape is not a list of sizes", name)
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise _invalid("data_offsets is not a pair of sizes", name)
    begin, end = offsets
    if end - begin != math.prod(shape) * ITEM_BYTES[dtype]:
        raise _invalid(f"{end - begin} bytes do not make a {dtype} of shape {shape}", name)
    return TensorEntry(name, dtype, tuple(shape), data_begin + begin, data_begin + end)


def _are_sizes(values: object) -> bool:
    return isinstance(values, list) and all(
        isinstance(v, int) and not isinstance(v, bool) and 0 <= v < 1 << 63 for v in values
    )


def _check_offsets(entries: Iterable[TensorEntry], data_begin: int, file_bytes: int) -> None:
    """Refuse holes, overlaps, missing and trailing bytes."""
    position = data_begin
    for entry in sorted(entries, key=lambda e: (e.begin, e.end)):
        if entry.begin != position:
            raise _invalid("its bytes overlap another tensor's, or leave a hole", entry.name)
        position = entry.end
    if position != file_bytes:
        raise _invalid(f"the tensors end at byte {position}, the file at {file_bytes}")


def _invalid(message: str, name: str = "") -> HeaderRefused:
    where = name[:200]
    return HeaderRefused(
        "weights_invalid", f"tensor {where!r}: {message}" if where else message, where=where
    )


def _not_safetensors(message: str) -> HeaderRefused:
    hint = "save the adapter with safe_serialization=True (PEFT's default)"
    return HeaderRefused("weights_not_safetensors", message, hint)
