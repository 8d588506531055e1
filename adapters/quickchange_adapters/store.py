"""Bytes under their sha256, and nothing else: no names, no versions, no reference counts.

    root/
      incoming/<random>        being written; nobody's yet
      blobs/ab/abcd…           immutable, named by the sha256 of its bytes
      damaged/abcd…            what no longer had the bytes of its name, put aside

`put` is the step that makes bytes durable: after it returns they survive a crash.
"""

import errno
import fcntl
import hashlib
import os
import re
import secrets
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Literal, Protocol, Self

from quickchange_adapters.disk import Disk
from quickchange_adapters.errors import BlobMissing, BlobTooLarge, StoreFull, StoreUnavailable
from quickchange_adapters.fault_points import step

_SHA256 = re.compile(r"[0-9a-f]{64}")
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


@dataclass(frozen=True, slots=True)
class StagedFile:
    """Bytes that arrived, with their sha256 (hex); give them to `put` or to `discard`.

    `file`, while it is open, keeps every process's sweep off the path, however old it gets.
    """

    path: Path
    sha256: str
    num_bytes: int
    file: BinaryIO | None = field(default=None, repr=False, compare=False)


@dataclass(frozen=True, slots=True)
class BlobInfo:
    """One blob as `list` shows it; `modified_at` in seconds since 1970, None when unknown."""

    sha256: str
    num_bytes: int
    modified_at: float | None = None


@dataclass(frozen=True, slots=True)
class CacheCounts:
    """What a cache of files holds, and what happened since it was opened."""

    num_bytes: int
    max_bytes: int
    num_hits: int
    num_misses: int
    num_evictions: int


Tier = Literal["remote", "disk"]
"""Where a store keeps its blobs: elsewhere, or on this machine's disk."""


class Store(Protocol):
    """Where the bytes of versions live. Methods block; call them off the event loop.

    Every method raises StoreUnavailable when the place does not answer.
    """

    tier: Tier

    @property
    def is_up(self) -> bool:
        """Whether what is elsewhere answered when it was last asked."""

    def check_writable(self) -> None:
        """Say now, rather than at the first upload, that nothing can be written here.

        Raises: StoreUnavailable.
        """

    def stage(self, max_bytes: int) -> "StagingWriter":
        """Open a writer for bytes to come."""

    def put(self, staged: StagedFile) -> None:
        """Keep staged bytes as a blob, durably; a repeat is a no-op. Uses `staged` up.

        They replace what is there, so that sending a damaged blob's bytes again heals it.
        """

    def discard(self, staged: StagedFile) -> None:
        """Forget staged bytes; a repeat is a no-op."""

    def path(self, sha256: str) -> Path:
        """Return a local file with the blob's bytes; to read it, `lease` it.

        Raises: BlobMissing.
        """

    def lease(self, sha256: str) -> AbstractContextManager[Path]:
        """Give a local file with the blob's bytes, which stays while the block runs.

        Raises: BlobMissing.
        """

    def is_on_disk(self, sha256: str) -> bool:
        """Whether a lease would find the bytes on this machine. Never waits."""

    def cache_counts(self) -> CacheCounts | None:
        """Return how the cache does; None if there is none. Never waits."""

    def evict(self, sha256: str) -> int:
        """Remove a copy of what is kept elsewhere; return the bytes that this machine got back."""

    def delete(self, sha256: str) -> int:
        """Remove a blob and return its size; 0 when there is none."""

    def list(self) -> Iterator[BlobInfo]:
        """Yield every blob, in no order."""

    def sweep_incoming(self, older_than_s: float) -> int:
        """Remove what was staged and left that long ago; return how many files."""

    def close(self) -> None:
        """Let go of what other processes might want. Nothing is asked of it afterwards."""


