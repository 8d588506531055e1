"""Which adapters have metric series of their own: a bounded set. Knows nothing of what is counted.

The first `max_adapters` names get one each and keep it until they are deleted; all others share
`_other`, and so do requests that outlive their adapter. Counts never move between series.
"""

import threading
from collections.abc import Sequence

from prometheus_client.metrics import MetricWrapperBase

OTHER = "_other"


class AdapterLabels:
    """The label of each adapter's series, which may be asked for from any thread."""

    def __init__(self, max_adapters: int, metrics: Sequence[MetricWrapperBase]) -> None:
        self._max_adapters = max_adapters
        self._metrics = metrics
        self._names: set[str] = set()
        self._lock = threading.Lock()

    def register(self, name: str) -> None:
        """Give a registered adapter a series if there is room; call it when a request begins."""
        with self._lock:
            if len(self._names) < self._max_adapters:
                self._names.add(name)

    def label(self, name: str) -> str:
        """Return the label value of an adapter: its name if it has a series."""
        return name if name in self._names else OTHER

    def names(self) -> list[str]:
        """Return the names that have a series; from any thread."""
        with self._lock:
            return list(self._names)

    def forget(self, name: str) -> None:
        """Remove the series of a deleted adapter and make room for another."""
        with self._lock:
            self._names.discard(name)
            for metric in self._metrics:
                metric.remove_by_labels({"adapter": name})
