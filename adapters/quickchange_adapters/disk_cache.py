"""Local copies of blobs that are kept elsewhere, under a ceiling of bytes.

| a copy is | then |
|---|---|
| being fetched | whoever else wants it waits for the one fetch |
| leased | it stays |
| idle | it goes when room is needed, least recently used first |
| left by an earlier process | it counts, and is read through once before it is believed |

    FOLDER/lock                 held while the process lives; a second process takes FOLDER.1
    FOLDER/incoming, blobs      as in a store in a folder (store.py)

A copy appears by a rename after its sha256 was found right. Nothing here is lost that cannot be
fetched again.
"""

import fcntl
import hashlib
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Protocol

from quickchange_adapters.errors import BlobDamaged, BlobMissing, StoreFull, StoreUnavailable
from quickchange_adapters.store import (
    CacheCounts,
    LocalStore,
    StagedFile,
    StagingWriter,
    unavailable,
)

MAX_PROCESSES = 64
ROOM_S = 30.0
FETCH_S = 1800.0
BLOCK_BYTES = 1 << 20


class BlobSource(Protocol):
    """Where blobs are fetched from. Both methods raise BlobMissing and StoreUnavailable."""

    def size(self, sha256: str) -> int:
        """Return how many bytes a blob has."""

    def read(self, sha256: str, num_bytes: int) -> Iterator[bytes]:
        """Yield a blob's bytes."""

    def suspect(self, sha256: str) -> None:
        """Take note that what was read has another sha256."""


@dataclass(slots=True)
class _Copy:
    """One blob's place in the cache. `filling` ends when its file may be read."""

    num_bytes: int = 0
    num_leases: int = 0
    is_unwanted: bool = False
    filling: "Future[None] | None" = field(default=None)


