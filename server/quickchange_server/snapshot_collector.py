"""Gauges read from the engine's snapshot at scrape time. Never waits for the engine."""

import time
from collections.abc import Callable, Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from quickchange_server.engine.interface import EngineSnapshot
from quickchange_server.gateway_collector import kv_usage

PREFIX = "quickchange_"


class SnapshotCollector(Collector):
    """Collector over the engine's last snapshot, and over what it holds of a device by part."""

    def __init__(
        self,
        snapshot: Callable[[], EngineSnapshot],
        device_bytes: Callable[[], dict[str, int]],
    ) -> None:
        self._snapshot = snapshot
        self._device_bytes = device_bytes

    def describe(self) -> list[Metric]:
        """Return no families: nothing is read while the collector is registered."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Yield the gauges of one snapshot."""
        state = self._snapshot()
        yield _gauge("requests_running", "Requests in the batch.", state.num_running)
        yield _gauge("requests_waiting", "Requests that wait.", state.num_waiting)
        yield _gauge("kv_cache_usage_ratio", "Used part of the KV blocks, 0 to 1.", kv_usage(state))
        yield _gauge(
            "engine_last_step_timestamp_seconds",
            "When the last step ended, in Unix time; 0 before the first.",
            _unix_time(state.last_step_monotonic_s),
        )
        yield _gauge(
            "engine_heartbeat_timestamp_seconds",
            "When the engine last gave a sign of life, in Unix time; 0 before the first.",
            _unix_time(state.heartbeat_monotonic_s),
        )
        parts = {**state.memory_bytes, **self._device_bytes()}
        yield _labelled("memory_bytes", "Bytes by part.", "part", parts)
        yield _labelled("adapters", "Adapters by tier.", "tier", _adapters_by_tier(state))
        evictions = CounterMetricFamily(
            f"{PREFIX}adapter_evictions", "Versions that made room for others.", labels=["tier"]
        )
        for tier, number in state.num_evictions.items():
            evictions.add_metric([tier], number)
        yield evictions


class ProcessPartsCollector(Collector):
    """Collector over what the process has in memory, by part."""

    def __init__(self, parts: Callable[[], dict[str, int]]) -> None:
        self._parts = parts

    def describe(self) -> list[Metric]:
        """Return no families: nothing is read while the collector is registered."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Yield the parts, which add up to `process_resident_memory_bytes`."""
        parts = {part: size for part, size in self._parts().items() if part != "total"}
        yield _labelled("process_memory_bytes", "Resident size by part.", "part", parts)


def _gauge(name: str, text: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(PREFIX + name, text, value=value)


def _labelled(name: str, text: str, label: str, values: dict[str, int]) -> GaugeMetricFamily:
    family = GaugeMetricFamily(PREFIX + name, text, labels=[label])
    for key, value in values.items():
        family.add_metric([key], value)
    return family


def _adapters_by_tier(state: EngineSnapshot) -> dict[str, int]:
    resident = state.adapters.values()
    return {
        "host": sum(adapter.host_bytes > 0 for adapter in resident),
        "device": sum(adapter.device_bytes > 0 for adapter in resident),
    }


def _unix_time(monotonic_s: float) -> float:
    return time.time() - (time.monotonic() - monotonic_s) if monotonic_s else 0.0
