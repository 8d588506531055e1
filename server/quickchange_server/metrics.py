"""What the server measures, under the names of the public contract. Knows no routes, no tensors.

Histograms and counters are fed by method calls; gauges are read from the engine's snapshot when a
scrape asks (snapshot_collector.py). Label values come from registered names only.
"""

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
)
from prometheus_client.exposition import choose_encoder
from quickchange_adapters.version_states import Wish

from quickchange_server.adapter_labels import AdapterLabels
from quickchange_server.engine.interface import EngineSnapshot
from quickchange_server.engine.observer import StepStats
from quickchange_server.snapshot_collector import SnapshotCollector
from quickchange_server.wish_collector import WishCollector

Outcome = Literal["ok", "error", "cancelled", "rejected"]

PREFIX = "quickchange_"
SECONDS = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5),
    *(1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0),
)
STEP_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12)
EIGHT_SECONDS = (0.001, 0.01, 0.05, 0.25, 1.0, 5.0, 30.0)
"""Seven bounds and +Inf: eight buckets for what is counted per adapter."""
COUNTS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64, 128, 256)
RENDER_INTERVAL_S = 0.25


@dataclass(frozen=True, slots=True)
class RequestSummary:
    """One API request at its end; all its choices together.

    `adapters` are the registered names it used, none for the base. A time of None was not reached.
    """

    outcome: Outcome
    adapters: Sequence[str] = ()
    duration_s: float | None = None
    queue_s: float | None = None
    num_prompt_tokens: int = 0
    num_generated_tokens: int = 0