class DiskCache:
    """Copies of a source's blobs in a folder. Safe to call from any thread.

    `room_s`: how long a fetch waits until leased copies make room.
    """

    def __init__(
        self, folder: Path, max_bytes: int, source: BlobSource, room_s: float = ROOM_S
    ) -> None:
        self._max_bytes = max_bytes
        self._source = source
        self._room_s = room_s
        self._changed = threading.Condition()
        self._copies: OrderedDict[str, _Copy] = OrderedDict()
        self._num_hits = self._num_misses = self._num_evictions = 0
        with unavailable("the store's cache cannot be opened"):
            self._folder, self._lock_file = _take_folder(folder)
        self._local = LocalStore(self._folder)
        self._local.sweep_incoming(0)
        self._adopt_left_copies()

    @property
    def num_bytes(self) -> int:
        """Bytes of all copies, those that are being fetched included."""
        with self._changed:
            return sum(copy.num_bytes for copy in self._copies.values())

    def counts(self) -> CacheCounts:
        """Return how it does. Never waits."""
        num_bytes = sum(copy.num_bytes for copy in list(self._copies.values()))
        events = self._num_hits, self._num_misses, self._num_evictions
        return CacheCounts(num_bytes, self._max_bytes, *events)

    def close(self) -> None:
        """Let another process have the folder."""
        self._lock_file.close()

    def holds(self, sha256: str) -> bool:
        """Whether a copy is here now. Never waits."""
        copy = self._copies.get(sha256)
        return copy is not None and (copy.filling is None or copy.filling.done())

    def stage(self, max_bytes: int) -> StagingWriter:
        """Open a writer in the cache's folder; beyond the ceiling it raises BlobTooLarge."""
        return self._local.stage(min(max_bytes, self._max_bytes))

    def discard(self, staged: StagedFile) -> None:
        """Forget staged bytes; a repeat is a no-op."""
        self._local.discard(staged)

    def sweep_incoming(self, older_than_s: float) -> int:
        """Remove what was staged and left that long ago."""
        return self._local.sweep_incoming(older_than_s)

    @contextmanager
    def lease(self, sha256: str) -> Iterator[Path]:
        """Give a blob's file, which stays while the block runs; fetch it if it is not here.

        Raises: BlobMissing, StoreUnavailable, StoreFull.
        """
        copy, path = self._leased_file(sha256)
        try:
            yield path
        finally:
            self._release(sha256, copy)

    def adopt(self, staged: StagedFile) -> None:
        """Keep bytes that the source has too, if there is room. Uses `staged` up."""

        def put(copy: _Copy) -> None:
            self._make_room(copy, staged.num_bytes, wait_s=0)
            self._local.put(staged)

        try:
            self._release(staged.sha256, self._lease(staged.sha256, put))
        finally:
            self._local.discard(staged)

    def drop(self, sha256: str) -> int:
        """Remove a copy, or see that it goes when its last lease ends; return the bytes freed."""
        with self._changed:
            copy = self._copies.get(sha256)
            if copy is None:
                return 0
            copy.is_unwanted = True
            return self._remove_if_idle(sha256, copy)

    def _leased_file(self, sha256: str) -> tuple[_Copy, Path]:
        """Return a leased copy and its file; one that somebody took away is fetched again."""
        self._count_read(is_hit=self.holds(sha256))
        copy = self._lease(sha256, lambda copy: self._verify_or_fetch(sha256, copy))
        try:
            return copy, self._touched(sha256)
        except BlobMissing:
            with self._changed:
                if self._copies.get(sha256) is copy:
                    del self._copies[sha256]
        copy = self._lease(sha256, lambda copy: self._verify_or_fetch(sha256, copy))
        return copy, self._touched(sha256)

    def _count_read(self, *, is_hit: bool) -> None:
        with self._changed:
            self._num_hits += is_hit
            self._num_misses += not is_hit

    def _touched(self, sha256: str) -> Path:
        """Return a copy's file; its time says when it was last used, also to a later process."""
        path = self._local.path(sha256)
        with suppress(OSError):
            os.utime(path)
        return path

    def _lease(self, sha256: str, fill: Callable[[_Copy], None]) -> _Copy:
        """Return a copy that is filled, with one lease more. One caller fills it, others wait."""
        with self._changed:
            copy = self._copies.setdefault(sha256, _Copy())
            self._copies.move_to_end(sha256)
            copy.num_leases += 1
            copy.is_unwanted = False
            filling, is_mine = copy.filling, copy.filling is None
            if filling is None:
                filling = copy.filling = Future()
        try:
            if is_mine:
                self._fill(sha256, copy, filling, fill)
            else:
                _wait(filling)
        except BaseException:
            self._release(sha256, copy)
            raise
        return copy

    def _fill(
        self, sha256: str, copy: _Copy, filling: "Future[None]", fill: Callable[[_Copy], None]
    ) -> None:
        try:
            fill(copy)
        except BaseException as error:
            with self._changed, suppress(StoreUnavailable):
                if self._copies.get(sha256) is copy:
                    del self._copies[sha256]
                    self._local.delete(sha256)
            filling.set_exception(error)
            raise
        filling.set_result(None)

    def _release(self, sha256: str, copy: _Copy) -> None:
        with self._changed:
            copy.num_leases -= 1
            self._changed.notify_all()
            if copy.is_unwanted:
                with suppress(StoreUnavailable):
                    self._remove_if_idle(sha256, copy)

    def _remove_if_idle(self, sha256: str, copy: _Copy) -> int:
        """Remove a copy that nobody reads. The lock is held."""
        if copy.num_leases or self._copies.get(sha256) is not copy:
            return 0
        num_bytes = self._local.delete(sha256)
        del self._copies[sha256]
        self._changed.notify_all()
        return num_bytes

    def _verify_or_fetch(self, sha256: str, copy: _Copy) -> None:
        """Fill a copy: believe the file of an earlier process if its bytes are right."""
        if copy.num_bytes:
            if _has_sha256(self._local.path(sha256), sha256):
                return
            self._local.delete(sha256)
        num_bytes = self._source.size(sha256)
        self._make_room(copy, num_bytes, self._room_s)
        for _ in range(2):
            if self._fetch(sha256, num_bytes):
                return
        self._source.suspect(sha256)
        raise BlobDamaged(sha256)

    def _fetch(self, sha256: str, num_bytes: int) -> bool:
        """Read a blob into its file; False when its bytes are not those of its name."""
        try:
            with self._local.stage(num_bytes) as writer:
                for chunk in self._source.read(sha256, num_bytes):
                    writer.write(chunk)
                staged = writer.finish()
        except StoreFull as error:
            raise StoreFull("the disk of the store's cache is full") from error
        if staged.sha256 != sha256:
            self._local.discard(staged)
            return False
        self._local.put(staged)
        return True

    def _make_room(self, copy: _Copy, num_bytes: int, wait_s: float) -> None:
        """Evict idle copies until one of `num_bytes` fits, and count it.

        Raises: StoreUnavailable when leased copies leave no room for it.
        """
        if num_bytes > self._max_bytes:
            raise StoreUnavailable(
                f"a file of {num_bytes} bytes does not fit into the store's cache of "
                f"{self._max_bytes}: raise --store-cache-bytes"
            )
        deadline_s = time.monotonic() + wait_s
        with self._changed:
            copy.num_bytes = 0
            while not self._evict_for(num_bytes):
                left_s = deadline_s - time.monotonic()
                if left_s <= 0:
                    raise StoreUnavailable(
                        "the store's cache is full of files that are being read: "
                        "raise --store-cache-bytes"
                    )
                self._changed.wait(left_s)
            copy.num_bytes = num_bytes

    def _evict_for(self, num_bytes: int) -> bool:
        """Remove idle copies, oldest use first, until `num_bytes` fit. The lock is held."""
        excess = sum(copy.num_bytes for copy in self._copies.values()) + num_bytes
        excess -= self._max_bytes
        for sha256, copy in list(self._copies.items()):
            if excess <= 0:
                break
            if not copy.num_leases:
                self._remove_if_idle(sha256, copy)
                self._num_evictions += 1
                excess -= copy.num_bytes
        return excess <= 0

    def _adopt_left_copies(self) -> None:
        """Count what an earlier process left, by the time it was written; evict the excess."""
        found = sorted(self._local.list(), key=lambda blob: blob.modified_at or 0.0)
        for blob in found:
            self._copies[blob.sha256] = _Copy(blob.num_bytes)
        with self._changed:
            self._evict_for(0)


def _wait(filling: "Future[None]") -> None:
    try:
        filling.result(FETCH_S)
    except TimeoutError as error:
        raise StoreUnavailable("a file is still being fetched from the store") from error


def _has_sha256(path: Path, sha256: str) -> bool:
    found = hashlib.sha256()
    with unavailable("the store's cache cannot be read"), path.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            found.update(block)
    return found.hexdigest() == sha256


def _take_folder(folder: Path) -> tuple[Path, BinaryIO]:
    """Return the first of FOLDER, FOLDER.1, … that no living process holds, and its open lock."""
    for number in range(MAX_PROCESSES):
        mine = folder.with_name(f"{folder.name}.{number}") if number else folder
        mine.mkdir(parents=True, exist_ok=True)
        lock = (mine / "lock").open("ab")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
        else:
            return mine, lock
    raise StoreUnavailable(f"{MAX_PROCESSES} processes hold the store's cache")
