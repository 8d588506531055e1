"""Whether the native library's products are computed by AMX: asked once, and checked before use."""

import ctypes
import logging

import torch

from quickchange_adapters.native.build import cpu_flags
from quickchange_adapters.native.weight import NativeInt8Weight, NativeWeight, PackedMemory

log = logging.getLogger(__name__)
AMX_FLAGS = frozenset({"amx_tile", "amx_bf16"})
_CHECKED_TOKENS = (1, 16, 45)
"""One row, one whole tile, and two tiles with a rest behind them."""


def use_amx(library: ctypes.CDLL, *, wanted: bool) -> str | None:
    """Have all steps and products of the library that begin from now on computed by AMX, or none.

    One choice for a process: called while the library computes nothing. Returns why AMX is not
    used; None if it is.
    """
    refusal = "it is switched off" if not wanted else _refusal(library)
    library.qc_use_tiles(0 if refusal else 1)
    return refusal


def _refusal(library: ctypes.CDLL) -> str | None:
    if missing := missing_instructions():
        return f"the CPU has no {', '.join(sorted(missing))}"
    if library.qc_use_tiles(1):
        return "the compiler or the system does not allow it (Linux does from 5.16 on)"
    if not _agrees(library):
        log.warning("AMX is not used: its products are not those of AVX-512 on this machine")
        return "its products are wrong on this machine"
    return None


def missing_instructions() -> frozenset[str]:
    """Return what the CPU lacks for products by AMX, in Linux's names."""
    return AMX_FLAGS - cpu_flags()


def _agrees(library: ctypes.CDLL) -> bool:
    """Compare products by AMX with those without; leaves AMX on or off."""
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(70, 96, generator=generator).bfloat16()
    memory = PackedMemory()
    for weight in (
        NativeWeight(matrix, library, memory),
        NativeInt8Weight(matrix, library, memory),
    ):
        for num_tokens in _CHECKED_TOKENS:
            x = torch.randn(num_tokens, 96, generator=generator).bfloat16()
            library.qc_use_tiles(0)
            wanted = weight.apply(x, None)
            library.qc_use_tiles(1)
            actual = weight.apply(x, None)
            if not torch.allclose(actual, wanted, rtol=2**-7, atol=1e-3):
                return False
    return True
