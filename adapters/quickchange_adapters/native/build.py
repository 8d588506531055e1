"""Compile the native library with the machine's C++ compiler, once, into the user's cache.

The object has no OpenMP runtime of its own: its calls are bound, when it is loaded, to the one that
PyTorch has loaded, so that both share one team of threads. Two teams on the same cores would put
each other to sleep. Knows nothing of what the library does.
"""

import hashlib
import logging
import os
import re
import shutil
import stat
import subprocess
import tempfile
import time
from pathlib import Path

log = logging.getLogger(__name__)
SOURCES = (
    *("vector.h", "tables.h", "team.h", "ahead.h", "product.h", "soft_tiles.h", "amx.h"),
    *("panels.h", "deltas.h", "attention.h", "block_attention.h"),
    *("tile_attention.h", "attention_units.h", "wanted_step.h", "scratch.h", "step.h"),
)
MAIN_SOURCE = "library.cpp"
CPU_FLAGS = frozenset(
    {"avx2", "fma", "avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512vbmi", "avx512_bf16"}
)
COMPILE_FLAGS = (
    "-O3",
    "-std=c++17",
    "-fPIC",
    "-fopenmp",
    "-ffp-contract=off",  # no sum is fused with a product in one tile's code and not in another's
    "-fvisibility=hidden",
    *(f"-m{flag.replace('_', '')}" for flag in sorted(CPU_FLAGS)),
)
WITHOUT_AMX = "-DQUICKCHANGE_WITHOUT_AMX"
"""For an assembler that does not know its instructions (GNU's does from 2.36 on)."""
COMPILERS = ("g++", "c++", "clang++")
"""GCC first: its code calls the OpenMP runtime that PyTorch usually brings."""
TIMEOUT_S = 300.0
_WORK_PREFIX = "build-"
_UNKNOWN_INSTRUCTION = re.compile(
    r"no such instruction|(unknown|invalid|unrecogni[sz]ed) .*(instruction|mnemonic)", re.IGNORECASE
)
_OPENMP = re.compile(r"\s(/.*/lib(?:gomp|iomp5|omp)[^/\s]*\.so[^/\s]*)$")


class BuildFailed(Exception):
    """There is no native library for this machine; the message says why."""


def default_folder() -> Path:
    """Return where built libraries are kept.

    Raises: BuildFailed if this user has no home.
    """
    cache = os.environ.get("QUICKCHANGE_CACHE") or "~/.cache/quickchange"
    try:
        return Path(cache).expanduser() / "native"
    except RuntimeError as error:
        raise BuildFailed(f"{cache!r} has no place: name a folder in QUICKCHANGE_CACHE") from error


def check_cpu() -> None:
    """Make sure that this machine has the instructions.

    Raises: BuildFailed.
    """
    if missing := CPU_FLAGS - cpu_flags():
        raise BuildFailed(f"the CPU has no {', '.join(sorted(missing))}")


def cpu_flags() -> frozenset[str]:
    """Return what the CPU can do, in Linux's names.

    Raises: BuildFailed.
    """
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError as error:
        raise BuildFailed("the CPU's features cannot be read: /proc/cpuinfo is missing") from error
    line = next((line for line in text.splitlines() if line.startswith("flags")), "")
    return frozenset(line.partition(":")[2].split())


def library_path(folder: Path | None = None, *, needs_cpu: bool = True) -> Path:
    """Return the library's file, compiling it if it is not there.

    Without `needs_cpu` it is not asked whether this machine could run it.

    Raises: BuildFailed.
    """
    if needs_cpu:
        check_cpu()
    folder = folder or default_folder()
    path = folder / f"quickchange-{_fingerprint()}.so"
    try:
        if not path.is_file():
            _build(find_compiler(), path)
        _check_owner(path)
    except OSError as error:
        reason = error.strerror or error
        raise BuildFailed(
            f"the native library cannot be kept in {str(folder)!r}: {reason}; "
            "name a folder of yours in QUICKCHANGE_CACHE"
        ) from error
    return path


def openmp_runtime() -> Path:
    """Return the OpenMP runtime that this process has loaded.

    Raises: BuildFailed if there is none, or more than one.
    """
    lines = Path("/proc/self/maps").read_text().splitlines()
    found = {match[1] for line in lines if (match := _OPENMP.search(line))}
    if len(found) != 1:
        names = ", ".join(sorted(Path(each).name for each in found)) or "none"
        raise BuildFailed(f"one OpenMP runtime is needed in this process; found: {names}")
    return Path(found.pop())


def find_compiler() -> str:
    """Return the C++ compiler: $CXX, or the first that is there.

    Raises: BuildFailed.
    """
    named = os.environ.get("CXX")
    for name in (named,) if named else COMPILERS:
        path = shutil.which(name)
        if path is not None:
            return path
    wanted = named or ", ".join(COMPILERS)
    raise BuildFailed(f"no C++ compiler ({wanted}); on Debian and Ubuntu: apt-get install g++")


def _check_owner(path: Path) -> None:
    """Refuse a library that somebody else could have written: it would run as us."""
    for each in (path, path.parent):
        status = each.stat()
        is_ours = status.st_uid in (0, os.geteuid())
        if not is_ours or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise BuildFailed(
                f"{str(each)!r} can be written by others: "
                "take that right away (chmod go-w), or name another QUICKCHANGE_CACHE"
            )


def _fingerprint() -> str:
    """Digest of everything that the library is made from; any compiler may make it."""
    digest = hashlib.sha256(" ".join(COMPILE_FLAGS).encode())
    for name in (*SOURCES, MAIN_SOURCE):
        digest.update(_source(name).read_bytes())
    return digest.hexdigest()[:16]


def _source(name: str) -> Path:
    return Path(__file__).parent / name


def _build(compiler: str, path: Path) -> None:
    """Compile into a folder beside the target, then rename: others see all of it or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    _remove_abandoned(path.parent)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=_WORK_PREFIX) as folder:
        log.warning("compiling the native kernels with %s, once: some seconds", compiler)
        built = _compile(compiler, Path(folder))
        built.chmod(0o700)
        os.replace(built, path)


def _remove_abandoned(folder: Path) -> None:
    """Remove what builders left that were killed."""
    for each in folder.glob(f"{_WORK_PREFIX}*"):
        if each.lstat().st_mtime < time.time() - 4 * TIMEOUT_S:
            shutil.rmtree(each, ignore_errors=True)


def _compile(compiler: str, folder: Path) -> Path:
    built, library = folder / "library.o", folder / "library.so"
    command = [compiler, *COMPILE_FLAGS, "-c", str(_source(MAIN_SOURCE)), "-o", str(built)]
    try:
        _run(command)
    except BuildFailed as error:
        if not _UNKNOWN_INSTRUCTION.search(str(error)):
            raise
        _run([*command, WITHOUT_AMX])
        log.warning(
            "the native kernels are without AMX, which this assembler does not know (%s); on a CPU "
            "that has it, install binutils 2.36 or later, and remove %s before the next start",
            *(error, folder.parent),
        )
    # linked without -fopenmp, so that no second OpenMP runtime is pulled in
    _run([compiler, "-shared", str(built), "-o", str(library)])
    return library


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=TIMEOUT_S,
            env={**os.environ, "LC_ALL": "C"},  # the word `error` is looked for
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildFailed(f"the C++ compiler {command[0]} did not finish: {error}") from error
    if done.returncode != 0:
        lines = done.stderr.splitlines()
        first = next((line for line in lines if "error" in line.lower()), "no reason")
        raise BuildFailed(f"{command[0]} cannot compile the native library: {first}")
