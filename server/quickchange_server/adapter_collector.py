"""What adapters take and which versions they are, for those that have series of their own.

Read from the engine's snapshot at scrape time, never waiting. At most `max_adapters` names, and of
each at most `MAX_VERSIONS` versions; all other bytes are `_other`'s.
"""

from collections.abc import Callable, Iterator

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector
from quickchange_adapters.names import DEFAULT_ALIAS
from quickchange_adapters.records import AdapterRecord, VersionRecord

from quickchange_server.adapter_labels import OTHER, AdapterLabels
from quickchange_server.adapter_names import AdapterNames
from quickchange_server.engine.interface import EngineSnapshot, ResidentAdapter

MAX_VERSIONS = 4
TIERS = ("host", "device", "merged")
TOTALS = {"host": "adapter_host", "device": "adapter_pool_used", "merged": "merged"}
"""The part of memory that holds a tier's bytes of all versions."""


class AdapterCollector(Collector):
    """Collector over the engine's snapshot, the adapters' records and the labels in use."""

    def __init__(
        self, snapshot: Callable[[], EngineSnapshot], names: AdapterNames, labels: AdapterLabels
    ) -> None:
        self._snapshot = snapshot
        self._names = names
        self._labels = labels

    def describe(self) -> list[GaugeMetricFamily]:
        """Return no families: nothing is read while the collector is registered."""
        return []

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Yield bytes by adapter and tier, and which versions the adapters are."""
        state = self._snapshot()
        records = {label: self._names.get(label) for label in self._labels.names()}
        shown = {label: record for label, record in sorted(records.items()) if record is not None}
        yield _bytes_family(state, shown)
        yield _info_family(state, shown)


def _bytes_family(state: EngineSnapshot, shown: dict[str, AdapterRecord]) -> GaugeMetricFamily:
    family = GaugeMetricFamily(
        "quickchange_adapter_bytes", "Bytes in memory by adapter.", labels=["adapter", "tier"]
    )
    named: set[str] = set()
    for label, record in shown.items():
        digests = {version.digest for version in record.versions} & state.adapters.keys()
        named |= digests
        for tier in TIERS:
            family.add_metric([label, tier], _sum(state, digests, tier))
    for tier in TIERS:
        rest = state.memory_bytes.get(TOTALS[tier], 0) - _sum(state, named, tier)
        family.add_metric([OTHER, tier], max(rest, 0))
    return family


def _sum(state: EngineSnapshot, digests: set[str], tier: str) -> int:
    return sum(_bytes(state.adapters[digest], tier) for digest in digests)


def _bytes(resident: ResidentAdapter, tier: str) -> int:
    return {
        "host": resident.host_bytes,
        "device": resident.device_bytes,
        "merged": resident.merged_bytes,
    }[tier]


def _info_family(state: EngineSnapshot, shown: dict[str, AdapterRecord]) -> GaugeMetricFamily:
    family = GaugeMetricFamily(
        "quickchange_adapter_info",
        "1 for the versions that an adapter's default is or that are loaded.",
        labels=["adapter", "version", "digest"],
    )
    for label, record in shown.items():
        for version in _shown_versions(state, record):
            family.add_metric([label, str(version.number), version.digest], 1)
    return family


def _shown_versions(state: EngineSnapshot, record: AdapterRecord) -> list[VersionRecord]:
    """Return the default version, then loaded ones, newest first: a few."""
    default = record.aliases.get(DEFAULT_ALIAS)
    newest_first = sorted(record.versions, key=lambda version: -version.number)
    found = [version for version in newest_first if version.number == default]
    loaded = [v for v in newest_first if v.digest in state.adapters and v.number != default]
    return [*found, *loaded][:MAX_VERSIONS]
