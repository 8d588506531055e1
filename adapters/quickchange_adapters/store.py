"""Bytes under their sha256, and nothing else: no names, no versions, no reference counts.

    root/
      incoming/<random>        being written; nobody's yet
      blobs/ab/abcd…           immutable, named by the sha256 of its bytes

`put` is the step that makes bytes durable: after it returns they survive a crash.
"""

import hashlib
import os
import re
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Protocol, Self

from quickchange_adapters.errors import BlobMissing, BlobTooLarge, StoreUnavailable

_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class StagedFile:
    """Bytes that arrived, with their sha256 (hex); give them to `put` or to `discard`."""

    path: Path
    sha256: str
    num_bytes: int


@dataclass(frozen=True, slots=True)
class BlobInfo:
    """One blob as `list` shows it."""

    sha256: str
    num_bytes: int


class Store(Protocol):
    """Where the bytes of versions live. Methods block; call them off the event loop.

    Every method raises StoreUnavailable when the place does not answer.
    """

    def stage(self, max_bytes: int) -> "StagingWriter":
        """Open a writer for bytes to come."""

    def put(self, staged: StagedFile) -> None:
        """Keep staged bytes as a blob, durably; a repeat is a no-op. Uses `staged` up."""

    def discard(self, staged: StagedFile) -> None:
        """Forget staged bytes; a repeat is a no-op."""

    def path(self, sha256: str) -> Path:
        """Return a local file with the blob's bytes.

        Raises: BlobMissing.
        """

    def delete(self, sha256: str) -> int:
        """Remove a blob and return its size; 0 when there is none."""

    def list(self) -> Iterator[BlobInfo]:
        """Yield every blob, in no order."""

    def sweep_incoming(self, older_than_s: float) -> int:
        """Remove what was staged and left that long ago; return how many files."""


class StagingWriter:
    """A temporary file that hashes what is written to it.

    Leaving the `with` block without `finish` removes the file.
    """

    def __init__(self, path: Path, max_bytes: int) -> None:
        self._path = path
        self._max_bytes = max_bytes
        self._sha256 = hashlib.sha256()
        self._num_bytes = 0
        self._file: BinaryIO = path.open("xb")
        self._is_finished = False

    def write(self, chunk: bytes) -> None:
        """Append bytes.

        Raises: BlobTooLarge, StoreUnavailable.
        """
        self._num_bytes += len(chunk)
        if self._num_bytes > self._max_bytes:
            raise BlobTooLarge(self._max_bytes)
        self._sha256.update(chunk)
        with unavailable("an upload cannot be written"):
            self._file.write(chunk)

    def finish(self) -> StagedFile:
        """Bring the bytes to the disk and say what they are.

        Raises: StoreUnavailable.
        """
        with unavailable("an upload cannot be written"):
            self._file.flush()
            os.fsync(self._file.fileno())
        self._file.close()
        self._is_finished = True
        return StagedFile(self._path, self._sha256.hexdigest(), self._num_bytes)

    def abort(self) -> None:
        """Remove what was written; a no-op after `finish`."""
        if not self._is_finished:
            # The descriptor goes first: closing may flush, and a full disk must not keep the file.
            self._path.unlink(missing_ok=True)
            with _ignored_close():
                self._file.close()

    def __enter__(self) -> Self:
        """Return the writer."""
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Remove what was not finished."""
        self.abort()


class LocalStore:
    """A store in a folder; `incoming` and `blobs` lie in the same file system."""

    def __init__(self, root: Path) -> None:
        self._incoming = root / "incoming"
        self._blobs = root / "blobs"
        with unavailable("the store cannot be opened"):
            self._incoming.mkdir(parents=True, exist_ok=True)
            self._blobs.mkdir(parents=True, exist_ok=True)
            sync_folder(root)

    def stage(self, max_bytes: int) -> StagingWriter:
        """Open a writer for bytes to come."""
        with unavailable("an upload cannot be written"):
            return StagingWriter(self._incoming / secrets.token_hex(16), max_bytes)

    def put(self, staged: StagedFile) -> None:
        """Rename staged bytes to their digest; the folders are synced before it returns."""
        target = self._path(staged.sha256)
        with unavailable("the store cannot be written"):
            if target.exists():
                staged.path.unlink(missing_ok=True)
            else:
                target.parent.mkdir(exist_ok=True)
                os.replace(staged.path, target)
            sync_folder(target.parent)
            sync_folder(self._blobs)

    def discard(self, staged: StagedFile) -> None:
        """Remove staged bytes; a repeat is a no-op."""
        with unavailable("the store cannot be written"):
            staged.path.unlink(missing_ok=True)

    def path(self, sha256: str) -> Path:
        """Return the blob's file."""
        path = self._path(sha256)
        with unavailable("the store cannot be read"):
            if not path.is_file():
                raise BlobMissing(sha256)
        return path

    def delete(self, sha256: str) -> int:
        """Remove a blob and return its size; 0 when there is none."""
        path = self._path(sha256)
        with unavailable("the store cannot be written"):
            try:
                num_bytes = path.stat().st_size
                path.unlink()
            except FileNotFoundError:
                return 0
            sync_folder(path.parent)
        return num_bytes

    def list(self) -> Iterator[BlobInfo]:
        """Yield every blob; files with other names are not ours and are left out."""
        with unavailable("the store cannot be read"):
            for path in self._blobs.glob("??/*"):
                if _SHA256.fullmatch(path.name):
                    yield BlobInfo(path.name, path.stat().st_size)

    def sweep_incoming(self, older_than_s: float) -> int:
        """Remove staged files that nobody has written to for so long."""
        num_removed = 0
        with unavailable("the store cannot be read"):
            for path in self._incoming.iterdir():
                if time.time() - path.stat().st_mtime >= older_than_s:
                    path.unlink(missing_ok=True)
                    num_removed += 1
        return num_removed

    def _path(self, sha256: str) -> Path:
        if not _SHA256.fullmatch(sha256):
            raise BlobMissing(sha256)
        return self._blobs / sha256[:2] / sha256


def sync_folder(folder: Path) -> None:
    """Bring a folder's entries to the disk, so that a rename in it survives a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def unavailable(what: str) -> Iterator[None]:
    """Turn an operating system's error into StoreUnavailable; its text names no path."""
    try:
        yield
    except OSError as error:
        raise StoreUnavailable(f"{what}: {error.strerror or type(error).__name__}") from error


@contextmanager
def _ignored_close() -> Iterator[None]:
    """Swallow what closing an unlinked file may say: its bytes are not wanted."""
    try:
        yield
    except OSError:
        return
