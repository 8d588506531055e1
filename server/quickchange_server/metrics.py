"""What the server measures, under the names of the public contract. Knows no routes, no tensors.

Histograms and counters are fed by method calls; gauges are read from the engine's snapshot when a
scrape asks (snapshot_collector.py). Label values come from registered names only.
"""

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
from quickchange_adapters.store import CacheCounts
from quickchange_adapters.version_states import Wish

from quickchange_server.adapter_collector import AdapterCollector
from quickchange_server.adapter_labels import AdapterLabels
from quickchange_server.adapter_names import AdapterNames
from quickchange_server.adapter_views import Tier
from quickchange_server.cache_collector import CacheCollector
from quickchange_server.engine.interface import EngineSnapshot
from quickchange_server.engine.observer import StepStats
from quickchange_server.gateway_collector import GatewayCollector
from quickchange_server.metrics_text import MetricsText
from quickchange_server.snapshot_collector import ProcessPartsCollector, SnapshotCollector
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
TOKENS = tuple(4**power for power in range(10))
QUOTAS = ("requests", "places", "loads", "uploads", "upload_rate")
TIERS: tuple[Tier, ...] = ("device", "host", "disk", "remote")
LOAD_FAILURES = ("adapter_memory", "base_mismatch", "rank_too_large", "store_unavailable")
"""Shown from the start, so that the first one is seen as an increase."""
LOADS: tuple[tuple[Tier, Tier], ...] = (("remote", "host"), ("disk", "host"), ("host", "device"))


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
    """All metrics of one server, in a registry of its own.

    Implements `EngineObserver` and `LoadObserver`.
    """

    def __init__(self, max_adapters: int = 32) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self._make_request_metrics()
        self._make_engine_metrics()
        self._make_adapter_metrics(max_adapters)
        self._make_load_metrics()
        text = MetricsText(self.registry)
        self.peek, self.render = text.peek, text.render

    def _make_request_metrics(self) -> None:
        self._ttft = self._histogram("time_to_first_token_seconds", "Arrival to first token.")
        self._gap = self._histogram("inter_token_latency_seconds", "Gap between two tokens.")
        self._per_token = self._histogram(
            "time_per_output_token_seconds", "Mean gap between the tokens of one answer."
        )
        self._duration = self._histogram("request_duration_seconds", "Arrival to last token.")
        self._queue = self._histogram("request_queue_seconds", "Arrival to first schedule.")
        self._prefill = self._histogram("prefill_seconds", "First schedule to first token.")
        self._prompt_length = self._histogram(
            "request_prompt_tokens", "Prompt tokens of a request.", buckets=TOKENS
        )
        self._answer_length = self._histogram(
            "request_generation_tokens", "Generated tokens of a request.", buckets=TOKENS
        )
        self._choices = self._counter("choices_total", "Answers that ended.", "finish_reason")
        self._requests = self._counter("requests_total", "Generation requests.", "outcome")
        self._http = self._counter(
            "http_requests_total", "HTTP requests.", "route", "method", "status"
        )
        self._quotas = self._counter("quota_rejections_total", "Over a tenant's quota.", "quota")
        self._prompt_tokens = self._counter("prompt_tokens_total", "Prompt tokens.")
        self._generated_tokens = self._counter("generation_tokens_total", "Generated tokens.")
        for quota in QUOTAS:
            self._quotas.labels(quota)
        for outcome in ("ok", "error", "cancelled", "rejected"):
            self._requests.labels(outcome)
        for reason in ("stop", "length"):
            self._choices.labels(reason)

    def _make_engine_metrics(self) -> None:
        self._step = self._histogram("step_seconds", "One engine step.", "kind", STEP_SECONDS)
        self._rows = self._histogram("batch_rows", "Requests in a step.", buckets=COUNTS)
        self._batch_adapters = self._histogram(
            "batch_adapters", "Distinct adapters in a step.", buckets=(0, *COUNTS)
        )
        self._steps = self._counter("steps_total", "Engine steps.", "weights")
        self._steps_ahead = self._counter(
            "steps_ahead_total", "Steps launched before the last one's tokens were known."
        )
        self._preemptions = self._counter("preemptions_total", "Requests sent back to wait.")
        self._prefix_queries = self._counter(
            "prefix_cache_queries_total", "Prompt tokens looked up in the prefix cache."
        )
        self._prefix_hits = self._counter(
            "prefix_cache_hits_total", "Prompt tokens found in the prefix cache."
        )
        for weights in ("base", "unmerged", "merged"):
            self._steps.labels(weights)
        self._auto_merges = self._counter(
            "auto_merges_total", "What --auto-merge did, and why.", "action", "reason"
        )

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

    def _make_load_metrics(self) -> None:
        self._loads = self._histogram(
            "adapter_load_seconds", "From one tier to another.", "from_tier", SECONDS, "to_tier"
        )
        self._hits = self._counter("adapter_hits_total", "Where requests found it.", "tier")
        self._load_failures = self._counter(
            "adapter_load_failures_total", "Loads that did not work.", "code"
        )
        for tier in TIERS:
            self._hits.labels(tier)
        for code in LOAD_FAILURES:
            self._load_failures.labels(code)
        for tiers in LOADS:
            self._loads.labels(*tiers)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(PREFIX + name, text, labels, registry=self.registry)

    def _histogram(
        self,
        name: str,
        text: str,
        label: str = "",
        buckets: Sequence[float] = SECONDS,
        label_2: str = "",
    ) -> Histogram:
        labels = tuple(each for each in (label, label_2) if each)
        return Histogram(PREFIX + name, text, labels, buckets=buckets, registry=self.registry)

    def watch(
        self,
        snapshot: Callable[[], EngineSnapshot],
        device_bytes: Callable[[], dict[str, int]] = dict,
    ) -> None:
        """Show the engine's state, and what it holds of a device, as gauges from now on."""
        self.registry.register(SnapshotCollector(snapshot, device_bytes))

    def watch_adapters(
        self,
        snapshot: Callable[[], EngineSnapshot],
        names: AdapterNames,
        loading: Callable[[], Sequence[str]],
        has_tenants: Callable[[], bool],
    ) -> None:
        """Show from now on where adapters are, and to gateways which ones are ready."""
        self.registry.register(AdapterCollector(snapshot, names, self._labels))
        self.registry.register(GatewayCollector(snapshot, names, loading, has_tenants))

    def watch_process(self, parts: Callable[[], dict[str, int]]) -> None:
        """Show from now on what the process has in memory."""
        self.registry.register(ProcessPartsCollector(parts))

    def show_build(self, version: str, base: str, dtype: str) -> None:
        """Say what is running."""
        labels = {"version": version, "base": base, "dtype": dtype}
        text = "1, with what is running."
        Gauge(f"{PREFIX}build_info", text, list(labels), registry=self.registry).labels(
            **labels
        ).set(1)

    def watch_catalog(self, is_up: Callable[[], bool]) -> None:
        """Show from now on whether the catalog answered when it was last asked."""
        self._watch("catalog_up", "1 if the catalog answered when it was last asked.", is_up)

    def watch_store(self, is_up: Callable[[], bool]) -> None:
        """Show from now on whether the object store answered when it was last asked."""
        self._watch("store_up", "1 if the object store answered when it was last asked.", is_up)

    def watch_cache(self, counts: Callable[[], CacheCounts | None]) -> None:
        """Show from now on how the store's cache does."""
        self.registry.register(CacheCollector(counts))

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
        self._steps_ahead.inc(stats.is_ahead)
        self._preemptions.inc(stats.num_preempted)
        self._prefix_queries.inc(stats.prefix_queries)
        self._prefix_hits.inc(stats.prefix_hits)

    def on_activation(self, seconds: float) -> None:
        """Take note of an adapter's copy to the device; called on the engine thread."""
        self._loads.labels("host", "device").observe(seconds)

    def on_hit(self, tier: Tier) -> None:
        """Count a request by where it found its adapter."""
        self._hits.labels(tier).inc()

    def on_load(self, from_tier: Tier, to_tier: Tier, seconds: float) -> None:
        """Take note of an adapter that was brought nearer to the model."""
        self._loads.labels(from_tier, to_tier).observe(seconds)

    def on_load_failure(self, code: str) -> None:
        """Count a load that did not work; `code` is one of the contract's."""
        self._load_failures.labels(code).inc()

    def on_auto_merge(self, action: str, reason: str) -> None:
        """Count one thing that traffic had merged, unmerged, or refused for want of room."""
        self._auto_merges.labels(action, reason).inc()

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

    def on_choice_end(self, finish_reason: str, seconds_per_token: float | None) -> None:
        """Take note of a finished answer, and of its mean gap if it has two or more tokens."""
        self._choices.labels(finish_reason).inc()
        if seconds_per_token is not None:
            self._per_token.observe(seconds_per_token)

    def on_prefill(self, seconds: float) -> None:
        """Take note of how long a choice took from its first schedule to its first token."""
        self._prefill.observe(seconds)

    def on_request_end(self, summary: RequestSummary) -> None:
        """Count one API request and what it used."""
        self._requests.labels(summary.outcome).inc()
        self._prompt_tokens.inc(summary.num_prompt_tokens)
        self._generated_tokens.inc(summary.num_generated_tokens)
        if summary.queue_s is not None:
            self._queue.observe(summary.queue_s)
        if summary.duration_s is not None:
            self._duration.observe(summary.duration_s)
            self._prompt_length.observe(summary.num_prompt_tokens)
            self._answer_length.observe(summary.num_generated_tokens)
        for name in summary.adapters:
            self._count_adapter(self._labels.label(name), summary)

    def _count_adapter(self, label: str, summary: RequestSummary) -> None:
        self._adapter_requests.labels(label, summary.outcome).inc()
        self._adapter_tokens.labels(label, "prompt").inc(summary.num_prompt_tokens)
        self._adapter_tokens.labels(label, "generation").inc(summary.num_generated_tokens)
        if summary.duration_s is not None:
            self._adapter_duration.labels(label).observe(summary.duration_s)

    def on_quota_refused(self, quota: str) -> None:
        """Count what a tenant's quota refused: one of `QUOTAS`."""
        self._quotas.labels(quota).inc()

    def on_upload_refused(self, code: str) -> None:
        """Count a refused upload; `code` is one of the contract's."""
        self._rejections.labels(code).inc()

    def forget_adapter(self, name: str) -> None:
        """Drop the series of a deleted adapter."""
        self._labels.forget(name)
