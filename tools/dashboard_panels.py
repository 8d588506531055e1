"""What the Grafana dashboard shows: rows of panels, as plain values.

Latency, throughput and scheduler are laid out as those who know vLLM's dashboard expect them. Knows
nothing of Grafana's JSON; dashboard.py writes that.
"""

from tools.dashboard_queries import (
    Panel,
    Query,
    Row,
    memory,
    metric,
    over,
    percentiles,
    rate,
    ratio,
)

ADAPTER = 'adapter=~"$adapter"'
UPLOADS = 'route="/v1/adapters", method="POST"'

OVERVIEW = Row(
    "Overview",
    (
        Panel("Requests per second", (Query(rate("requests_total")),), "reqps", "stat", width=3),
        Panel(
            "Tokens per second",
            (Query(rate("generation_tokens_total")),),
            kind="stat",
            text="Generated ones.",
            width=3,
        ),
        Panel(
            "TTFT p95",
            percentiles("time_to_first_token_seconds", (0.95,)),
            "s",
            "stat",
            width=3,
        ),
        Panel(
            "Requests that failed",
            (
                Query(
                    ratio(
                        rate("requests_total", "", 'outcome="error"'),
                        rate("requests_total"),
                    )
                ),
            ),
            "percentunit",
            "stat",
            width=3,
        ),
        Panel("Waiting", (Query(f"sum({metric('requests_waiting')})"),), kind="stat", width=3),
        Panel(
            "KV cache in use",
            (Query(f"max({metric('kv_cache_usage_ratio')})"),),
            "percentunit",
            "stat",
            text="Of the fullest server.",
            width=3,
        ),
        Panel(
            "Silence of the engine",
            (Query(f"max(time() - {metric('engine_heartbeat_timestamp_seconds')})"),),
            "s",
            "stat",
            text="Since its last sign of life: at most about a second.",
            width=3,
        ),
        Panel(
            "Running",
            (Query(metric("build_info"), "{{version}} {{base}} {{dtype}}"),),
            kind="stat",
            text="Version, base and dtype of each server.",
            width=3,
        ),
    ),
)

LATENCY = Row(
    "Latency",
    (
        Panel("E2E request latency", percentiles("request_duration_seconds"), "s"),
        Panel("Time to first token", percentiles("time_to_first_token_seconds"), "s"),
        Panel("Inter-token latency", percentiles("inter_token_latency_seconds"), "s"),
        Panel("Time per output token", percentiles("time_per_output_token_seconds"), "s"),
        Panel("Queue time", percentiles("request_queue_seconds"), "s"),
        Panel("Prefill time", percentiles("prefill_seconds"), "s"),
    ),
)

THROUGHPUT = Row(
    "Throughput and scheduler",
    (
        Panel(
            "Token throughput",
            (
                Query(rate("prompt_tokens_total"), "prompt"),
                Query(rate("generation_tokens_total"), "generation"),
            ),
            text="Tokens per second.",
        ),
        Panel(
            "Scheduler state",
            (
                Query(f"sum({metric('requests_running')})", "running"),
                Query(f"sum({metric('requests_waiting')})", "waiting"),
            ),
        ),
        Panel(
            "KV cache usage",
            (Query(metric("kv_cache_usage_ratio"), "{{instance}}"),),
            "percentunit",
        ),
        Panel(
            "Rows and adapters per step",
            (
                Query(ratio(rate("batch_rows_sum"), rate("batch_rows_count")), "rows"),
                Query(ratio(rate("batch_adapters_sum"), rate("batch_adapters_count")), "adapters"),
            ),
            text="Means: are steps really mixed?",
        ),
        Panel(
            "Steps by weights",
            (Query(rate("steps_total", "weights"), "{{weights}}"),),
            "ops",
            text="On the base alone, with adapters' updates, or on one merged copy.",
            is_stacked=True,
        ),
        Panel("Step time", percentiles("step_seconds", (0.5, 0.99), "kind"), "s"),
        Panel(
            "Prefix cache hit rate",
            (
                Query(
                    ratio(rate("prefix_cache_hits_total"), rate("prefix_cache_queries_total")),
                    "hits",
                ),
            ),
            "percentunit",
        ),
        Panel("Preemptions", (Query(rate("preemptions_total"), "preemptions"),), "ops"),
        Panel(
            "HTTP requests",
            (Query(rate("http_requests_total", "status"), "{{status}}"),),
            "reqps",
            is_stacked=True,
        ),
    ),
)

REQUESTS = Row(
    "Requests",
    (
        Panel(
            "Outcomes",
            (Query(rate("requests_total", "outcome"), "{{outcome}}"),),
            "reqps",
            width=6,
            is_stacked=True,
        ),
        Panel(
            "Finish reasons",
            (Query(rate("choices_total", "finish_reason"), "{{finish_reason}}"),),
            "ops",
            width=6,
            is_stacked=True,
        ),
        Panel(
            "Prompt length",
            (Query(rate("request_prompt_tokens_bucket", "le"), "{{le}}"),),
            kind="heatmap",
            text="Tokens of finished requests.",
            width=6,
        ),
        Panel(
            "Generation length",
            (Query(rate("request_generation_tokens_bucket", "le"), "{{le}}"),),
            kind="heatmap",
            text="Tokens of finished requests.",
            width=6,
        ),
    ),
)

