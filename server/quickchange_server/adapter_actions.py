"""Load, unload, merge and unmerge a version, and say what that did."""

import time

from quickchange_adapters.names import DEFAULT_TENANT

from quickchange_server.adapter_loader import AdapterLoader
from quickchange_server.adapter_lookup import AdapterLookup
from quickchange_server.adapter_views import ActionView, FreedBytes
from quickchange_server.answers import as_answers
from quickchange_server.errors import Unavailable
from quickchange_server.view_builder import ViewBuilder, freed_bytes


class AdapterActions:
    """What moves a version between tiers. `version` None: what the bare name means."""

    def __init__(self, lookup: AdapterLookup, loader: AdapterLoader, views: ViewBuilder) -> None:
        self._lookup = lookup
        self._loader = loader
        self._views = views

    async def load(
        self, name: str, version: int | None = None, *, tenant: str = DEFAULT_TENANT
    ) -> ActionView:
        """Bring a version into host memory; a repeat is a no-op.

        Raises: NotFound, Conflict, Unavailable.
        """
        started = time.monotonic()
        record = self._lookup.ready_version(name, version, tenant)
        await self._loader.load(record)
        return await self._views.action("load", record, started, FreedBytes())

    async def unload(
        self,
        name: str,
        version: int | None = None,
        *,
        timeout_s: float = 30.0,
        tenant: str = DEFAULT_TENANT,
    ) -> ActionView:
        """Give device, host and merged bytes back; the next request loads it again.

        Raises: NotFound, Unavailable (requests still run after `timeout_s`).
        """
        started = time.monotonic()
        record = self._lookup.ready_version(name, version, tenant)
        try:
            resident = await self._loader.unload(record.digest, timeout_s)
        except TimeoutError as error:
            raise Unavailable(
                f"requests still run on {name}:{record.number} after {timeout_s:g} s; "
                "it is unloaded when they end",
                code="draining",
            ) from error
        return await self._views.action("unload", record, started, freed_bytes(resident))

    async def merge(
        self, name: str, version: int | None = None, *, tenant: str = DEFAULT_TENANT
    ) -> ActionView:
        """Load a version and make a merged copy of it beside the untouched base.

        Raises: NotFound, Conflict (merge_budget), Unavailable.
        """
        started = time.monotonic()
        record = self._lookup.ready_version(name, version, tenant)
        with as_answers():
            await self._loader.merge(record)
        return await self._views.action("merge", record, started, FreedBytes())

    async def unmerge(
        self, name: str, version: int | None = None, *, tenant: str = DEFAULT_TENANT
    ) -> ActionView:
        """Drop the merged copy; a repeat is a no-op.

        Raises: NotFound.
        """
        started = time.monotonic()
        record = self._lookup.ready_version(name, version, tenant)
        result = await self._loader.unmerge(record.digest)
        freed = FreedBytes(merged=result.merged_bytes)
        return await self._views.action("unmerge", record, started, freed)
