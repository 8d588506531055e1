"""Changes of an adapter's rows in the catalog, uploads aside: aliases, and the end of versions."""

from collections.abc import Sequence

from quickchange_adapters.catalog import Catalog
from quickchange_adapters.names import DEFAULT_TENANT, alias_problem
from quickchange_adapters.records import AdapterRecord, VersionRecord

from quickchange_server.adapter_lookup import AdapterLookup
from quickchange_server.adapter_remover import AdapterRemover
from quickchange_server.adapter_upload import UploadRefused
from quickchange_server.adapter_views import AdapterView, DeletionView
from quickchange_server.errors import PreconditionFailed, StorageFull, Unavailable
from quickchange_server.live_catalog import LiveCatalog
from quickchange_server.view_builder import ViewBuilder


class AdapterChanges:
    """Moves and removes aliases, deletes versions and names."""

    def __init__(
        self,
        live: LiveCatalog,
        lookup: AdapterLookup,
        remover: AdapterRemover,
        views: ViewBuilder,
    ) -> None:
        self._live = live
        self._lookup = lookup
        self._remover = remover
        self._views = views

    @property
    def _catalog(self) -> Catalog:
        return self._live.catalog

    async def set_alias(
        self,
        name: str,
        alias: str,
        version: int,
        *,
        if_match: str | None = None,
        tenant: str = DEFAULT_TENANT,
        actor: str = "",
    ) -> AdapterView:
        """Point an alias at a version; `if_match` is the ETag the caller saw.

        Raises: UploadRefused (invalid_name), NotFound, Conflict (static), PreconditionFailed.
        """
        problem = alias_problem(alias)
        if problem is not None:
            raise UploadRefused([problem])
        revision = revision_of(if_match, name)
        target = self._lookup.version(name, version, self._lookup.owner(name, tenant))
        record = await self._live.change(
            target.tenant,
            name,
            lambda: self._catalog.set_alias(alias, target, revision=revision, actor=actor),
        )
        return self._view(record)

    async def delete_alias(
        self,
        name: str,
        alias: str,
        *,
        if_match: str | None = None,
        tenant: str = DEFAULT_TENANT,
        actor: str = "",
    ) -> AdapterView:
        """Remove an alias; its version stays.

        Raises: NotFound (alias_not_found too), Conflict (static), PreconditionFailed.
        """
        revision = revision_of(if_match, name)
        owner = self._lookup.owner(name, tenant)
        record = await self._live.change(
            owner,
            name,
            lambda: self._catalog.delete_alias(
                name, alias, tenant=owner, revision=revision, actor=actor
            ),
        )
        return self._view(record)

    async def delete_version(
        self,
        name: str,
        version: int,
        *,
        timeout_s: float = 30.0,
        if_match: str | None = None,
        tenant: str = DEFAULT_TENANT,
        actor: str = "",
    ) -> DeletionView:
        """Take a version away: unknown to new requests at once, running ones finish.

        Waits up to `timeout_s`; after that `done` is False and it goes on in the background.

        Raises: NotFound, Conflict (alias_in_use, or static), PreconditionFailed, Unavailable.
        """
        revision = revision_of(if_match, name)
        owner = self._lookup.owner(name, tenant)
        gone = await self._live.change(
            owner,
            name,
            lambda: self._catalog.begin_delete_version(
                name, version, tenant=owner, revision=revision, actor=actor
            ),
        )
        return await self._remove(name, version, (gone,), timeout_s)

    async def delete_adapter(
        self,
        name: str,
        *,
        timeout_s: float = 30.0,
        if_match: str | None = None,
        tenant: str = DEFAULT_TENANT,
        actor: str = "",
    ) -> DeletionView:
        """Take a name away with all versions and aliases, as `delete_version` does.

        Raises: NotFound, Conflict (static), PreconditionFailed, Unavailable.
        """
        revision = revision_of(if_match, name)
        owner = self._lookup.owner(name, tenant)
        gone = await self._live.change(
            owner,
            name,
            lambda: self._catalog.begin_delete_adapter(
                name, tenant=owner, revision=revision, actor=actor
            ),
        )
        return await self._remove(name, None, gone, timeout_s)

    async def _remove(
        self, name: str, number: int | None, gone: Sequence[VersionRecord], timeout_s: float
    ) -> DeletionView:
        self._views.forget(gone)
        try:
            freed = await self._remover.remove(gone, timeout_s)
        except (TimeoutError, Unavailable, StorageFull):
            # It was begun, so nobody finds it any more, and it is ended behind.
            return DeletionView(name, number, done=False)
        return DeletionView(name, number, done=True, freed=freed)

    def _view(self, record: AdapterRecord) -> AdapterView:
        is_static = self._lookup.is_static(record.name)
        return self._views.adapter(record, {}, is_static=is_static)


def revision_of(if_match: str | None, name: str) -> int | None:
    """Return the revision an ETag stands for; None when any will do.

    Raises: PreconditionFailed.
    """
    if if_match is None or if_match.strip() == "*":
        return None
    text = if_match.strip().removeprefix("W/").strip('"')
    if not (text.isascii() and text.isdigit() and len(text) < 19):
        raise PreconditionFailed(f"adapter {name[:80]!r} has no such ETag: read it again")
    return int(text)
