"""Views of adapters, made of the catalog's records and of what the engine holds."""

from collections.abc import Mapping

from quickchange_adapters.records import AdapterRecord, EventRecord, VersionRecord

from quickchange_server.adapter_views import AdapterView, Json, Tier, VersionView
from quickchange_server.engine.interface import GenerationEngine, ResidentAdapter

Reports = Mapping[int, Json]


class ViewBuilder:
    """Builds views; remembers when each version was last used in this process."""

    def __init__(self, engine: GenerationEngine) -> None:
        self._engine = engine
        self._last_used: dict[tuple[str, str, int], int] = {}

    def note_use(self, version: VersionRecord, now: float) -> None:
        """Remember that a version was asked for."""
        self._last_used[_key(version)] = int(now)

    def forget(self, version: VersionRecord) -> None:
        """Drop what is remembered of a version that is gone."""
        self._last_used.pop(_key(version), None)

    def version(self, record: VersionRecord, report: Json | None) -> VersionView:
        """Return one version's view."""
        resident = self._engine.snapshot().adapters.get(record.digest)
        return VersionView(
            name=record.name,
            version=record.number,
            digest=record.digest,
            state=record.state,
            peft_type=record.peft_type,
            rank=max(record.ranks, default=0),
            ranks=record.ranks,
            target_modules=record.target_modules,
            task=None,
            file_bytes=record.num_bytes,
            host_bytes=resident.host_bytes if resident else 0,
            device_bytes=resident.device_bytes if resident else 0,
            tier=_tier(resident),
            pinned=False,
            merged=bool(resident and resident.merged_bytes),
            base=record.base_name,
            created_at=record.created_at,
            last_used_at=self._last_used.get(_key(record)),
            report=report,
        )

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


def _tier(resident: ResidentAdapter | None) -> Tier:
    if resident is None:
        return "disk"
    return "device" if resident.device_bytes else "host"
