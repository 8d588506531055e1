"""Series by adapter: bounded, true, and gone with the adapter."""

import time
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
from quickchange_adapters.store import CacheCounts
from quickchange_server.adapter_names import AdapterNames
from quickchange_server.api.app import create_app
from quickchange_server.engine.interface import EngineSnapshot, ResidentAdapter
from quickchange_server.metrics import RequestSummary, ServerMetrics
from quickchange_server.metrics_text import MAX_AGE_S, RENDER_INTERVAL_S

from tests.conftest import MakeAdapter
from tests.server.adapter_records import adapter_record
from tests.server.conftest import serve_in_process
from tests.server.real_services import real_services
from tests.server.test_api_adapters import push, text_of

NUM_ADAPTERS = 5000
MAX_LINES = 3000


@pytest.fixture
async def real_client(tiny_base: Path, tmp_path: Path) -> AsyncIterator[httpx.AsyncClient]:
    async for each in serve_in_process(create_app(real_services(tiny_base, tmp_path))):
        yield each


def crowd(names: AdapterNames, num_loaded: int) -> EngineSnapshot:
    """Return a snapshot in which so many of 5,000 adapters are loaded."""
    for number in range(NUM_ADAPTERS):
        digests = [f"{number}-{version}" for version in range(6)]
        names.note("default", f"a{number}", adapter_record(f"a{number}", digests))
    adapters = {
        f"{number}-{version}": ResidentAdapter(f"{number}-{version}", 3, 2, 0, 0)
        for number in range(num_loaded)
        for version in range(6)
    }
    num = len(adapters)
    return EngineSnapshot(
        memory_bytes={"adapter_host": 3 * num, "adapter_pool_used": 2 * num, "merged": 0},
        adapters=adapters,
    )


def use(metrics: ServerMetrics, number: int) -> None:
    name = f"a{number}"
    metrics.on_request_start([name])
    metrics.on_first_token(0.1, [name])
    metrics.on_request_end(RequestSummary("ok", [name], 0.5, 0.1, 7, 3))


def test_series_are_bounded_whatever_is_registered_used_and_loaded() -> None:
    metrics, names = ServerMetrics(), AdapterNames()
    state = crowd(names, num_loaded=800)
    metrics.watch(lambda: state)
    metrics.watch_adapters(lambda: state, names, lambda: ["1-1"], lambda: True)
    for number in range(NUM_ADAPTERS):
        use(metrics, number)
    lines = metrics.render()[0].decode().splitlines()
    by_adapter = [line for line in lines if 'adapter="' in line and not line.startswith("#")]
    labels = {line.partition('adapter="')[2].partition('"')[0] for line in by_adapter}
    assert len(labels) == 33
    assert "_other" in labels
    assert len([line for line in lines if line.startswith("quickchange_adapter_info")]) == 32 * 4
    assert len(lines) < MAX_LINES
    for number in range(NUM_ADAPTERS):
        metrics.forget_adapter(f"a{number}")
    left = metrics.render("application/openmetrics-text")[0].decode()
    assert 'adapter="a' not in left


def test_bytes_of_all_adapters_add_up() -> None:
    metrics, names = ServerMetrics(max_adapters=3), AdapterNames()
    state = crowd(names, num_loaded=10)
    metrics.watch_adapters(lambda: state, names, list, lambda: False)
    for number in range(5):
        use(metrics, number)
    value = metrics.registry.get_sample_value

    def bytes_of(adapter: str, tier: str) -> float:
        found = value("quickchange_adapter_bytes", {"adapter": adapter, "tier": tier})
        assert found is not None
        return found

    assert bytes_of("a0", "host") == 18
    assert bytes_of("_other", "device") == 2 * 42
    labels = ("a0", "a1", "a2", "_other")
    assert sum(bytes_of(label, "host") for label in labels) == state.memory_bytes["adapter_host"]
    info = {"adapter": "a0", "version": "6", "digest": "0-5"}
    assert value("quickchange_adapter_info", info) == 1


def test_who_scrapes_all_the_time_never_waits_for_a_rendering() -> None:
    metrics = ServerMetrics()
    num_renders = 0

    def snapshot() -> EngineSnapshot:
        nonlocal num_renders
        num_renders += 1
        return EngineSnapshot(num_running=num_renders)

    metrics.watch(snapshot)
    assert metrics.peek() is None
    assert b"quickchange_requests_running 1.0" in metrics.render()[0]
    time.sleep(RENDER_INTERVAL_S + 0.01)
    before = metrics.peek()
    deadline_s = time.monotonic() + 30
    while num_renders < 2 and time.monotonic() < deadline_s:
        time.sleep(0.01)
    assert before is None or b"quickchange_requests_running 1.0" in before[0]
    assert b"quickchange_requests_running 2.0" in metrics.render()[0]
    time.sleep(MAX_AGE_S + 0.01)
    assert metrics.peek() is None


async def test_hits_loads_and_bytes_of_a_real_adapter(
    real_client: httpx.AsyncClient, make_adapter: MakeAdapter
) -> None:
    pushed = (await push(real_client, make_adapter(seed=1))).json()
    for _ in range(2):
        await text_of(real_client, "ada")
    text = (await real_client.get("/metrics")).text
    for line in (
        'quickchange_adapter_hits_total{tier="disk"} 1.0',
        'quickchange_adapter_hits_total{tier="device"} 1.0',
        'quickchange_adapter_load_seconds_count{from_tier="disk",to_tier="host"} 1.0',
        'quickchange_adapter_load_seconds_count{from_tier="host",to_tier="device"} 1.0',
        "quickchange_prefill_seconds_count 2.0",
        'quickchange_choices_total{finish_reason="length"} 2.0',
        'quickchange_request_generation_tokens_bucket{le="16.0"} 2.0',
        'running_lora_adapters="ada",waiting_lora_adapters=""',
        f'digest="{pushed["digest"]}",version="1"}} 1.0',
    ):
        assert line in text, line
    assert 'quickchange_adapter_bytes{adapter="ada",tier="device"} 0.0' not in text
    assert 'quickchange_adapter_bytes{adapter="ada",tier="device"}' in text


async def test_what_makes_room_is_counted(
    tiny_base: Path, tmp_path: Path, make_adapter: MakeAdapter
) -> None:
    services = real_services(tiny_base, tmp_path, adapter_host_bytes=100_000)
    async for client in serve_in_process(create_app(services)):
        for seed in (1, 2, 3):
            await push(client, make_adapter(seed=seed), f"a{seed}")
        for seed in (1, 2, 3):
            await text_of(client, f"a{seed}")
        state = services.engine.snapshot()
        text = (await client.get("/metrics")).text
        assert state.num_evictions["host"] == 3 - len(state.adapters) > 0
        assert f'evictions_total{{tier="host"}} {float(state.num_evictions["host"])}' in text
        assert state.memory_bytes["adapter_host"] == sum(
            each.host_bytes for each in state.adapters.values()
        )


def test_a_store_s_cache_is_shown() -> None:
    metrics = ServerMetrics()
    metrics.watch_cache(lambda: CacheCounts(10, 99, 3, 2, 1))
    value = metrics.registry.get_sample_value
    assert value("quickchange_store_cache_reads_total", {"result": "hit"}) == 3
    assert value("quickchange_store_cache_reads_total", {"result": "miss"}) == 2
    assert value("quickchange_store_cache_evictions_total") == 1
    assert value("quickchange_store_cache_bytes") == 10
