"""What a request needs before it is submitted: its adapters, loaded, together if it mixes them."""

from collections.abc import Sequence

from quickchange_adapters.records import VersionRecord

from quickchange_server.adapter_loader import AdapterLoader
from quickchange_server.adapter_lookup import AdapterLookup
from quickchange_server.adapter_views import ResolvedModel
from quickchange_server.engine.interface import GenerationEngine
from quickchange_server.errors import Conflict
from quickchange_server.view_builder import ViewBuilder


class AdapterUses:
    """Acquires versions for requests, and counts their uses.

    `is_repeat`: the same request has acquired it before, and is not counted again.
    """

    def __init__(
        self,
        engine: GenerationEngine,
        lookup: AdapterLookup,
        loader: AdapterLoader,
        views: ViewBuilder,
    ) -> None:
        self._engine = engine
        self._lookup = lookup
        self._loader = loader
        self._views = views
        self.part = loader.part

    async def acquire(self, resolved: ResolvedModel, *, is_repeat: bool = False) -> None:
        """Make sure that requests for `resolved` can be submitted; a no-op for the base.

        Await it right before `engine.generate`. Requests that come at once load it once.

        Raises: NotFound (deleted since), Conflict (it does not fit this base, or
        adapter_quarantined), Unavailable.
        """
        if resolved.kind == "adapter":
            await self._loader.load(self._usable(resolved, is_repeat))

    async def acquire_mix(
        self, owner: str, parts: Sequence[ResolvedModel], *, is_repeat: bool = False
    ) -> None:
        """Make sure that requests which mix these adapters can be submitted.

        Call `part(owner)` once they are, and also if this raises.

        Raises: InvalidRequest (they never fit together), and what `acquire` raises.
        """
        versions = [self._usable(part, is_repeat) for part in parts]
        await self._loader.load_together(owner, versions)

    def _usable(self, resolved: ResolvedModel, is_repeat: bool) -> VersionRecord:
        """Return a version that a request is about to use, and note that once.

        Raises: NotFound, Conflict.
        """
        version = self._lookup.still_served(resolved)
        check_not_quarantined(self._engine, resolved)
        if not is_repeat:
            self._views.note_use(version)
            self._loader.observer.on_hit(self._views.tier(version))
        return version


def check_not_quarantined(engine: GenerationEngine, resolved: ResolvedModel) -> None:
    """Refuse a version whose numbers damaged requests. Raises: Conflict."""
    if resolved.digest in engine.snapshot().quarantined:
        raise Conflict(
            f"{resolved.served_name!r} gave values that are not finite, repeatedly, and is out of "
            "service until the server restarts: upload a corrected version",
            code="adapter_quarantined",
        )
