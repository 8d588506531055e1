"""Views of adapters, made of the catalog's records and of what the engine holds."""

import asyncio
import platform
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from quickchange_adapters.records import AdapterRecord, EventRecord, VersionRecord

from quickchange_server.adapter_views import (
    ActionName,
    ActionView,
    AdapterView,
    FreedBytes,
    Json,
    ModelView,
    Tier,
    VersionState,
    VersionView,
)
from quickchange_server.engine.interface import GenerationEngine, ResidentAdapter
from quickchange_server.version_task import task_json

SETTLE_S = 2.0
SETTLE_POLL_S = 0.005

Reports = Mapping[int, Json]


@dataclass(frozen=True, slots=True)
class VersionUse:
    """How many requests ran on a version in this process, and when the last one came."""

    num_requests: int = 0
    last_at: int | None = None


NEVER_USED = VersionUse()


class ViewBuilder:
    """Builds views; remembers how each version was used in this process.

    `is_pinned`: whether a version is to be kept loaded. `is_on_disk`: whether its files are on this
    machine; neither waits.
    """

    def __init__(
        self,
        engine: GenerationEngine,
        is_pinned: Callable[[VersionRecord], bool],
        is_on_disk: Callable[[VersionRecord], bool],
    ) -> None:
        self._engine = engine
        self._is_pinned = is_pinned
        self._is_on_disk = is_on_disk
        self._uses: dict[tuple[str, str, int], VersionUse] = {}
        self._started = int(time.time())

    def note_use(self, version: VersionRecord) -> None:
        """Remember that a request runs on a version."""
        key = _key(version)
        count = self._uses.get(key, NEVER_USED).num_requests + 1
        self._uses[key] = VersionUse(count, int(time.time()))

    def forget(self, versions: Iterable[VersionRecord]) -> None:
        """Drop what is remembered of versions that go."""
        for version in versions:
            self._uses.pop(_key(version), None)

    def version(self, record: VersionRecord, report: Json | None) -> VersionView:
        """Return one version's view."""
        snapshot = self._engine.snapshot()
        resident = snapshot.adapters.get(record.digest)
        use = self._uses.get(_key(record), NEVER_USED)
        state: VersionState = record.state
        if state == "ready" and record.digest in snapshot.quarantined:
            state = "quarantined"
        return VersionView(
            name=record.name,
            version=record.number,
            digest=record.digest,
            state=state,
            peft_type=record.peft_type,
            rank=max(record.ranks, default=0),
            ranks=record.ranks,
            target_modules=record.target_modules,
            task=task_json(record),
            file_bytes=record.num_bytes,
            host_bytes=resident.host_bytes if resident else 0,
            device_bytes=resident.device_bytes if resident else 0,
            tier=self._tier(record, resident),
            pinned=self._is_pinned(record),
            merged=bool(resident and resident.merged_bytes),
            base=record.base_name,
            created_at=record.created_at,
            last_used_at=use.last_at,
            num_requests=use.num_requests,
            report=report,
        )

    def tier(self, record: VersionRecord) -> Tier:
        """Return where a version's bytes are now, nearest to the model."""
        return self._tier(record, self._engine.snapshot().adapters.get(record.digest))

    def _tier(self, record: VersionRecord, resident: ResidentAdapter | None) -> Tier:
        if resident is not None:
            return "device" if resident.device_bytes else "host"
        return "disk" if self._is_on_disk(record) else "remote"

    def adapter(self, record: AdapterRecord, reports: Reports, *, is_static: bool) -> AdapterView:
        """Return an adapter's view; a version without a report shows None."""
        return AdapterView(
            name=record.name,
            tenant=record.tenant,
            visibility=record.visibility,
            aliases=dict(record.aliases),
            versions=tuple(self.version(v, reports.get(v.number)) for v in record.versions),
            tags=record.tags,
            created_at=record.created_at,
            etag=f'"{record.revision}"',
            is_static=is_static,
        )

    def base(self, name: str) -> ModelView:
        """Return the base's entry among the models."""
        base = self._engine.base.name
        return ModelView(name, self._started, base, None, self._engine.max_model_len)

    def model(self, model_id: str, version: VersionRecord) -> ModelView:
        """Return the entry of a model string among the models."""
        return ModelView(
            id=model_id,
            created=version.created_at,
            root=f"{version.name}:{version.number}",
            parent=self._engine.base.name,
            max_model_len=self._engine.max_model_len,
        )

    async def action(
        self,
        action: ActionName,
        version: VersionRecord,
        started_s: float,
        freed: FreedBytes,
    ) -> ActionView:
        """Return what an action, begun at `started_s` (monotonic), did."""
        seconds = time.monotonic() - started_s
        resident = await self._settled(action, version.digest)
        return ActionView(
            action=action,
            version=self.version(version, None),
            merged_bytes=resident.merged_bytes if resident else 0,
            freed=freed,
            seconds=seconds,
            replica=platform.node(),
        )

    async def _settled(self, action: ActionName, digest: str) -> ResidentAdapter | None:
        """Wait until the engine's snapshot, taken once a step, shows what an action did."""
        deadline = time.monotonic() + SETTLE_S
        while True:
            resident = self._engine.snapshot().adapters.get(digest)
            if _shows(action, resident) or time.monotonic() > deadline:
                return resident
            await asyncio.sleep(SETTLE_POLL_S)


def freed_bytes(resident: ResidentAdapter | None) -> FreedBytes:
    """Return what an unload gave back, by tier."""
    if resident is None:
        return FreedBytes()
    return FreedBytes(resident.device_bytes, resident.host_bytes, resident.merged_bytes)


def event_json(event: EventRecord) -> Json:
    """Return one line of the audit log."""
    return {
        "object": "adapter.event",
        "at": event.at,
        "action": event.action,
        "actor": event.actor,
        "version": event.version,
        "digest": event.digest,
        "alias": event.alias,
    }


def _key(version: VersionRecord) -> tuple[str, str, int]:
    return version.tenant, version.name, version.number


def _shows(action: ActionName, resident: ResidentAdapter | None) -> bool:
    merged_bytes = resident.merged_bytes if resident else 0
    return {
        "load": resident is not None,
        "unload": resident is None,
        "pin": bool(resident and resident.is_pinned),
        "merge": merged_bytes > 0,
        "unmerge": merged_bytes == 0,
    }.get(action, True)
