"""What Triton's kernels need of a machine beside a GPU: a C compiler and Python's headers.

Triton compiles the small library that launches kernels when it has none in its cache. Knows
nothing of the kernels.
"""

import os
import shutil
import sysconfig
from collections.abc import Mapping
from pathlib import Path

COMPILERS = ("gcc", "clang")


def missing_for_triton(
    environment: Mapping[str, str] = os.environ, include: Path | None = None
) -> str | None:
    """Return what is missing, and where it is from; None: nothing is. `include`: of Python.h."""
    if any(_cache_folder(environment).glob("*/cuda_utils*.so")):
        return None
    path = environment.get("PATH", os.defpath)
    if not environment.get("CC") and not any(shutil.which(name, path=path) for name in COMPILERS):
        return "a C compiler (apt-get install gcc libc6-dev)"
    folders = [include or _include_folder(), *_further_folders(environment)]
    if not any((folder / "Python.h").is_file() for folder in folders):
        return "Python's headers (apt-get install python3-dev)"
    return None


def _cache_folder(environment: Mapping[str, str]) -> Path:
    """Return where Triton looks for what it compiled."""
    named = environment.get("TRITON_CACHE_DIR")
    home = environment.get("TRITON_HOME") or Path.home()
    return Path(named) if named else Path(home, ".triton", "cache")


def _further_folders(environment: Mapping[str, str]) -> list[Path]:
    """Return where compilers look for headers beside what they are told."""
    named = (environment.get(name, "") for name in ("CPATH", "C_INCLUDE_PATH"))
    return [Path(folder) for paths in named for folder in paths.split(os.pathsep) if folder]


def _include_folder() -> Path:
    """Return where Triton looks for Python's headers: never below /usr/local for Debian's own."""
    scheme = sysconfig.get_default_scheme()
    scheme = "posix_prefix" if scheme == "posix_local" else scheme
    return Path(sysconfig.get_paths(scheme=scheme)["include"])
