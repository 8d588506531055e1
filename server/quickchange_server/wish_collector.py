"""A gauge of the catalog's wishes that are not fulfilled in this process. Never waits."""

from collections.abc import Callable, Iterator, Mapping

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector
from quickchange_adapters.version_states import Wish


class WishCollector(Collector):
    """Collector over a function that says how many are unmet."""

    def __init__(self, num_unmet: Callable[[], Mapping[Wish, int]]) -> None:
        self._num_unmet = num_unmet

    def describe(self) -> list[GaugeMetricFamily]:
        """Return no families: nothing is read while the collector is registered."""
        return []

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Yield the gauge."""
        unmet = GaugeMetricFamily(
            "quickchange_adapters_unmet",
            "Versions that are to be pinned or merged and are not here.",
            labels=["wish"],
        )
        for wish, number in self._num_unmet().items():
            unmet.add_metric([wish], number)
        yield unmet
