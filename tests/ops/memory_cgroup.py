"""A memory limit that the kernel enforces: a cgroup of either version, made and removed again."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.ops.environments import NotHere

V1, V2 = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class MemoryCgroup:
    """A cgroup with a limit in bytes."""

    folder: Path

    @property
    def prefix(self) -> list[str]:
        """Words before a command that make its process a member first."""
        join = f'echo $$ > {self.folder / "cgroup.procs"} && exec "$@"'
        return ["sh", "-c", join, "sh"]

    @property
    def num_kills(self) -> int:
        """How many processes the kernel killed for their memory."""
        for name in ("memory.events", "memory.oom_control"):
            if (self.folder / name).exists():
                return self._number(name, "oom_kill")
        raise NotHere("this kernel does not count the processes that it kills")

    @property
    def used_bytes(self) -> int:
        """What processes hold now, without the cache of files."""
        key = "rss" if (self.folder / "memory.limit_in_bytes").exists() else "anon"
        return self._number("memory.stat", key)

    def _number(self, file: str, key: str) -> int:
        rows = (line.split() for line in (self.folder / file).read_text().splitlines())
        return next(int(value) for name, value in rows if name == key)


@contextmanager
def memory_cgroup(limit_bytes: int) -> Iterator[MemoryCgroup]:
    """Make a cgroup; remove it at the end, when all of its processes have ended.

    Raises: NotHere if this process may not make one, or nothing here enforces memory limits.
    """
    root, limit = (V1, "memory.limit_in_bytes") if V1.is_dir() else (V2, "memory.max")
    folder = root / f"quickchange-test-{os.getpid()}"
    try:
        folder.mkdir()
    except OSError as error:
        raise NotHere(f"no cgroup can be made here: {error}") from error
    try:
        try:
            (folder / limit).write_text(str(limit_bytes))
        except OSError as error:
            raise NotHere(f"no memory limit can be set here: {error}") from error
        yield MemoryCgroup(folder)
    finally:
        folder.rmdir()
