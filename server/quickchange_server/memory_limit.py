"""How much memory this process may use: the cgroup's limit, the machine's RAM, a GPU.

Knows nothing of what the memory is for. Reads both versions of the cgroup files, because the
older one is still found under containers.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import psutil


@dataclass(frozen=True, slots=True)
class MemoryLimit:
    """A ceiling and what is free under it now, with the name of who sets it."""

    total_bytes: int
    free_bytes: int
    source: str


@dataclass(frozen=True, slots=True)
class _CgroupFiles:
    """Where one version of cgroups keeps its numbers; `stat_key` counts reclaimable cache."""

    root: str
    limit: str
    usage: str
    stat_key: str


_V2 = _CgroupFiles("sys/fs/cgroup", "memory.max", "memory.current", "inactive_file")
_V1 = _CgroupFiles(
    "sys/fs/cgroup/memory",
    "memory.limit_in_bytes",
    "memory.usage_in_bytes",
    "total_inactive_file",
)


def host_memory(root: Path = Path("/")) -> MemoryLimit:
    """Return the tightest limit on host memory: of a cgroup, or the machine's own."""
    memory = psutil.virtual_memory()
    machine = MemoryLimit(memory.total, memory.available, "available RAM")
    limits = [limit for limit in cgroup_limits(root) if limit.total_bytes < machine.total_bytes]
    return min([*limits, machine], key=lambda limit: limit.free_bytes)


def device_memory(device: str, root: Path = Path("/")) -> MemoryLimit:
    """Return the limit on a device's memory; a CPU's is the host's."""
    if device == "cpu":
        return host_memory(root)
    import torch

    free, total = torch.cuda.mem_get_info(torch.device(device))
    return MemoryLimit(total, free, f"free memory of {device}")


def cgroup_limits(root: Path = Path("/")) -> list[MemoryLimit]:
    """Return the limits of this process's cgroups and of all that hold them."""
    return [
        limit
        for files, path in _cgroups(root)
        for folder in _with_parents(path)
        if (limit := _read_limit(root / files.root / folder, files))
    ]


def _cgroups(root: Path) -> Iterator[tuple[_CgroupFiles, str]]:
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            yield _V2, path
        elif "memory" in controllers.split(","):
            yield _V1, path


def _with_parents(path: str) -> list[str]:
    """Return a cgroup's path and its parents' up to the root, without leading slashes."""
    own = PurePosixPath(path)
    return [str(each).lstrip("/") for each in (own, *own.parents)]


def _read_limit(folder: Path, files: _CgroupFiles) -> MemoryLimit | None:
    total = _read_number(folder / files.limit)
    usage = _read_number(folder / files.usage)
    if total is None or usage is None:
        return None
    free = total - usage + _read_stat(folder / "memory.stat", files.stat_key)
    return MemoryLimit(total, max(0, min(free, total)), "the cgroup's limit")


def _read_number(file: Path) -> int | None:
    try:
        return int(file.read_text())
    except (OSError, ValueError):  # absent, or "max": no limit here
        return None


def _read_stat(file: Path, key: str) -> int:
    try:
        rows = dict(line.split(" ", 1) for line in file.read_text().splitlines())
        return int(rows.get(key, 0))
    except (OSError, ValueError):
        return 0
