"""Adapters as the server offers them: upload, list, resolve, load, merge and delete.

Sits between the routes and the engine, the store and the catalog. Lives on the event loop; what
blocks runs in threads. Knows nothing of HTTP: views say what to show, errors carry their status.
"""

from collections.abc import AsyncIterable, Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from quickchange_adapters.catalog import Catalog
from quickchange_adapters.event_log import DEFAULT_RULE, EventRule
from quickchange_adapters.limits import AdapterLimits
from quickchange_adapters.names import DEFAULT_TENANT
from quickchange_adapters.records import (
    CONFIG_FILE,
    TASK_FILE,
    WEIGHTS_FILE,
    AdapterRecord,
    VersionRecord,
    version_digest,
)
from quickchange_adapters.store import StagedFile, Store
from quickchange_adapters.task import MAX_TASK_BYTES
from quickchange_adapters.version_states import Wish

from quickchange_server.adapter_actions import AdapterActions
from quickchange_server.adapter_changes import AdapterChanges
from quickchange_server.adapter_directory import AdapterDirectory
from quickchange_server.adapter_downloads import AdapterDownloads
from quickchange_server.adapter_loader import AdapterLoader
from quickchange_server.adapter_lookup import AdapterLookup, foreign_adapter, unknown_adapter
from quickchange_server.adapter_probe import AdapterProber, Probe
from quickchange_server.adapter_remover import AdapterRemover
from quickchange_server.adapter_upload import (
    FileName,
    UploadForm,
    UploadRefused,
    file_records,
    stage_file,
)
from quickchange_server.adapter_uploader import AdapterUploader, ThreadValidator, Validator
from quickchange_server.adapter_uses import AdapterUses
from quickchange_server.adapter_views import (
    AdapterPage,
    AdapterView,
    Json,
    ModelView,
    ResolvedModel,
    UploadResult,
    VersionView,
    adapter_label,
)
from quickchange_server.auto_merge import AutoMerge, TrafficSource
from quickchange_server.catalog_poll import POLL_S, CatalogPoll, OnChange
from quickchange_server.desired_state import DesiredState
from quickchange_server.engine.interface import GenerationEngine
from quickchange_server.live_catalog import LiveCatalog
from quickchange_server.load_observer import LoadObserver
from quickchange_server.state_actions import StateActions
from quickchange_server.static_adapters import StaticAdapters
from quickchange_server.store_sweep import StoreSweep
from quickchange_server.version_files import VersionFiles
from quickchange_server.version_task import read_version_task
from quickchange_server.view_builder import ViewBuilder, event_json
from quickchange_server.wishes import Wishes

__all__ = ["AdapterService", "FileName", "UploadForm", "UploadRefused"]


Names = Collection[str] | None
"""The only names that a caller may see; None: no such limit."""


