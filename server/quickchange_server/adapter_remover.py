"""The end of versions: out of the engine when their last request ended, then off the disk."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import partial

from quickchange_adapters.records import VersionRecord
from quickchange_adapters.store import Store

from quickchange_server.adapter_directory import AdapterDirectory
from quickchange_server.adapter_loader import AdapterLoader
from quickchange_server.adapter_views import FreedBytes
from quickchange_server.errors import QuickchangeError
from quickchange_server.live_catalog import LiveCatalog
from quickchange_server.shared_tasks import SharedTasks, in_time
from quickchange_server.view_builder import freed_bytes


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
        self._cut_short: dict[str, Sequence[VersionRecord]] = {}
        self._digests: Counter[str] = Counter()
        self._seen_deleting: set[tuple[str, str, int]] = set()

    async def stop(self) -> None:
        """Leave what is under way to the next start."""
        await self._drains.stop()

    async def resume(self) -> None:
        """End deletions that an earlier process began; the sweep removes their bytes."""
        catalog = self._live.catalog
        for version in await self._live.ask(catalog.list_deleting):
            await self._live.ask(partial(catalog.purge, version))

    async def end_forgotten(self) -> None:
        """End deletions of others that were there at the last call already: nobody else will.

        Whoever began them was killed, or drains requests that need neither row nor bytes.

        Raises: Unavailable.
        """
        found = await self._live.ask(self._live.catalog.list_deleting)
        others = {(v.tenant, v.name, v.number): v for v in found if not self.is_removing(v.digest)}
        for key in others.keys() & self._seen_deleting:
            await self._purge(others.pop(key))
        self._seen_deleting = set(others)

    async def remove(self, gone: Sequence[VersionRecord], timeout_s: float) -> FreedBytes:
        """Drain versions, free their memory, remove their rows and bytes.

        Raises: TimeoutError when requests still run after `timeout_s`; it goes on. Unavailable and
        StorageFull: `retry` ends it later.
        """
        key = ",".join(f"{version.tenant}/{version.name}:{version.number}" for version in gone)
        task = self._drains.start(key, lambda: self._end(key, gone))
        return await in_time(task, timeout_s)

    async def retry(self) -> None:
        """End what the store or the catalog cut short; one that fails again keeps no other.

        Raises: Unavailable, StorageFull.
        """
        errors: list[QuickchangeError] = []
        for key, gone in list(self._cut_short.items()):
            try:
                await self._drains.run(key, partial(self._end, key, gone))
            except QuickchangeError as error:
                errors.append(error)
        if errors:
            raise errors[0]

    async def _end(self, key: str, gone: Sequence[VersionRecord]) -> FreedBytes:
        self._cut_short.pop(key, None)
        try:
            return await self._drain(gone)
        except QuickchangeError:
            self._cut_short[key] = gone
            raise

    def is_removing(self, digest: str) -> bool:
        """Whether a version with these bytes is being removed by this process."""
        return self._digests[digest] > 0

    async def _drain(self, gone: Sequence[VersionRecord]) -> FreedBytes:
        digests = [version.digest for version in gone]
        self._digests.update(digests)
        try:
            return await self._drain_each(gone)
        finally:
            self._digests -= Counter(digests)

    async def _drain_each(self, gone: Iterable[VersionRecord]) -> FreedBytes:
        freed = FreedBytes()
        for version in gone:
            # The same bytes may serve under another name; then they stay where they are.
            if not self._directory.is_served(version.digest):
                freed += freed_bytes(await self._loader.unload(version.digest, None))
            await self._purge(version)
        removed: list[FreedBytes] = []
        await self._live.ask(lambda: self._live.catalog.collect(self._removing(removed)))
        return sum(removed, freed)

    def _removing(self, removed: list[FreedBytes]) -> Callable[[str], int]:
        """Return what removes a blob and notes what each tier got back. It runs in a thread."""

        def remove(sha256: str) -> int:
            here = self._store.evict(sha256)
            num_bytes = self._store.delete(sha256)
            is_remote = self._store.tier == "remote"
            freed = (
                FreedBytes(disk=here, remote=num_bytes) if is_remote else FreedBytes(disk=num_bytes)
            )
            removed.append(freed)
            return num_bytes

        return remove

    async def _purge(self, version: VersionRecord) -> None:
        catalog = self._live.catalog
        await self._live.change(version.tenant, version.name, lambda: catalog.purge(version))