class ServerMetrics:
    """All metrics of one server, in a registry of its own. Implements `EngineObserver`."""

    def __init__(self, max_adapters: int = 32) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self._make_request_metrics()
        self._make_engine_metrics()
        self._make_adapter_metrics(max_adapters)
        self._cache: dict[str, tuple[float, bytes]] = {}
        self._render_lock = threading.Lock()

    def _make_request_metrics(self) -> None:
        self._ttft = self._histogram("time_to_first_token_seconds", "Arrival to first token.")
        self._gap = self._histogram("inter_token_latency_seconds", "Gap between two tokens.")
        self._per_token = self._histogram(
            "time_per_output_token_seconds", "Mean gap between the tokens of one answer."
        )
        self._duration = self._histogram("request_duration_seconds", "Arrival to last token.")
        self._queue = self._histogram("request_queue_seconds", "Arrival to first schedule.")
        self._requests = self._counter("requests_total", "Generation requests.", "outcome")
        self._http = self._counter(
            "http_requests_total", "HTTP requests.", "route", "method", "status"
        )
        self._prompt_tokens = self._counter("prompt_tokens_total", "Prompt tokens.")
        self._generated_tokens = self._counter("generation_tokens_total", "Generated tokens.")
        for outcome in ("ok", "error", "cancelled", "rejected"):
            self._requests.labels(outcome)

    def _make_engine_metrics(self) -> None:
        self._step = self._histogram("step_seconds", "One engine step.", "kind", STEP_SECONDS)
        self._rows = self._histogram("batch_rows", "Requests in a step.", buckets=COUNTS)
        self._batch_adapters = self._histogram(
            "batch_adapters", "Distinct adapters in a step.", buckets=(0, *COUNTS)
        )
        self._steps = self._counter("steps_total", "Engine steps.", "weights")
        self._preemptions = self._counter("preemptions_total", "Requests sent back to wait.")
        self._prefix_queries = self._counter(
            "prefix_cache_queries_total", "Prompt tokens looked up in the prefix cache."
        )
        self._prefix_hits = self._counter(
            "prefix_cache_hits_total", "Prompt tokens found in the prefix cache."
        )
        for weights in ("base", "unmerged", "merged"):
            self._steps.labels(weights)

    def _make_adapter_metrics(self, max_adapters: int) -> None:
        self._adapter_requests = self._counter(
            "adapter_requests_total", "Generation requests.", "adapter", "outcome"
        )
        self._adapter_tokens = self._counter("adapter_tokens_total", "Tokens.", "adapter", "kind")
        self._adapter_ttft = self._histogram(
            "adapter_time_to_first_token_seconds", "As without label.", "adapter", EIGHT_SECONDS
        )
        self._adapter_duration = self._histogram(
            "adapter_request_duration_seconds", "As without label.", "adapter", EIGHT_SECONDS
        )
        self._rejections = self._counter("adapter_rejections_total", "Refused uploads.", "code")
        labelled = (
            self._adapter_requests,
            self._adapter_tokens,
            self._adapter_ttft,
            self._adapter_duration,
        )
        self._labels = AdapterLabels(max_adapters, labelled)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(PREFIX + name, text, labels, registry=self.registry)

    def _histogram(
        self, name: str, text: str, label: str = "", buckets: Sequence[float] = SECONDS
    ) -> Histogram:
        labels = (label,) if label else ()
        return Histogram(PREFIX + name, text, labels, buckets=buckets, registry=self.registry)

    def watch(self, snapshot: Callable[[], EngineSnapshot]) -> None:
        """Show the engine's state as gauges from now on."""
        self.registry.register(SnapshotCollector(snapshot))

    def watch_catalog(self, is_up: Callable[[], bool]) -> None:
        """Show from now on whether the catalog answered when it was last asked."""
        self._watch("catalog_up", "1 if the catalog answered when it was last asked.", is_up)

    def watch_store(self, is_up: Callable[[], bool]) -> None:
        """Show from now on whether the object store answered when it was last asked."""
        self._watch("store_up", "1 if the object store answered when it was last asked.", is_up)

    def _watch(self, name: str, text: str, is_true: Callable[[], bool]) -> None:
        Gauge(PREFIX + name, text, registry=self.registry).set_function(is_true)

    def watch_wishes(self, num_unmet: Callable[[], Mapping[Wish, int]]) -> None:
        """Show from now on how many wishes of the catalog are not fulfilled here."""
        self.registry.register(WishCollector(num_unmet))

    def on_step(self, stats: StepStats) -> None:
        """Take note of one engine step; called on the engine thread."""
        self._step.labels(stats.kind).observe(stats.seconds)
        self._rows.observe(stats.num_rows)
        self._batch_adapters.observe(stats.num_adapters)
        self._steps.labels(stats.weights).inc()
        self._preemptions.inc(stats.num_preempted)
        self._prefix_queries.inc(stats.prefix_queries)
        self._prefix_hits.inc(stats.prefix_hits)

    def on_http(self, route: str, method: str, status: int) -> None:
        """Count one HTTP request; `route` is a template, never a path."""
        self._http.labels(route, method, str(status)).inc()

    def on_request_start(self, adapters: Sequence[str]) -> None:
        """Make room for the series of the adapters that a request uses."""
        for name in adapters:
            self._labels.register(name)

    def on_first_token(self, seconds: float, adapters: Sequence[str]) -> None:
        """Take note of a choice's first token, `seconds` after the request arrived."""
        self._ttft.observe(seconds)
        for name in adapters:
            self._adapter_ttft.labels(self._labels.label(name)).observe(seconds)

    def on_token_gap(self, seconds: float) -> None:
        """Take note of the gap before one more token."""
        self._gap.observe(seconds)

    def on_choice_end(self, seconds_per_token: float) -> None:
        """Take note of the mean gap of one finished answer of two or more tokens."""
        self._per_token.observe(seconds_per_token)

    def on_request_end(self, summary: RequestSummary) -> None:
        """Count one API request and what it used."""
        self._requests.labels(summary.outcome).inc()
        self._prompt_tokens.inc(summary.num_prompt_tokens)
        self._generated_tokens.inc(summary.num_generated_tokens)
        if summary.queue_s is not None:
            self._queue.observe(summary.queue_s)
        if summary.duration_s is not None:
            self._duration.observe(summary.duration_s)
        for name in summary.adapters:
            self._count_adapter(self._labels.label(name), summary)

    def _count_adapter(self, label: str, summary: RequestSummary) -> None:
        self._adapter_requests.labels(label, summary.outcome).inc()
        self._adapter_tokens.labels(label, "prompt").inc(summary.num_prompt_tokens)
        self._adapter_tokens.labels(label, "generation").inc(summary.num_generated_tokens)
        if summary.duration_s is not None:
            self._adapter_duration.labels(label).observe(summary.duration_s)

    def on_upload_refused(self, code: str) -> None:
        """Count a refused upload; `code` is one of the contract's."""
        self._rejections.labels(code).inc()

    def forget_adapter(self, name: str) -> None:
        """Drop the series of a deleted adapter."""
        self._labels.forget(name)

    def render(self, accept: str = "") -> tuple[bytes, str]:
        """Return the text of a scrape and its content type, at most 250 ms old."""
        encode, content_type = choose_encoder(accept)
        with self._render_lock:
            made_at, text = self._cache.get(content_type, (float("-inf"), b""))
            if time.monotonic() - made_at >= RENDER_INTERVAL_S:
                text = encode(self.registry)
                self._cache[content_type] = (time.monotonic(), text)
        return text, content_type
