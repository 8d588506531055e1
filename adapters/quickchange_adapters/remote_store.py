"""A store whose blobs are kept elsewhere, with copies on this machine's disk.

An upload is written to the disk first, then sent in one go; a blob that is read comes through the
cache. So whoever asks for a file gets a local one, as from a store in a folder.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, suppress
from pathlib import Path

from quickchange_adapters.disk_cache import DiskCache
from quickchange_adapters.errors import StoreUnavailable
from quickchange_adapters.object_blobs import ObjectBlobs
from quickchange_adapters.store import BlobInfo, CacheCounts, StagedFile, StagingWriter, Tier


class RemoteStore:
    """Implements `Store`: bytes in an object store, copies in a cache."""

    tier: Tier = "remote"

    def __init__(self, blobs: ObjectBlobs, cache: DiskCache) -> None:
        self._blobs = blobs
        self._cache = cache

    def check_writable(self) -> None:
        """Say now that the place is not there, not ours, or does not answer.

        Raises: StoreRefused; StoreUnavailable when it does not answer.
        """
        self._blobs.check()

    @property
    def is_up(self) -> bool:
        """Whether the object store answered when it was last asked."""
        return self._blobs.is_up

    def stage(self, max_bytes: int) -> StagingWriter:
        """Open a writer on this machine's disk; the cache's ceiling is a limit too."""
        return self._cache.stage(max_bytes)

    def put(self, staged: StagedFile) -> None:
        """Send staged bytes, and keep a copy here if there is room."""
        self._blobs.put(staged.sha256, staged.path, staged.num_bytes)
        with suppress(StoreUnavailable):  # the bytes are safe where they belong
            self._cache.adopt(staged)

    def discard(self, staged: StagedFile) -> None:
        """Forget staged bytes; a repeat is a no-op."""
        self._cache.discard(staged)

    def path(self, sha256: str) -> Path:
        """Return a local file with the blob's bytes, which may be evicted later; see `lease`."""
        with self._cache.lease(sha256) as path:
            return path

    def lease(self, sha256: str) -> AbstractContextManager[Path]:
        """Give a local file that stays while the block runs."""
        return self._cache.lease(sha256)

    def is_on_disk(self, sha256: str) -> bool:
        """Whether a copy is on this machine now. Never waits."""
        return self._cache.holds(sha256)

    def cache_counts(self) -> CacheCounts:
        """Return how the cache does."""
        return self._cache.counts()

    def evict(self, sha256: str) -> int:
        """Remove this machine's copy, and return the bytes that it gave back."""
        return self._cache.drop(sha256)

    def delete(self, sha256: str) -> int:
        """Remove a blob, and the copy of it that is here; return the blob's size."""
        self._cache.drop(sha256)
        return self._blobs.delete(sha256)

    def list(self) -> Iterator[BlobInfo]:
        """Yield every blob of the object store."""
        return self._blobs.list()

    def sweep_incoming(self, older_than_s: float) -> int:
        """Remove what was staged on this machine and left."""
        return self._cache.sweep_incoming(older_than_s)

    def close(self) -> None:
        """Let another process have the cache."""
        self._cache.close()
