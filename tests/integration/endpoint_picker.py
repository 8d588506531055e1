"""What an endpoint picker does with a model server: reads its gauges, and scores it for a request.

Written after llm-d's router: `core-metrics-extractor` (which series it takes, what it misses is an
error), `lora-affinity-scorer`, `queue-scorer` and `kv-cache-utilization-scorer`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import httpx
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

QUEUED, RUNNING = "vllm:num_requests_waiting", "vllm:num_requests_running"
KV_USAGE, CACHE, LORA = (
    "vllm:kv_cache_usage_perc",
    "vllm:cache_config_info",
    "vllm:lora_requests_info",
)
WEIGHTS = {"queue": 2.0, "kv": 1.0, "affinity": 3.0}
"""As in helm/examples/endpoint-picker.yaml."""


class FamilyMissing(Exception):
    """A gauge that must be there is not, or is something else."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """What the picker knows of one server after a scrape."""

    url: str
    num_queued: int
    num_running: int
    kv_usage: float
    block_size: int
    num_blocks: int
    max_adapters: int
    ready: frozenset[str]
    waiting: frozenset[str]

    def affinity(self, model: str) -> float:
        """Return how well a request for this model string, compared as it is, fits here."""
        if model in self.ready:
            return 1.0
        if len(self.ready) + len(self.waiting) < self.max_adapters:
            return 0.8
        return 0.6 if model in self.waiting else 0.0


def scrape(url: str) -> Endpoint:
    """Read one server's gauges. Raises: FamilyMissing."""
    text = httpx.get(f"{url}/metrics", timeout=10).raise_for_status().text
    families = {family.name: family for family in text_string_to_metric_families(text)}
    cache, lora = _latest(families, CACHE).labels, _latest(families, LORA).labels
    return Endpoint(
        url=url,
        num_queued=int(_latest(families, QUEUED).value),
        num_running=int(_latest(families, RUNNING).value),
        kv_usage=_latest(families, KV_USAGE).value,
        block_size=int(cache["block_size"]),
        num_blocks=int(cache["num_gpu_blocks"]),
        max_adapters=int(lora["max_lora"]),
        ready=_names(lora["running_lora_adapters"]),
        waiting=_names(lora["waiting_lora_adapters"]),
    )


def pick(endpoints: Sequence[Endpoint], model: str) -> Endpoint:
    """Return the endpoint with the best weighted score for a request."""
    queues = [endpoint.num_queued for endpoint in endpoints]
    span = max(queues) - min(queues)

    def score(endpoint: Endpoint) -> float:
        queue = 1.0 - (endpoint.num_queued - min(queues)) / span if span else 1.0
        return (
            WEIGHTS["queue"] * queue
            + WEIGHTS["kv"] * (1.0 - endpoint.kv_usage)
            + WEIGHTS["affinity"] * endpoint.affinity(model)
        )

    return max(endpoints, key=score)


def _latest(families: Mapping[str, Metric], name: str) -> Sample:
    """Return the series of a gauge with the largest value, as the extractor does."""
    family = families.get(name)
    if family is None or family.type != "gauge" or not family.samples:
        raise FamilyMissing(name)
    return max(family.samples, key=lambda sample: sample.value)


def _names(joined: str) -> frozenset[str]:
    return frozenset(name.strip() for name in joined.split(",") if name.strip())
