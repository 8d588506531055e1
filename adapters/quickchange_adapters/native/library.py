"""The native library as Python sees it: its structures (tables.h) and functions (library.cpp)."""

import ctypes
from ctypes import POINTER, Structure, c_float, c_int32, c_int64, c_void_p
from functools import cache
from pathlib import Path

from torch import Tensor  # torch loads the OpenMP runtime that the library is bound to

from quickchange_adapters.native.build import BuildFailed, library_path, openmp_runtime

MAX_PARTS = 4
NUM_GROUPS = 4
PANEL = 32
"""Outputs of a packed matrix are padded to a multiple of this."""


class Arena(Structure):
    """One projection group's arenas."""

    _fields_ = [
        ("a", c_void_p),
        ("b", c_void_p),
        ("num_rows", c_int64),
        ("num_parts", c_int32),
        ("num_inputs", c_int32),
        ("num_outputs", c_int32),
        ("part_ends", c_int32 * MAX_PARTS),
    ]


class Linear(Structure):
    """A packed matrix, its bias, and the scales of its outputs if it is quantised."""

    _fields_ = [("weight", c_void_p), ("bias", c_void_p), ("scales", c_void_p)]


class Layer(Structure):
    """One block of the model, and its KV storage."""

    _fields_ = [
        ("attention_norm", c_void_p),
        ("feed_forward_norm", c_void_p),
        ("query_norm", c_void_p),
        ("key_norm", c_void_p),
        ("qkv", Linear),
        ("output", Linear),
        ("gate_up", Linear),
        ("down", Linear),
        ("keys", c_void_p),
        ("values", c_void_p),
        ("window", c_int64),
    ]


class Model(Structure):
    """What is the same in all steps."""

    _fields_ = [
        ("num_layers", c_int32),
        ("width", c_int32),
        ("num_heads", c_int32),
        ("num_kv_heads", c_int32),
        ("head_width", c_int32),
        ("intermediate", c_int32),
        ("vocabulary", c_int32),
        ("block_size", c_int32),
        ("epsilon", c_float),
        ("attention_scale", c_float),
        ("activation", c_int64),
        ("cosines", c_void_p),
        ("sines", c_void_p),
        ("final_norm", c_void_p),
        ("arenas", Arena * NUM_GROUPS),
    ]


class Term(Structure):
    """Rank rows of one adapter in one group."""

    _fields_ = [
        ("first_row", c_int32),
        ("num_rows", c_int32),
        ("has_bias", c_int32),
        ("weight", c_float),
    ]


class RowBlock(Structure):
    """Tokens that share adapters."""

    _fields_ = [
        ("start", c_int32),
        ("end", c_int32),
        ("first_term", c_int32),
        ("end_term", c_int32),
    ]


class Step(Structure):
    """The tables of one step."""

    _fields_ = [
        ("num_tokens", c_int32),
        ("num_blocks", c_int32),
        ("num_terms", c_int32),
        ("num_wanted", c_int32),
        ("layers", c_void_p),
        ("head", Linear),
        ("hidden", c_void_p),
        ("positions", c_void_p),
        ("tables", c_void_p),
        ("kv_blocks", c_void_p),
        ("blocks", c_void_p),
        ("terms", c_void_p),
        ("wanted", c_void_p),
        ("wanted_hidden", c_void_p),
        ("logits", c_void_p),
        ("stage_seconds", c_void_p),
    ]


STRUCTURES = (Arena, Linear, Layer, Model, Term, RowBlock, Step)


@cache
def load_library(folder: Path | None = None) -> ctypes.CDLL:
    """Return the library, built if need be; `folder` keeps it, None: one in the user's cache.

    Raises: BuildFailed.
    """
    path = library_path(folder)
    try:
        ctypes.CDLL(str(openmp_runtime()), mode=ctypes.RTLD_GLOBAL)
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise BuildFailed(f"the native library cannot be loaded: {error}") from error
    _declare(library)
    _check_structures(library)
    return library


def highest_of_rows(library: ctypes.CDLL, x: Tensor) -> tuple[list[float], list[int]]:
    """Return each row's highest number and the first place where it is; NaN and 0 if one is NaN.

    `x` [rows, columns] float32.
    """
    rows, columns = x.shape
    x = x.contiguous()
    highest, places = (c_float * rows)(), (c_int32 * rows)()
    library.qc_highest(x.data_ptr(), rows, columns, highest, places)
    return list(highest), list(places)


def _declare(library: ctypes.CDLL) -> None:
    library.qc_use_tiles.argtypes = [c_int32]
    library.qc_use_tiles.restype = c_int32
    library.qc_pack.argtypes = [c_void_p, c_int32, c_int32, c_int32, c_void_p]
    library.qc_unpack.argtypes = [c_void_p, c_int32, c_int32, c_int32, c_void_p]
    library.qc_product.argtypes = [
        *(c_void_p, c_int32, POINTER(Linear)),
        *(c_int32, c_int32, c_void_p),
    ]
    library.qc_product.restype = c_int32
    library.qc_highest.argtypes = [c_void_p, c_int32, c_int32, c_void_p, c_void_p]
    for function in (library.qc_pack, library.qc_unpack, library.qc_highest):
        function.restype = None
    library.qc_new_scratch.restype = c_void_p
    library.qc_delete_scratch.argtypes = [c_void_p]
    library.qc_delete_scratch.restype = None
    library.qc_run_step.argtypes = [POINTER(Model), POINTER(Step), c_void_p]
    library.qc_run_step.restype = c_int32
    library.qc_struct_sizes.argtypes = [POINTER(c_int32)]
    library.qc_struct_sizes.restype = c_int32


def _check_structures(library: ctypes.CDLL) -> None:
    sizes = (c_int32 * len(STRUCTURES))()
    count = library.qc_struct_sizes(sizes)
    expected = [ctypes.sizeof(structure) for structure in STRUCTURES]
    if count != len(STRUCTURES) or list(sizes) != expected:
        raise BuildFailed("the library's structures are not those that Python fills")
