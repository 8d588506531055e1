import threading
import time
from collections.abc import Sequence
from dataclasses import replace

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from quickchange_server.engine.interface import EngineSnapshot, ResidentAdapter
from quickchange_server.engine.observer import StepStats
from quickchange_server.metrics import RequestSummary, ServerMetrics
from quickchange_server.metrics_text import RENDER_INTERVAL_S

from tests.server.scripted_engine import ScriptedEngine


def value(metrics: ServerMetrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(f"quickchange_{name}", labels)


def step(seconds: float = 0.01, num_adapters: int = 2) -> StepStats:
    return StepStats("decode", "unmerged", seconds, 4, 4, num_adapters)


def end(metrics: ServerMetrics, *adapters: str, outcome: str = "ok") -> None:
    metrics.on_request_start(adapters)
    metrics.on_request_end(ended(outcome, adapters))


def ended(outcome: str = "ok", adapters: Sequence[str] = ()) -> RequestSummary:
    return RequestSummary(outcome, adapters, 0.5, 0.1, 7, 3)  # type: ignore[arg-type]


def test_steps_fill_their_histograms() -> None:
    metrics = ServerMetrics()
    metrics.on_step(step(0.0009, num_adapters=3))
    metrics.on_step(StepStats("prefill", "base", 0.5, 1, 200, 0, 1, 200, 64))
    metrics.on_step(replace(step(0.02, num_adapters=3), is_ahead=True))
    assert value(metrics, "step_seconds_bucket", kind="decode", le="0.001") == 1
    assert value(metrics, "step_seconds_count", kind="prefill") == 1
    assert value(metrics, "batch_adapters_bucket", le="0.0") == 1
    assert value(metrics, "batch_adapters_bucket", le="3.0") == 3
    assert value(metrics, "batch_rows_sum") == 9
    assert value(metrics, "steps_total", weights="unmerged") == 2
    assert value(metrics, "steps_ahead_total") == 1
    assert value(metrics, "steps_total", weights="merged") == 0
    assert value(metrics, "preemptions_total") == 1
    assert value(metrics, "prefix_cache_hits_total") == 64


@pytest.mark.parametrize(
    "name",
    [
        "time_to_first_token_seconds",
        "inter_token_latency_seconds",
        "time_per_output_token_seconds",
        "request_duration_seconds",
        "request_queue_seconds",
    ],
)
def test_buckets_start_at_a_millisecond(name: str) -> None:
    assert value(ServerMetrics(), f"{name}_bucket", le="0.001") == 0


def test_requests_are_counted_by_outcome_and_adapter() -> None:
    metrics = ServerMetrics()
    end(metrics, "ada", "bob")
    end(metrics, "ada", outcome="error")
    end(metrics)
    assert value(metrics, "requests_total", outcome="ok") == 2
    assert value(metrics, "requests_total", outcome="cancelled") == 0
    assert value(metrics, "generation_tokens_total") == 9
    assert value(metrics, "adapter_requests_total", adapter="ada", outcome="ok") == 1
    assert value(metrics, "adapter_tokens_total", adapter="ada", kind="prompt") == 14


def test_adapters_beyond_the_bound_share_a_series_and_never_move() -> None:
    metrics = ServerMetrics(max_adapters=2)
    for name in ("a", "b", "c", "d", "a"):
        end(metrics, name)
    assert value(metrics, "adapter_requests_total", adapter="a", outcome="ok") == 2
    assert value(metrics, "adapter_requests_total", adapter="_other", outcome="ok") == 2
    metrics.forget_adapter("a")
    assert value(metrics, "adapter_requests_total", adapter="a", outcome="ok") is None
    end(metrics, "c")
    assert value(metrics, "adapter_requests_total", adapter="c", outcome="ok") == 1
    assert value(metrics, "adapter_requests_total", adapter="_other", outcome="ok") == 2


def test_request_that_outlives_its_adapter_makes_no_series() -> None:
    metrics = ServerMetrics()
    metrics.on_request_start(["ada"])
    metrics.forget_adapter("ada")
    metrics.on_request_end(ended(adapters=["ada"]))
    assert value(metrics, "adapter_requests_total", adapter="ada", outcome="ok") is None
    assert value(metrics, "adapter_requests_total", adapter="_other", outcome="ok") == 1


def test_per_adapter_histograms_have_eight_buckets() -> None:
    metrics = ServerMetrics()
    metrics.on_request_start(["ada"])
    metrics.on_first_token(0.02, ["ada"])
    text = metrics.render()[0].decode()
    lines = [
        line
        for line in text.splitlines()
        if line.startswith("quickchange_adapter_time_to_first_token_seconds_bucket")
    ]
    assert len(lines) == 8


def test_gauges_come_from_the_snapshot() -> None:
    metrics = ServerMetrics()
    resident = ResidentAdapter("d", 10, 0, 0, 0)
    state = EngineSnapshot(
        num_running=3,
        num_waiting=2,
        kv_blocks_total=8,
        kv_blocks_used=2,
        last_step_monotonic_s=time.monotonic() - 5,
        memory_bytes={"base": 123},
        adapters={"d": resident},
    )
    metrics.watch(lambda: state)
    assert value(metrics, "requests_running") == 3
    assert value(metrics, "requests_waiting") == 2
    assert value(metrics, "kv_cache_usage_ratio") == 0.25
    assert value(metrics, "memory_bytes", part="base") == 123
    assert value(metrics, "adapters", tier="host") == 1
    assert value(metrics, "adapters", tier="device") == 0
    last = value(metrics, "engine_last_step_timestamp_seconds")
    assert last == pytest.approx(time.time() - 5, abs=1)


def test_text_is_rendered_at_most_four_times_a_second() -> None:
    metrics = ServerMetrics()
    scrapes = []

    def snapshot() -> EngineSnapshot:
        scrapes.append(time.monotonic())
        return EngineSnapshot()

    metrics.watch(snapshot)
    first = metrics.render()
    assert all(metrics.render() == first for _ in range(50))
    assert len(scrapes) == 1
    time.sleep(RENDER_INTERVAL_S)
    metrics.render()
    assert len(scrapes) == 2


def test_engine_thread_and_event_loop_may_count_at_once() -> None:
    metrics = ServerMetrics()

    def count() -> None:
        for number in range(500):
            metrics.on_step(step())
            end(metrics, f"a{number % 50}")

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert value(metrics, "requests_total", outcome="ok") == 2000
    family = next(
        family
        for family in text_string_to_metric_families(metrics.render()[0].decode())
        if family.name == "quickchange_adapter_requests"
    )
    assert sum(sample.value for sample in family.samples) == 2000
    assert len(family.samples) == 33


async def test_outcomes_over_http(
    client: httpx.AsyncClient, scripted_engine: ScriptedEngine
) -> None:
    body = {"model": "ada", "prompt": "the lazy dog"}
    await client.post("/v1/completions", json=body)
    scripted_engine.fail_after = 1
    await client.post("/v1/completions", json=body)
    scripted_engine.max_queue = 0
    await client.post("/v1/completions", json=body)
    await client.post("/v1/completions", json={**body, "model": "no-such-model"})
    text = (await client.get("/metrics")).text
    assert 'quickchange_requests_total{outcome="ok"} 1.0' in text
    assert 'quickchange_requests_total{outcome="error"} 1.0' in text
    assert 'quickchange_requests_total{outcome="rejected"} 2.0' in text
    assert 'quickchange_adapter_requests_total{adapter="ada",outcome="error"} 1.0' in text
    assert "no-such-model" not in text
    assert "quickchange_time_to_first_token_seconds_count 2.0" in text
