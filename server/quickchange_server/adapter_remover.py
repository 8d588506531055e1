"""The end of versions: out of the engine when their last request ended, then off the disk."""

import asyncio
import logging
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial

from quickchange_adapters.records import VersionRecord
from quickchange_adapters.store import Store

from quickchange_server.adapter_directory import AdapterDirectory
from quickchange_server.adapter_loader import AdapterLoader
from quickchange_server.adapter_views import FreedBytes
from quickchange_server.errors import Unavailable
from quickchange_server.live_catalog import LiveCatalog
from quickchange_server.shared_tasks import SharedTasks
from quickchange_server.view_builder import freed_bytes

SWEEP_RETRY_S = 60.0
log = logging.getLogger(__name__)


class AdapterRemover:
    """Finishes deletions that the catalog has begun: nobody new can ask for these versions."""

    def __init__(
        self,
        store: Store,
        live: LiveCatalog,
        directory: AdapterDirectory,
        loader: AdapterLoader,
    ) -> None:
        self._store = store
        self._live = live
        self._directory = directory
        self._loader = loader
        self._drains: SharedTasks[FreedBytes] = SharedTasks()
        self._sweeps: SharedTasks[None] = SharedTasks()

    async def stop(self) -> None:
        """Leave what is under way to the next start."""
        await self._drains.stop()
        await self._sweeps.stop()

    async def resume(self) -> None:
        """Finish what an earlier process left; nothing of it can be loaded."""
        catalog = self._live.catalog
        for version in await self._live.ask(catalog.list_deleting):
            await self._live.ask(partial(catalog.purge, version))
        await self._collect()

    async def remove(self, gone: Sequence[VersionRecord], timeout_s: float) -> FreedBytes:
        """Drain versions, free their memory, remove their rows and bytes.

        Raises: TimeoutError when requests still run after `timeout_s`; it goes on. Unavailable.
        """
        key = ",".join(f"{version.tenant}/{version.name}:{version.number}" for version in gone)
        task = self._drains.start(key, lambda: self._drain(gone))
        return await asyncio.wait_for(asyncio.shield(task), timeout_s)

    async def _drain(self, gone: Iterable[VersionRecord]) -> FreedBytes:
        freed = FreedBytes()
        for version in gone:
            # The same bytes may serve under another name; then they stay where they are.
            if not self._directory.is_served(version.digest):
                freed += freed_bytes(await self._loader.unload(version.digest, None))
            await self._purge(version)
        return freed + await self._collect()

    async def _collect(self) -> FreedBytes:
        """Remove the bytes that nobody needs; what the store does not remove now, it does later."""
        freed: list[FreedBytes] = []
        try:
            await self._live.ask(lambda: self._live.catalog.collect(self._removing(freed)))
        except Unavailable as error:
            log.warning("bytes that nobody needs are left for now: %s", error)
            self._sweeps.start("sweep", self._sweep_later)
        return sum(freed, FreedBytes())

    def _removing(self, freed: list[FreedBytes]) -> Callable[[str], int]:
        """Return what removes a blob and notes what each tier got back. It runs in a thread."""

        def remove(sha256: str) -> int:
            freed.append(FreedBytes(disk=self._store.evict(sha256)))
            num_bytes = self._store.delete(sha256)
            is_remote = self._store.tier == "remote"
            freed.append(FreedBytes(remote=num_bytes) if is_remote else FreedBytes(disk=num_bytes))
            return num_bytes

        return remove

    async def _sweep_later(self) -> None:
        """Try until the store answers."""
        while True:
            await asyncio.sleep(SWEEP_RETRY_S)
            with suppress(Unavailable):
                await self._live.ask(lambda: self._live.catalog.collect(self._store.delete))
                return

    async def _purge(self, version: VersionRecord) -> None:
        catalog = self._live.catalog
        await self._live.change(version.tenant, version.name, lambda: catalog.purge(version))
