"""Folders from which a caller may name an adapter by its path, and nothing outside of them.

A path is resolved, checked to lie under a root, and then opened one part at a time from the root's
own descriptor, following no symbolic link. So a link inside a root works as long as it stays
inside, and nobody who changes the folder in between gets anything else opened.
"""

import asyncio
import os
import stat
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from weakref import WeakValueDictionary

from quickchange_adapters.store import unavailable

from quickchange_server.adapter_upload import FileName
from quickchange_server.errors import InvalidRequest, NotFound

BLOCK_BYTES = 1 << 20
_NEEDED: tuple[FileName, FileName] = ("adapter_config.json", "adapter_model.safetensors")
_TASK: FileName = "task.json"
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
# Non-blocking: opening a pipe that nobody writes to would otherwise wait for ever.
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK


class FolderFile:
    """One open file of an adapter's folder: a regular one, whatever its name says by now."""

    def __init__(self, descriptor: int) -> None:
        self._file = os.fdopen(descriptor, "rb", buffering=0)
        self.num_bytes = os.fstat(descriptor).st_size

    async def chunks(self) -> AsyncIterator[bytes]:
        """Yield the bytes.

        Raises: StoreUnavailable.
        """
        while block := await asyncio.to_thread(self._read):
            yield block

    def _read(self) -> bytes:
        with unavailable("a file of the adapter's folder cannot be read"):
            return self._file.read(BLOCK_BYTES) or b""

    def close(self) -> None:
        """Let go of it; a repeat is a no-op."""
        self._file.close()


class LoraRoots:
    """The folders that were named at start (`--lora-root`).

    `resolve` says what a path means, links followed; tests change the folder after it looked.
    """

    def __init__(
        self, roots: Sequence[Path] = (), resolve: Callable[[Path], str] = os.path.realpath
    ) -> None:
        self._roots = tuple(Path(os.path.realpath(root)) for root in roots)
        self._resolve = resolve
        self._locks: WeakValueDictionary[tuple[str, str], asyncio.Lock] = WeakValueDictionary()

    def __bool__(self) -> bool:
        """Whether there are any."""
        return bool(self._roots)

    def loading(self, tenant: str, name: str) -> asyncio.Lock:
        """Return the lock of a tenant's name: whoever loads or unloads it holds it."""
        return self._locks.setdefault((tenant, name), asyncio.Lock())

    def open_adapter(self, path: str) -> dict[FileName, FolderFile]:
        """Open the files of the adapter in a folder, by name; task.json only if it is there.

        Blocks: call it in a thread. `path` is absolute, or begins at a root. What is returned must
        be closed.

        Raises: InvalidRequest (it lies outside), NotFound (there is no adapter).
        """
        folders = [(root, self._below(root, path)) for root in self._roots]
        if all(folder is None for _, folder in folders):
            raise InvalidRequest(
                f"lora_path: {path[:200]!r} is not in a folder that adapters are loaded from "
                "(--lora-root)",
                param="lora_path",
            )
        for root, folder in folders:
            if folder is not None:
                with suppress(OSError):
                    return self._open_files(root, folder)
        raise NotFound(
            f"No adapter found for {path[:200]!r}: the folder must be there and hold readable "
            f"files {' and '.join(_NEEDED)}; other formats of weights are not read",
            code="adapter_not_found",
            param="lora_path",
        )

    def _below(self, root: Path, path: str | Path) -> Path | None:
        """Return what a path means, links resolved; None when it is not under a root."""
        try:
            real = Path(self._resolve(root / path))
        except (OSError, ValueError):
            return None
        return real if real.is_relative_to(root) else None

    def _open_files(self, root: Path, folder: Path) -> dict[FileName, FolderFile]:
        """Open what an adapter's folder holds. Raises OSError."""
        files: dict[FileName, FolderFile] = {}
        try:
            for name in _NEEDED:
                files[name] = self._open_file(root, folder / name)
            with suppress(FileNotFoundError):
                files[_TASK] = self._open_file(root, folder / _TASK)
        except BaseException:
            for file in files.values():
                file.close()
            raise
        return files

    def _open_file(self, root: Path, path: Path) -> FolderFile:
        """Open a regular file; a link is followed while it stays under the root. Raises OSError."""
        real = self._below(root, path)
        if real is None:
            raise PermissionError(path.name)
        *between, last = real.relative_to(root).parts
        with _opened(root, between) as folder:
            descriptor = os.open(last, _FILE, dir_fd=folder)
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise PermissionError(last)
        return FolderFile(descriptor)


@contextmanager
def _opened(root: Path, parts: Sequence[str]) -> Iterator[int]:
    """Open a folder under a root, following no link; give its descriptor. Raises OSError."""
    descriptor = os.open(root, _FOLDER)
    try:
        for part in parts:
            inner = os.open(part, _FOLDER, dir_fd=descriptor)
            os.close(descriptor)
            descriptor = inner
        yield descriptor
    finally:
        os.close(descriptor)
