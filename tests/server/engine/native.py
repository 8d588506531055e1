"""The native library in tests: whether this machine can run it, and one whose AMX is plain C++."""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import pytest
from quickchange_adapters.native import amx, build
from quickchange_adapters.native.build import BuildFailed, check_cpu, find_compiler
from quickchange_adapters.native.library import load_library
from quickchange_server.engine import native_choice


def why_not() -> str | None:
    try:
        check_cpu()
        find_compiler()
    except BuildFailed as error:
        return str(error)
    return None


REASON = why_not()
needs_native = pytest.mark.skipif(REASON is not None, reason=f"native kernels: {REASON}")


@cache
def soft_tiles_library() -> ctypes.CDLL:
    """The library with the tile instructions in plain C++: bit for bit AMX's, much slower."""
    with pytest.MonkeyPatch.context() as patch:
        flags = (*build.COMPILE_FLAGS, "-DQUICKCHANGE_SOFT_TILES")
        patch.setattr(build, "COMPILE_FLAGS", flags)
        return load_library.__wrapped__(build.default_folder().with_name("native-in-tests"))


HAS_AMX = REASON is None and not amx.missing_instructions()


@contextmanager
def instructions(which: str) -> Iterator[None]:
    """Have engines that are made meanwhile take AVX-512 alone, AMX in plain C++, or the CPU's.

    `which`: `vectors`, `soft tiles` or `tiles`.
    """
    with pytest.MonkeyPatch.context() as patch:
        if which == "vectors":
            patch.setattr(amx, "missing_instructions", lambda: amx.AMX_FLAGS)
        elif which == "soft tiles":
            patch.setattr(amx, "missing_instructions", frozenset)
            patch.setattr(native_choice, "load_library", lambda folder: soft_tiles_library())
        yield
