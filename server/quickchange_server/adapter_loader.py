"""Bring versions from their files into the engine and out of it, one thing at a time per digest.

| what comes together | what happens |
|---|---|
| several requests for one cold version | one load; all wait for it |
| a request while its version drains for an unload | waits, then loads again |
| a request while its version drains for a deletion | waits, then gets NotFound |
"""

import asyncio
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from weakref import WeakValueDictionary

import torch
from quickchange_adapters.errors import AdapterRefused, BlobMissing, StoreUnavailable
from quickchange_adapters.records import VersionRecord
from quickchange_adapters.weights import AdapterWeights

from quickchange_server.engine.interface import GenerationEngine, MergeResult, ResidentAdapter
from quickchange_server.errors import Conflict, NotFound, Unavailable
from quickchange_server.shared_tasks import SharedTasks

DRAIN_POLL_S = 60.0


class AdapterLoader:
    """Loads, merges and unloads versions.

    `read` gives a version's tensors (it blocks; it runs in a loader thread); `is_served` says
    whether anybody may still ask for a digest.
    """

    def __init__(
        self,
        engine: GenerationEngine,
        read: Callable[[VersionRecord], AdapterWeights],
        is_served: Callable[[str], bool],
    ) -> None:
        self._engine = engine
        self._read = read
        self._is_served = is_served
        self._threads = ThreadPoolExecutor(2, "quickchange-adapter", _use_one_thread)
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._loads: SharedTasks[None] = SharedTasks()
        self._unloads: SharedTasks[ResidentAdapter | None] = SharedTasks()

    async def stop(self) -> None:
        """Give up what is under way."""
        await self._loads.stop()
        await self._unloads.stop()
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def load(self, version: VersionRecord) -> None:
        """Make sure that the engine holds a version.

        Raises: NotFound, Conflict, Unavailable.
        """
        if not self._engine.is_loaded(version.digest):
            await self._loads.run(version.digest, lambda: self._load(version))

    async def merge(self, version: VersionRecord) -> MergeResult:
        """Load a version and make its merged copy.

        Raises: MergeBudgetExceeded, and what `load` raises.
        """
        async with self._lock(version.digest):
            await self._ensure(version)
            return await self._engine.merge(version.digest)

    async def unmerge(self, digest: str) -> MergeResult:
        """Drop a merged copy."""
        async with self._lock(digest):
            return await self._engine.unmerge(digest)

    async def unload(self, digest: str, timeout_s: float | None) -> ResidentAdapter | None:
        """Drain a version and free its memory; None: wait as long as it takes.

        Raises: TimeoutError; the unload goes on.
        """
        task = self._unloads.start(digest, lambda: self._unload(digest))
        return await asyncio.wait_for(asyncio.shield(task), timeout_s)

    async def _load(self, version: VersionRecord) -> None:
        async with self._lock(version.digest):
            await self._ensure(version)

    async def _ensure(self, version: VersionRecord) -> None:
        """Load a version unless it is there; the digest's lock is held."""
        if self._engine.is_loaded(version.digest):
            return
        if not self._is_served(version.digest):
            raise NotFound(f"{version.name!r} was deleted", code="model_not_found", param="model")
        loop = asyncio.get_running_loop()
        with _as_answers(version):
            weights = await loop.run_in_executor(self._threads, self._read, version)
        await self._engine.load_adapter(weights)

    async def _unload(self, digest: str) -> ResidentAdapter | None:
        async with self._lock(digest):
            if not self._engine.is_loaded(digest):
                return None
            while True:
                try:
                    return await self._engine.unload_adapter(digest, DRAIN_POLL_S)
                except TimeoutError:
                    continue

    def _lock(self, digest: str) -> asyncio.Lock:
        lock = self._locks.get(digest)
        if lock is None:
            lock = self._locks[digest] = asyncio.Lock()
        return lock


@contextmanager
def _as_answers(version: VersionRecord) -> Iterator[None]:
    """Turn what reading a version's files may raise into answers; none carries a path."""
    try:
        yield
    except AdapterRefused as error:
        first = error.problems[0]
        raise Conflict(
            f"{version.name}:{version.number} does not fit this base: {first.message}",
            code="base_mismatch",
        ) from error
    except (BlobMissing, StoreUnavailable) as error:
        raise Unavailable(str(error), code="store_unavailable") from error
    except OSError as error:
        raise Unavailable(
            f"the files of {version.name}:{version.number} cannot be read: {error.strerror}",
            code="store_unavailable",
        ) from error


def _use_one_thread() -> None:
    """Keep torch's pool for the engine's thread."""
    torch.set_num_threads(1)
