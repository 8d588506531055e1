"""Pin, merge, disable, and their opposites: in the catalog for every process, or in this one alone.

What is wished is done here at once, so that the caller hears whether it works; other processes that
follow the catalog do it when they see it. A static adapter is nobody else's: its wishes stay here.
"""

import time
from typing import Literal

from quickchange_adapters.catalog import Catalog
from quickchange_adapters.names import DEFAULT_TENANT
from quickchange_adapters.records import VersionRecord
from quickchange_adapters.version_states import Wish

from quickchange_server.adapter_changes import revision_of
from quickchange_server.adapter_directory import AdapterDirectory
from quickchange_server.adapter_lookup import AdapterLookup
from quickchange_server.adapter_views import ActionView, FreedBytes
from quickchange_server.answers import as_answers
from quickchange_server.desired_state import DesiredState
from quickchange_server.live_catalog import LiveCatalog
from quickchange_server.view_builder import ViewBuilder
from quickchange_server.wishes import Wishes

WishAction = Literal["pin", "unpin", "merge", "unmerge"]
StateAction = Literal["disable", "enable"]

_WISHES: dict[WishAction, tuple[Wish, bool]] = {
    "pin": ("pin", True),
    "unpin": ("pin", False),
    "merge": ("merge", True),
    "unmerge": ("merge", False),
}


class StateActions:
    """Says what versions are to be. All is idempotent; `version` None: what the bare name means."""

    def __init__(
        self,
        live: LiveCatalog,
        directory: AdapterDirectory,
        wishes: Wishes,
        desired: DesiredState,
        views: ViewBuilder,
    ) -> None:
        self._live = live
        self._directory = directory
        self._lookup = AdapterLookup(directory)
        self._wishes = wishes
        self._desired = desired
        self._views = views

    async def wish(
        self,
        action: WishAction,
        name: str,
        version: int | None = None,
        *,
        is_here_only: bool = False,
        tenant: str = DEFAULT_TENANT,
        actor: str = "",
    ) -> ActionView:
        """Pin or merge a version, or take that back.

        A wish that cannot be fulfilled here is refused, and nobody is told of it.

        Raises: NotFound, Conflict (disabled, pin_budget, merge_budget), Unavailable.
        """
        started = time.monotonic()
        wish, is_wished = _WISHES[action]
        find = self._lookup.ready_version if is_wished else self._lookup.live_version
        record = find(name, version, tenant)
        is_here_only = is_here_only or self._lookup.is_static(name)
        freed = FreedBytes()
        if is_wished:
            await self._grant(wish, record, actor, is_here_only)
            self._wishes.note_word(wish, record.digest)
        else:
            self._wishes.note_word(wish, record.digest)
            freed = await self._take_back(wish, record, actor, is_here_only)
        return await self._shown(action, record, started, freed)

    async def merge(
        self, name: str, version: int | None = None, *, tenant: str = DEFAULT_TENANT
    ) -> ActionView:
        """Have every process make a merged copy of a version beside its untouched base."""
        return await self.wish("merge", name, version, tenant=tenant)

    async def unmerge(
        self, name: str, version: int | None = None, *, tenant: str = DEFAULT_TENANT
    ) -> ActionView:
        """Have every process drop its merged copy."""
        return await self.wish("unmerge", name, version, tenant=tenant)

    async def set_state(
        self,
        action: StateAction,
        name: str,
        version: int | None = None,
        *,
        is_here_only: bool = False,
        if_match: str | None = None,
        tenant: str = DEFAULT_TENANT,
        actor: str = "",
    ) -> ActionView:
        """Take a version out of service, or put it back; running requests finish.

        Raises: NotFound, Conflict (static), Forbidden, PreconditionFailed, Unavailable.
        """
        started = time.monotonic()
        owner = self._lookup.owner(name, tenant)
        record = self._lookup.live_version(name, version, owner)
        is_enabled, revision = action == "enable", revision_of(if_match, name)
        if is_here_only:
            self._directory.set_state_here(record, "ready" if is_enabled else "disabled")
        else:
            self._directory.forget_state_here(record)
            await self._live.change(
                owner,
                name,
                lambda: self._catalog.states.set_enabled(
                    record, is_enabled, revision=revision, actor=actor
                ),
            )
        self._desired.wake()
        return await self._shown(action, record, started, FreedBytes())

    @property
    def _catalog(self) -> Catalog:
        return self._live.catalog

    async def _grant(
        self, wish: Wish, version: VersionRecord, actor: str, is_here_only: bool
    ) -> None:
        """Do it here, then tell all; on a failure of either, wish what was wished before."""
        before = self._wishes.get_here(wish, version.digest)
        self._wishes.set_here(wish, version, True)
        try:
            with as_answers():
                await self._desired.fulfil(wish, version)
            if not is_here_only:
                await self._tell(wish, version, True, actor)
        except BaseException:
            self._wishes.restore_here(wish, version.digest, before)
            self._desired.wake()
            raise
        if not is_here_only:
            self._wishes.restore_here(wish, version.digest, None)

    async def _take_back(
        self, wish: Wish, version: VersionRecord, actor: str, is_here_only: bool
    ) -> FreedBytes:
        """Tell all, then undo it here, unless the same bytes are wished for under another name."""
        if is_here_only:
            self._wishes.set_here(wish, version, False)
        else:
            await self._tell(wish, version, False, actor)
            self._wishes.restore_here(wish, version.digest, None)
        if version.digest in self._wishes.wished(wish):
            return FreedBytes()
        return FreedBytes(merged=await self._desired.undo(wish, version.digest))

    async def _tell(self, wish: Wish, version: VersionRecord, is_wished: bool, actor: str) -> None:
        states = self._catalog.states
        await self._live.change(
            version.tenant,
            version.name,
            lambda: states.set_wish(version, wish, is_wished, actor=actor),
        )

    async def _shown(
        self,
        action: WishAction | StateAction,
        before: VersionRecord,
        started: float,
        freed: FreedBytes,
    ) -> ActionView:
        after = self._lookup.version(before.name, before.number, before.tenant)
        return await self._views.action(action, after, started, freed)