class AdapterService:
    """Everything the routes may do with adapters.

    `version` arguments: a number, or None for what the bare name means (alias `default`).
    What requests need is `AdapterUses`', what moves a version between tiers `AdapterActions`', what
    says how it is to be `StateActions`', what changes its rows `AdapterChanges`'; all are called
    here.
    `names` and `loading` (digests) are for the thread that renders metrics.
    `validator` says where uploads are checked; None: in threads of this process. `poll_s`: how
    often the catalog is asked for what other processes did. `probe_ids`: the prompt that uploads
    are measured with, as the base's tokens; empty: they are not. `event_rule`: how long the audit
    log is kept.
    """

    def __init__(
        self,
        engine: GenerationEngine,
        store: Store,
        catalog: Catalog,
        limits: AdapterLimits,
        dtype: torch.dtype,
        validator: Validator | None = None,
        poll_s: float = POLL_S,
        probe_ids: Sequence[int] = (),
        event_rule: EventRule = DEFAULT_RULE,
    ) -> None:
        self.base_names: tuple[str, ...] = (engine.base.name,)
        limits = replace(limits, max_value=min(limits.max_value, torch.finfo(dtype).max))
        self._engine = engine
        self._store = store
        self._limits = limits
        self._catalog = catalog
        self._directory = AdapterDirectory()
        self.names = self._directory.names
        self._live = LiveCatalog(catalog, self._directory)
        self._poll = CatalogPoll(self._live, poll_s)
        self._files = VersionFiles(store, engine.base, limits, dtype)
        self._loader = AdapterLoader(
            engine, self._files, self._directory.is_served, self._live.read_again
        )
        self._prober = AdapterProber(engine, self._loader, probe_ids)
        self._uploader = AdapterUploader(
            engine.base, store, self._live, limits, validator or ThreadValidator(), self._probe
        )
        self._remover = AdapterRemover(store, self._live, self._directory, self._loader)
        self._sweep = StoreSweep(store, self._live, self._remover, event_rule)
        self._wishes = Wishes(self._directory)
        self._desired = DesiredState(
            engine,
            self._directory,
            self._wishes,
            self._loader,
            self._remover.is_removing,
            poll_s,
        )
        self.on_catalog_change(self._desired.renew)
        self._views = ViewBuilder(
            engine, partial(self._wishes.is_wished, "pin"), self._files.is_on_disk
        )
        self._lookup = AdapterLookup(self._directory)
        self._static = StaticAdapters(
            self._uploader, self._directory, self._files, engine.base, limits
        )
        self._auto_merge: AutoMerge | None = None
        self._bind_actions()

    def merge_by_traffic(self, source: TrafficSource) -> None:
        """Merge and unmerge what traffic asks for, from `start` on."""
        self._auto_merge = AutoMerge(self._directory, self._wishes, self._desired, source)

    def _bind_actions(self) -> None:
        """Offer what other classes do as methods of this one."""
        parts = self._wishes, self._desired, self._views
        actions = AdapterActions(self._lookup, self._loader, *parts)
        self.load, self.unload = actions.load, actions.unload
        states = StateActions(self._live, self._directory, *parts)
        self.wish, self.set_state = states.wish, states.set_state
        self.merge, self.unmerge = states.merge, states.unmerge
        self._downloads = AdapterDownloads(self._lookup, self._files)
        self.open_file = self._downloads.open_file
        self.loading = self._loader.loading
        uses = AdapterUses(self._engine, self._lookup, self._loader, self._views)
        self.acquire, self.acquire_mix, self.part = uses.acquire, uses.acquire_mix, uses.part
        changes = AdapterChanges(self._live, self._lookup, self._remover, self._views)
        self.set_alias, self.delete_alias = changes.set_alias, changes.delete_alias
        self.delete_version = changes.delete_version
        self.delete_adapter = changes.delete_adapter

    async def start(self) -> None:
        """Read the catalog, finish deletions that a crash cut short, sweep orphans, follow news.

        Raises: Unavailable.
        """
        await self._remover.resume()
        await self._sweep.start()
        await self._poll.look()
        self._poll.start()
        self._desired.start()
        if self._auto_merge is not None:
            self._auto_merge.start()

    def on_catalog_change(self, renew: OnChange) -> None:
        """Have `renew` called soon after any process changed the catalog, and once at the start.

        It is for pictures of other rows that are kept in memory. It may be called without need, and
        again if it raises.
        """
        self._poll.on_change.append(renew)

    def on_adapter_gone(self, forget: Callable[[str], None]) -> None:
        """Have `forget` called with what metrics call an adapter, once nobody finds it any more.

        Whichever process deleted it; what runs on it may not have ended.
        """
        self._directory.on_gone.append(lambda tenant, name: forget(adapter_label(name, tenant)))

    def tell(self, observer: LoadObserver) -> None:
        """Have `observer` told where requests find their adapters, and how loads go."""
        self._loader.observer = observer

    async def stop(self) -> None:
        """End background work, close catalog and store. Uploads under way are finished first."""
        await self._poll.stop()
        await self._sweep.stop()
        if self._auto_merge is not None:
            await self._auto_merge.stop()
        await self._desired.stop()
        await self._uploader.stop()
        await self._prober.stop()
        await self._remover.stop()
        await self._loader.stop()
        await self._downloads.stop()
        await self._live.close()
        self._store.close()

    async def stage(self, file: FileName, chunks: AsyncIterable[bytes]) -> StagedFile:
        """Write one part of an upload to the store's incoming folder, hashing as it goes.

        What was staged must be given to `upload`, `check` or `discard`. A failure leaves nothing.

        Raises: TooLarge, Unavailable.
        """
        limits = {
            CONFIG_FILE: self._limits.max_config_bytes,
            WEIGHTS_FILE: self._limits.max_weights_bytes,
            TASK_FILE: MAX_TASK_BYTES,
        }
        return await stage_file(self._store, file, chunks, limits[file])

    async def discard(self, staged: Sequence[StagedFile | None]) -> None:
        """Forget staged files; None and what is already gone are skipped."""
        await self._uploader.discard(file for file in staged if file is not None)

    async def upload(self, form: UploadForm) -> UploadResult:
        """Check, keep and publish an upload. When this returns, it survives `kill -9`.

        The staged files are used up, whatever happens. The same bytes under the same name give the
        version that is there (`created` False); `alias` is moved in the same transaction. A caller
        that leaves while it is published may find it there or not, but never half.

        Raises: UploadRefused (400, all problems in it), TooLarge, Conflict, Unavailable.
        """
        try:
            published = await self._uploader.publish(form, self._taken_names())
        finally:
            await self.discard(form.staged)
        report = await self._report(published.version)
        return UploadResult(published.created, self._views.version(published.version, report))

    async def check(self, form: UploadForm) -> Json:
        """Dry run: return the `adapter.report` object with all problems; nothing is kept."""
        try:
            return (await self._uploader.check(form, self._taken_names())).to_json()
        finally:
            await self.discard(form.staged)

    async def add_static(self, name: str, folder: Path) -> VersionView:
        """Serve a folder as `name` in this process only (`--adapter NAME=FOLDER`).

        Wins over the catalog's name and is read-only over REST. A repeat with equal bytes is a
        no-op. The folder is read again at each load, and refused then if its bytes changed.

        Raises: UploadRefused, Conflict (other bytes under that name).
        """
        version, report = await self._static.add(name, folder, self.base_names)
        return self._views.version(version, report)

    async def list(
        self,
        *,
        after: str | None = None,
        limit: int = 20,
        tenant: str = DEFAULT_TENANT,
        names: Names = None,
    ) -> AdapterPage:
        """Return adapters sorted by name, those behind `after`, at most `limit`; no reports."""
        seen = (a for a in self._directory.visible(tenant) if names is None or a.name in names)
        found = [a for a in seen if after is None or a.name > after]
        views = tuple(self._adapter_view(record, {}) for record in found[:limit])
        return AdapterPage(views, has_more=len(found) > limit)

    async def get(self, name: str, *, tenant: str = DEFAULT_TENANT) -> AdapterView:
        """Return one adapter with the reports of its versions.

        Raises: NotFound (adapter_not_found), Unavailable.
        """
        record = self._lookup.adapter(name, tenant)
        reports = {v.number: await self._report(v) for v in record.versions}
        return self._adapter_view(record, reports)

    async def get_version(
        self, name: str, version: int | None = None, *, tenant: str = DEFAULT_TENANT
    ) -> VersionView:
        """Return one version.

        Raises: NotFound (adapter_not_found, version_not_found), Unavailable.
        """
        record = self._lookup.version(name, version, tenant)
        return self._views.version(record, await self._report(record))

    async def events(
        self, name: str, *, tenant: str = DEFAULT_TENANT, after: int = 0, limit: int | None = None
    ) -> Sequence[Json]:
        """Return a part of the tenant's audit log of a name; also of one that was deleted.

        An event's `id` is its place in that log, which it keeps when older ones go.

        Raises: NotFound (adapter_not_found), Forbidden (it is another tenant's), Unavailable.
        """
        record = self._directory.get(name, tenant)
        read = partial(self._catalog.event_log.read, name, tenant)
        part = await self._live.ask(lambda: read(after, limit))
        is_there = record is not None or part.events
        if not is_there and not (await self._live.ask(lambda: read(limit=1))).events:
            raise unknown_adapter(name)
        if record is not None and record.tenant != tenant:
            raise foreign_adapter(name)
        numbered = enumerate(part.events, start=part.first_place)
        return [{"id": str(place), **event_json(event)} for place, event in numbered]

    def num_unmet(self) -> Mapping[Wish, int]:
        """Return how many wishes of each kind are not fulfilled here; from any thread."""
        return self._desired.num_unmet

    def resolve(self, model: str, *, tenant: str = DEFAULT_TENANT) -> ResolvedModel:
        """Say what a model string means now. A look-up in memory: never waits.

        Raises: NotFound (model_not_found), Conflict (its task.json is not this version's).
        """
        if model in self.base_names:
            return ResolvedModel("base", self.base_names[0], self._engine.base.digest, tenant)
        version = self._lookup.meant(model, tenant)
        return ResolvedModel(
            "adapter",
            version.name,
            version.digest,
            version.tenant,
            version.number,
            read_version_task(version),
        )

    def models(self, *, tenant: str = DEFAULT_TENANT, names: Names = None) -> Sequence[ModelView]:
        """Return the entries of `GET /v1/models`: base names, bare names, `name@alias`."""
        found = self._directory.model_names(tenant)
        return [
            *(self._views.base(name) for name in self.base_names if names is None),
            *(
                self._views.model(model, version)
                for model, version in found
                if names is None or version.name in names
            ),
        ]

    def model(self, model_id: str, *, tenant: str = DEFAULT_TENANT) -> ModelView:
        """Return one entry of `GET /v1/models`; any model string that resolves has one.

        Raises: NotFound (model_not_found).
        """
        if model_id in self.base_names:
            return self._views.base(model_id)
        return self._views.model(model_id, self._lookup.meant(model_id, tenant))

    def owned(self, tenant: str) -> Sequence[VersionRecord]:
        """Return every version that a tenant has in the catalog."""
        return self._directory.owned(tenant)

    def digests_of(self, tenant: str) -> Collection[str] | None:
        """Return the digests that a tenant may learn of; None: all, for the default tenant."""
        if tenant == DEFAULT_TENANT:
            return None
        return {v.digest for adapter in self._directory.visible(tenant) for v in adapter.versions}

    async def _probe(self, form: UploadForm) -> Probe:
        config, weights = form.adapter_config, form.adapter_model
        assert config is not None
        assert weights is not None
        digest = version_digest(file_records(form))
        read = partial(self._files.read_staged, config.path, weights.path, digest)
        return await self._prober.measure(digest, weights.num_bytes, read)

    def _taken_names(self) -> tuple[str, ...]:
        return (*self.base_names, *self._directory.static_names())

    async def _report(self, version: VersionRecord) -> Json:
        if self._lookup.is_static(version.name):
            return self._static.report(version.name)
        return await self._live.ask(lambda: self._catalog.report(version))

    def _adapter_view(self, record: AdapterRecord, reports: dict[int, Json]) -> AdapterView:
        is_static = self._lookup.is_static(record.name)
        return self._views.adapter(record, reports, is_static=is_static)
