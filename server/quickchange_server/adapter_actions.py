"""Load and unload a version in this process, and say what that did."""

import time

from quickchange_adapters.names import DEFAULT_TENANT

from quickchange_server.adapter_loader import AdapterLoader
from quickchange_server.adapter_lookup import AdapterLookup
from quickchange_server.adapter_views import ActionView, FreedBytes
from quickchange_server.desired_state import DesiredState
from quickchange_server.errors import Conflict, Unavailable
from quickchange_server.view_builder import ViewBuilder, freed_bytes
from quickchange_server.wishes import Wishes


class AdapterActions:
    """What moves a version between tiers. `version` None: what the bare name means."""

    def __init__(
        self,
        lookup: AdapterLookup,
        loader: AdapterLoader,
        wishes: Wishes,
        desired: DesiredState,
        views: ViewBuilder,
    ) -> None:
        self._lookup = lookup
        self._loader = loader
        self._wishes = wishes
        self._desired = desired
        self._views = views

    async def load(
        self,
        name: str,
        version: int | None = None,
        *,
        to_device: bool = False,
        tenant: str = DEFAULT_TENANT,
    ) -> ActionView:
        """Bring a version into host memory, or to the device; a repeat is a no-op.

        Raises: NotFound, Conflict, Unavailable (also: running requests hold the whole device).
        """
        started = time.monotonic()
        record = self._lookup.ready_version(name, version, tenant)
        if to_device:
            await self._loader.activate(record)
        else:
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

        Raises: NotFound, Conflict (it is pinned), Unavailable (requests still run after
        `timeout_s`).
        """
        started = time.monotonic()
        record = self._lookup.live_version(name, version, tenant)
        if self._wishes.is_wished("pin", record):
            raise Conflict(
                f"{name}:{record.number} is pinned: unpin it first, "
                "in this process alone with ?scope=replica"
            )
        self._desired.park(record.digest)
        try:
            resident = await self._loader.unload(record.digest, timeout_s)
        except TimeoutError as error:
            raise Unavailable(
                f"requests still run on {name}:{record.number} after {timeout_s:g} s; "
                "it is unloaded when they end",
                code="draining",
            ) from error
        return await self._views.action("unload", record, started, freed_bytes(resident))
