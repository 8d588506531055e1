"""The block under vLLM's names, as a gateway's endpoint picker reads it."""

import time
from collections.abc import Sequence
from dataclasses import replace

import httpx
from prometheus_client.parser import text_string_to_metric_families
from quickchange_server.adapter_names import AdapterNames
from quickchange_server.engine.interface import EngineSnapshot, ResidentAdapter
from quickchange_server.metrics import ServerMetrics

from tests.server.adapter_records import adapter_record

LORA = "vllm:lora_requests_info"


def resident(digest: str, device_bytes: int = 10, num_running: int = 0) -> ResidentAdapter:
    return ResidentAdapter(digest, 10, device_bytes, 0, num_running)


class Site:
    """A snapshot, names and loads that a test sets."""

    def __init__(self) -> None:
        self.state = EngineSnapshot(
            num_running=3,
            num_waiting=2,
            kv_blocks_total=8,
            kv_blocks_used=2,
            kv_block_size=16,
            memory_bytes={"adapter_pool_total": 100},
            adapter_row_bytes=2,
        )
        self.names = AdapterNames()
        self.loading: list[str] = []
        self.has_tenants = False
        self.metrics = ServerMetrics()
        self.metrics.watch_adapters(
            lambda: self.state, self.names, lambda: self.loading, lambda: self.has_tenants
        )

    def hold(self, *adapters: ResidentAdapter) -> None:
        self.state = replace(self.state, adapters={each.digest: each for each in adapters})

    def samples(self, name: str) -> Sequence[tuple[dict[str, str], float]]:
        text = self.metrics.registry.collect()
        return [
            (sample.labels, sample.value)
            for family in text
            for sample in family.samples
            if sample.name == name
        ]

    def lora(self) -> dict[str, str]:
        ((labels, value),) = self.samples(LORA)
        assert abs(value - time.time()) < 60
        return labels


def test_queue_running_and_cache_are_there_from_the_first_second() -> None:
    site = Site()
    assert site.samples("vllm:num_requests_running") == [({}, 3)]
    assert site.samples("vllm:num_requests_waiting") == [({}, 2)]
    assert site.samples("vllm:kv_cache_usage_perc") == [({}, 0.25)]
    cache = {"block_size": "16", "num_gpu_blocks": "8"}
    assert site.samples("vllm:cache_config_info") == [(cache, 1)]
    assert site.lora() == {
        "max_lora": "3",
        "running_lora_adapters": "",
        "waiting_lora_adapters": "",
    }


def test_ready_is_what_is_on_the_device_and_waiting_what_is_wanted_there() -> None:
    site = Site()
    for name in ("ada", "bob", "cold", "sick", "loading"):
        site.names.note("default", name, adapter_record(name, [f"{name}-1"]))
    site.hold(
        resident("ada-1", 20, num_running=4),
        resident("bob-1", 0, num_running=1),
        resident("cold-1", 0),
        resident("sick-1"),
    )
    site.state = replace(site.state, quarantined=frozenset({"sick-1"}))
    site.loading = ["loading-1", "bob-1"]
    labels = site.lora()
    assert labels["running_lora_adapters"] == "ada"
    assert labels["waiting_lora_adapters"] == "bob,loading"


def test_the_bound_is_how_many_of_the_median_size_fit() -> None:
    site = Site()
    site.hold(resident("a", 10), resident("b", 20), resident("c", 60))
    assert site.lora()["max_lora"] == "5"


def test_adapters_that_come_and_go_leave_one_series() -> None:
    site = Site()
    for number in range(50):
        name = f"a{number}"
        site.names.note("default", name, adapter_record(name, [name]))
        site.hold(resident(name))
        assert site.lora()["running_lora_adapters"] == name
        site.names.note("default", name, None)
    assert site.lora()["running_lora_adapters"] == ""


def test_only_public_names_are_shown_where_there_are_tenants() -> None:
    site = Site()
    site.names.note("acme", "hers", adapter_record("hers", ["h"], tenant="acme"))
    site.names.note("default", "all", adapter_record("all", ["p"], visibility="public"))
    site.hold(resident("h"), resident("p"))
    assert site.lora()["running_lora_adapters"] == "all,hers"
    site.has_tenants = True
    assert site.lora()["running_lora_adapters"] == "all"


async def test_the_block_is_in_what_a_server_answers(client: httpx.AsyncClient) -> None:
    for accept in (
        "text/plain",
        "application/openmetrics-text; version=1.0.0",
        "application/openmetrics-text; version=1.0.0; escaping=underscores",
        "*/*",
    ):
        text = (await client.get("/metrics", headers={"accept": accept})).text
        assert text.count(f"{LORA}{{") == 1
        assert "\nvllm:num_requests_waiting 0.0\n" in text
    found = {family.name for family in text_string_to_metric_families(text)}
    assert {"vllm:kv_cache_usage_perc", "vllm:cache_config_info", LORA} <= found
