"""How the local copies of an object store's files do. Never waits."""

from collections.abc import Callable, Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from quickchange_adapters.store import CacheCounts

PREFIX = "quickchange_store_cache_"


class CacheCollector(Collector):
    """Collector over a function that counts; None: the store has no cache, and all is zero."""

    def __init__(self, counts: Callable[[], CacheCounts | None]) -> None:
        self._counts = counts

    def describe(self) -> list[Metric]:
        """Return no families: nothing is read while the collector is registered."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Yield reads, evictions and bytes."""
        counts = self._counts() or CacheCounts(0, 0, 0, 0, 0)
        reads = CounterMetricFamily(
            f"{PREFIX}reads", "Files that were there, or fetched.", labels=["result"]
        )
        reads.add_metric(["hit"], counts.num_hits)
        reads.add_metric(["miss"], counts.num_misses)
        yield reads
        text = "Files that made room for others."
        yield CounterMetricFamily(f"{PREFIX}evictions", text, value=counts.num_evictions)
        yield GaugeMetricFamily(f"{PREFIX}bytes", "Bytes of its files.", value=counts.num_bytes)
        yield GaugeMetricFamily(f"{PREFIX}max_bytes", "Its ceiling.", value=counts.max_bytes)