ADAPTERS = Row(
    "Adapters: who is hot, where they are, what they cost",
    (
        Panel(
            "Hottest adapters",
            (
                Query(
                    f"topk(10, {rate('adapter_requests_total', 'adapter', ADAPTER)})", "{{adapter}}"
                ),
            ),
            "reqps",
            "bargauge",
            text="Requests per second. `_other`: all that have no series of their own.",
        ),
        Panel(
            "Tokens by adapter",
            (
                Query(
                    f"topk(10, {rate('adapter_tokens_total', 'adapter, kind', ADAPTER)})",
                    "{{adapter}} {{kind}}",
                ),
            ),
            text="Per second.",
        ),
        Panel(
            "TTFT p95 by adapter",
            percentiles("adapter_time_to_first_token_seconds", (0.95,), "adapter", ADAPTER),
            "s",
        ),
        Panel(
            "Duration p95 by adapter",
            percentiles("adapter_request_duration_seconds", (0.95,), "adapter", ADAPTER),
            "s",
        ),
        Panel(
            "Loaded versions",
            (Query(f"sum by (tier) ({metric('adapters')})", "{{tier}}"),),
            text="With bytes in host memory, and on the device.",
        ),
        Panel(
            "Where requests found their adapter",
            (Query(rate("adapter_hits_total", "tier"), "{{tier}}"),),
            "reqps",
            text="Nearest first: device, host, disk, remote.",
            is_stacked=True,
        ),
        Panel(
            "Load time",
            over("[15m]", percentiles("adapter_load_seconds", (0.5, 0.95), "from_tier, to_tier")),
            "s",
            text="Of what came nearer within a quarter of an hour, as that is rare.",
        ),
        Panel(
            "Evictions",
            (Query(rate("adapter_evictions_total", "tier"), "{{tier}}"),),
            "ops",
            text="Versions that made room for others. Beside many requests, memory is too small.",
        ),
        Panel(
            "Loads that failed",
            (Query(rate("adapter_load_failures_total", "code"), "{{code}}"),),
            "ops",
        ),
        Panel(
            "Bytes by adapter",
            (
                Query(
                    f"sum by (adapter, tier) ({metric('adapter_bytes', ADAPTER)})",
                    "{{adapter}} {{tier}}",
                ),
            ),
            "bytes",
            "table",
            text="In host memory, on the device, and in merged copies.",
        ),
        Panel(
            "Versions",
            (
                Query(
                    f"max by (adapter, version, digest) ({metric('adapter_info', ADAPTER)})",
                    "{{adapter}}:{{version}}",
                ),
            ),
            kind="table",
            text="The default version, and those that are loaded.",
        ),
        Panel(
            "Merged by traffic",
            (Query(rate("auto_merges_total", "action, reason"), "{{action}} {{reason}}"),),
            "ops",
            text="What --auto-merge did.",
            empty_until="the first of them",
        ),
        Panel(
            "Wishes not fulfilled",
            (Query(f"sum by (wish) ({metric('adapters_unmet')})", "{{wish}}"),),
            text="Versions that are to be pinned or merged and are not.",
        ),
    ),
)

MEMORY = Row(
    "Memory",
    (
        Panel(
            "Parts",
            (
                Query(
                    f"sum by (part) ({metric('process_memory_bytes')})",
                    "{{part}}",
                ),
            ),
            "bytes",
            text="Of the processes' resident size. A growing `rest` is a leak.",
            width=12,
            is_stacked=True,
        ),
        Panel(
            "Processes",
            (Query('process_resident_memory_bytes{instance=~"$instance"}', "{{instance}}"),),
            "bytes",
            text="Resident size.",
            width=6,
        ),
        Panel(
            "Ceilings in use",
            (
                Query(
                    ratio(
                        memory("adapter_pool_used"),
                        memory("adapter_pool_total"),
                    ),
                    "adapters on the device",
                ),
                Query(
                    ratio(
                        memory("kv_used"),
                        memory("kv_total"),
                    ),
                    "KV cache",
                ),
            ),
            "percentunit",
            width=6,
        ),
    ),
)

STORE = Row(
    "Uploads, store and catalog",
    (
        Panel(
            "Uploads",
            (Query(rate("http_requests_total", "status", UPLOADS), "{{status}}"),),
            "reqps",
            text="201: a new version. 200: the same bytes were there.",
            width=6,
            empty_until="the first upload",
        ),
        Panel(
            "Refused uploads",
            (Query(rate("adapter_rejections_total", "code"), "{{code}}"),),
            "reqps",
            width=6,
            empty_until="the first upload that is refused",
        ),
        Panel(
            "Store and catalog answer",
            (
                Query(metric("store_up"), "store {{instance}}"),
                Query(metric("catalog_up"), "catalog {{instance}}"),
            ),
            text="1: when they were last asked.",
            width=6,
        ),
        Panel(
            "Cache of the object store",
            (
                Query(rate("store_cache_reads_total", "result"), "{{result}}"),
                Query(rate("store_cache_evictions_total"), "evictions"),
            ),
            "ops",
            text="Files. Zero where the store is a folder.",
            width=6,
        ),
    ),
)

ROWS = (OVERVIEW, LATENCY, THROUGHPUT, REQUESTS, ADAPTERS, MEMORY, STORE)