class StagingWriter:
    """A temporary file that hashes what is written to it.

    Leaving the `with` block without `finish` removes the file.
    """

    def __init__(self, path: Path, max_bytes: int, disk: Disk) -> None:
        self._path = path
        self._max_bytes = max_bytes
        self._disk = disk
        self._sha256 = hashlib.sha256()
        self._num_bytes = 0
        self._file = disk.create(path)
        self._is_finished = False
        with suppress(OSError):  # a file system without locks has the file's age alone
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def write(self, chunk: bytes) -> None:
        """Append bytes.

        Raises: BlobTooLarge, StoreUnavailable.
        """
        self._num_bytes += len(chunk)
        if self._num_bytes > self._max_bytes:
            raise BlobTooLarge(self._max_bytes)
        self._sha256.update(chunk)
        with unavailable("an upload cannot be written"):
            self._disk.write(self._file, chunk)

    def finish(self) -> StagedFile:
        """Bring the bytes to the disk and say what they are.

        Raises: StoreUnavailable.
        """
        with unavailable("an upload cannot be written"), step("stage.sync"):
            self._disk.sync_file(self._file)
        self._is_finished = True
        return StagedFile(self._path, self._sha256.hexdigest(), self._num_bytes, self._file)

    def abort(self) -> None:
        """Remove what was written; a no-op after `finish`."""
        if not self._is_finished:
            # The name goes first: closing may flush, and a full disk must not keep the file.
            # What cannot be removed now is swept later.
            with suppress(OSError):
                self._disk.remove(self._path)
            with suppress(OSError):
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
    """A store in a folder; `incoming` and `blobs` lie in the same file system.

    `disk` may be replaced by one that watches or fails.
    """

    tier: Tier = "disk"
    is_up = True

    def __init__(self, root: Path, disk: Disk | None = None) -> None:
        self._disk = disk or Disk()
        self._incoming = root / "incoming"
        self._blobs = root / "blobs"
        self._damaged = root / "damaged"
        with unavailable("the store cannot be opened"):
            for folder in (self._incoming, self._blobs):
                self._make_folders(folder)
            self._disk.sync_folder(root)

    def check_writable(self) -> None:
        """Say now, rather than at the first upload, that nothing can be written here.

        Raises: StoreUnavailable.
        """
        for folder in (self._incoming, self._blobs):
            if not os.access(folder, os.W_OK | os.X_OK):
                raise StoreUnavailable(f"the store's folder {folder.name!r} cannot be written to")

    def stage(self, max_bytes: int) -> StagingWriter:
        """Open a writer for bytes to come."""
        with unavailable("an upload cannot be written"):
            path = self._incoming / secrets.token_hex(16)
            return StagingWriter(path, max_bytes, self._disk)

    def put(self, staged: StagedFile) -> None:
        """Rename staged bytes to their digest; the folders are synced before it returns."""
        target = self._path(staged.sha256)
        with unavailable("the store cannot be written"):
            self._disk.make_folder(target.parent)
            with step("put.rename"):
                self._rename_once(staged.path, target)
            with step("put.sync"):
                self._disk.sync_folder(target.parent)
                self._disk.sync_folder(self._blobs)
            _close(staged)

    def discard(self, staged: StagedFile) -> None:
        """Remove staged bytes; a repeat is a no-op."""
        with unavailable("the store cannot be written"):
            with suppress(FileNotFoundError):
                self._disk.remove(staged.path)
            _close(staged)

    def path(self, sha256: str) -> Path:
        """Return the blob's file."""
        path = self._path(sha256)
        with unavailable("the store cannot be read"):
            if not path.is_file():
                raise BlobMissing(sha256)
        return path

    def lease(self, sha256: str) -> AbstractContextManager[Path]:
        """Give the blob's file. Nothing but a delete takes it away."""
        return nullcontext(self.path(sha256))

    def is_on_disk(self, sha256: str) -> bool:
        """Say yes: the blobs are nowhere else."""
        return True

    def cache_counts(self) -> None:
        """Have no cache."""

    def evict(self, sha256: str) -> int:
        """Remove nothing: there are no copies."""
        return 0

    def delete(self, sha256: str) -> int:
        """Remove a blob and return its size; 0 when there is none."""
        path = self._path(sha256)
        with unavailable("the store cannot be written"):
            try:
                num_bytes = path.stat().st_size
                with step("delete.remove"):
                    self._disk.remove(path)
            except FileNotFoundError:
                return 0
            with step("delete.sync"):
                self._disk.sync_folder(path.parent)
        return num_bytes

    def set_aside(self, sha256: str) -> Path:
        """Move a damaged blob out of the way, so that its bytes may be put anew; return its file.

        Raises: BlobMissing.
        """
        path, target = self.path(sha256), self._damaged / sha256
        with unavailable("the store cannot be written"):
            self._make_folders(self._damaged)
            self._disk.rename(path, target)
            self._disk.sync_folder(self._damaged)
            self._disk.sync_folder(path.parent)
        return target

    def list(self) -> Iterator[BlobInfo]:
        """Yield every blob; files with other names are not ours and are left out."""
        with unavailable("the store cannot be read"):
            for path in self._blobs.glob("??/*"):
                if _SHA256.fullmatch(path.name):
                    with suppress(FileNotFoundError):  # deleted since the folder was read
                        found = path.stat()
                        yield BlobInfo(path.name, found.st_size, found.st_mtime)

    def sweep_incoming(self, older_than_s: float) -> int:
        """Remove staged files that nobody has written to for so long, and that nobody holds."""
        left = self.list_incoming(older_than_s)
        with unavailable("the store cannot be written"):
            for path in left:
                with suppress(FileNotFoundError):
                    self._disk.remove(path)
        return len(left)

    def list_incoming(self, older_than_s: float) -> tuple[Path, ...]:
        """Return what `sweep_incoming` would remove."""
        with unavailable("the store cannot be read"):
            return tuple(p for p in self._incoming.iterdir() if _is_left(p, older_than_s))

    def close(self) -> None:
        """Do nothing: any number of processes may use a folder."""

    def _rename_once(self, source: Path, target: Path) -> None:
        try:
            self._disk.rename(source, target)
        except FileNotFoundError:
            if not target.is_file():
                raise

    def _make_folders(self, folder: Path) -> None:
        """Make a folder and those above it, each with its entry on the disk."""
        missing = [each for each in (folder, *folder.parents) if not each.exists()]
        for each in reversed(missing):
            self._disk.make_folder(each)
            self._disk.sync_folder(each.parent)
        folder.mkdir(exist_ok=True)  # says so when something else has that name

    def _path(self, sha256: str) -> Path:
        if not _SHA256.fullmatch(sha256):
            raise BlobMissing(sha256)
        return self._blobs / sha256[:2] / sha256


def _is_left(path: Path, older_than_s: float) -> bool:
    """Whether a staged file is old, and no living process of this machine holds it."""
    try:
        if time.time() - path.stat().st_mtime < older_than_s:
            return False
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (FileNotFoundError, BlockingIOError):
        return False
    except OSError as error:
        return error.errno in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)
    return True


def _close(staged: StagedFile) -> None:
    """Let go of a staged file; its bytes were synced, so that closing says nothing new."""
    if staged.file is not None:
        with suppress(OSError):
            staged.file.close()


@contextmanager
def unavailable(what: str) -> Iterator[None]:
    """Turn an operating system's error into StoreUnavailable; its text names no path.

    Raises: StoreFull when there is no room; StoreUnavailable.
    """
    try:
        yield
    except OSError as error:
        kind = StoreFull if error.errno in _FULL else StoreUnavailable
        raise kind(f"{what}: {error.strerror or type(error).__name__}") from error
