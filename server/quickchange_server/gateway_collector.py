"""What gateways of the Kubernetes world read, under vLLM's names. Never waits for the engine.

The protocol is the Gateway API Inference Extension's (proposal 003): requests that wait and run, KV
use, and one series of which adapters are ready here.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from statistics import median

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from quickchange_server.adapter_names import AdapterNames
from quickchange_server.engine.interface import EngineSnapshot

TYPICAL_RANK = 16
"""Of an adapter, while none is resident."""


class GatewayCollector(Collector):
    """Collector over the engine's snapshot and the adapters' names.

    `loading`: digests that are being loaded. `has_tenants`: whether there is more than one tenant;
    then only public names are shown. All may be called from any thread.
    """

    def __init__(
        self,
        snapshot: Callable[[], EngineSnapshot],
        names: AdapterNames,
        loading: Callable[[], Sequence[str]],
        has_tenants: Callable[[], bool],
    ) -> None:
        self._snapshot = snapshot
        self._names = names
        self._loading = loading
        self._has_tenants = has_tenants

    def describe(self) -> list[GaugeMetricFamily]:
        """Return no families: nothing is read while the collector is registered."""
        return []

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Yield the block."""
        state = self._snapshot()
        yield _gauge("num_requests_running", "Requests in the batch.", state.num_running)
        yield _gauge("num_requests_waiting", "Requests that wait.", state.num_waiting)
        yield _gauge("kv_cache_usage_perc", "Used part of the KV blocks.", kv_usage(state))
        cache = GaugeMetricFamily(
            "vllm:cache_config_info",
            "The KV cache.",
            labels=["block_size", "num_gpu_blocks"],
        )
        cache.add_metric([str(state.kv_block_size), str(state.kv_blocks_total)], 1)
        yield cache
        yield self._lora_family(state)

    def _lora_family(self, state: EngineSnapshot) -> GaugeMetricFamily:
        """Return the one series; its value is the time, of which gateways take the latest."""
        ready = [
            digest
            for digest, resident in state.adapters.items()
            if resident.device_bytes and digest not in state.quarantined
        ]
        wanted = [
            digest
            for digest, resident in state.adapters.items()
            if resident.num_running and not resident.device_bytes
        ]
        wanted += [digest for digest in self._loading() if digest not in state.adapters]
        family = GaugeMetricFamily(
            "vllm:lora_requests_info",
            "Adapters that are ready on the device, and that requests wait for.",
            labels=["max_lora", "running_lora_adapters", "waiting_lora_adapters"],
        )
        labels = [str(max_adapters(state)), self._models(ready), self._models(wanted)]
        family.add_metric(labels, time.time())
        return family

    def _models(self, digests: Iterable[str]) -> str:
        only_public = self._has_tenants()
        return ",".join(
            sorted(
                {
                    model
                    for digest in digests
                    for model in self._names.models(digest, only_public=only_public)
                }
            )
        )


def kv_usage(state: EngineSnapshot) -> float:
    """Return the used part of the KV blocks, 0 to 1."""
    return state.kv_blocks_used / state.kv_blocks_total if state.kv_blocks_total else 0.0


def max_adapters(state: EngineSnapshot) -> int:
    """Return how many adapters of the median resident size the device's pool holds."""
    sizes = [each.device_bytes for each in state.adapters.values() if each.device_bytes]
    typical = median(sizes) if sizes else TYPICAL_RANK * state.adapter_row_bytes
    total = state.memory_bytes.get("adapter_pool_total", 0)
    return max(int(total // typical), len(sizes)) if typical else 0


def _gauge(name: str, text: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"vllm:{name}", text, value=value)
