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
    """Have all products of the library computed by AMX from now on if it can, else none.

    Called while the library computes nothing. Returns why AMX is not used; None if it is.
    """
    library.qc_use_tiles(0)
    if not wanted:
        return "it is switched off"
    if missing := missing_instructions():
        return f"the CPU has no {', '.join(sorted(missing))}"
    if library.qc_use_tiles(1):
        return "the system does not allow it (Linux does from 5.16 on)"
    library.qc_use_tiles(0)
    if not _agrees(library):
        log.warning("AMX is not used: its products are not those of AVX-512 on this machine")
        return "its products are wrong on this machine"
    library.qc_use_tiles(1)
    return None


def missing_instructions() -> frozenset[str]:
    """Return what the CPU lacks for products by AMX, in Linux's names."""
    return AMX_FLAGS - cpu_flags()


def _agrees(library: ctypes.CDLL) -> bool:
    """Compare products by AMX with those without; leaves AMX off."""
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(70, 96, generator=generator).bfloat16()
    memory = PackedMemory()
    for weight in (
        NativeWeight(matrix, library, memory),
        NativeInt8Weight(matrix, library, memory),
    ):
        for num_tokens in _CHECKED_TOKENS:
            x = torch.randn(num_tokens, 96, generator=generator).bfloat16()
            wanted = weight.apply(x, None)
            library.qc_use_tiles(1)
            actual = weight.apply(x, None)
            library.qc_use_tiles(0)
            if not torch.allclose(actual, wanted, rtol=2**-7, atol=1e-3):
                return False
    return True
