"""Traces: one span a request, sent by OTLP over HTTP, with the stages of a generation below it.

Spans are made when a request has ended, from the times that were taken anyway, and sent by a thread
of the exporter: a collector that is away costs requests nothing. Attribute names are those of
OpenTelemetry's semantic conventions for HTTP and for generative AI, and `quickchange.…` for the
rest. Prompts are never sent.
"""

from collections.abc import Iterator
from typing import Any

from quickchange_server.errors import CannotStart
from quickchange_server.request_log import QUIET_ROUTES, stage_seconds
from quickchange_server.request_record import GenerationRecord, RequestRecord

NANO = 1_000_000_000
MAX_PARENT_CHARS = 128
STAGES = ("queue", "prefill", "decode")


class RequestTracer:
    """Turns request records into spans of one OpenTelemetry provider."""

    def __init__(self, provider: Any) -> None:
        from opentelemetry import trace
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._provider = provider
        self._tracer = provider.get_tracer("quickchange")
        self._propagator = TraceContextTextMapPropagator()
        self._trace = trace

    def on_request(self, record: RequestRecord) -> None:
        """Make the spans of a request; probes and scrapes have none."""
        if record.route in QUIET_ROUTES:
            return
        trace = self._trace
        is_sane = len(record.traceparent) <= MAX_PARENT_CHARS  # others are warned of, each time
        parent = self._propagator.extract({"traceparent": record.traceparent} if is_sane else {})
        span = self._tracer.start_span(
            _name(record),
            context=parent,
            kind=trace.SpanKind.SERVER,
            start_time=_nanoseconds(record.arrived_at),
            attributes=dict(_attributes(record)),
        )
        if record.is_failure:
            span.set_status(trace.Status(trace.StatusCode.ERROR, record.error_code))
        if record.generation is not None:
            self._add_stages(record, record.generation, trace.set_span_in_context(span))
        span.end(_nanoseconds(record.arrived_at + record.duration_s))

    def _add_stages(
        self, record: RequestRecord, generation: GenerationRecord, context: Any
    ) -> None:
        seconds = stage_seconds(generation, record.duration_s)
        start = record.arrived_at
        for stage in STAGES:
            if f"{stage}_s" not in seconds:
                return
            end = start + seconds[f"{stage}_s"]
            span = self._tracer.start_span(stage, context, start_time=_nanoseconds(start))
            span.end(_nanoseconds(end))
            start = end

    def stop(self) -> None:
        """Send what is left, for a few seconds at most."""
        self._provider.shutdown()


def open_tracer(endpoint: str, version: str) -> RequestTracer:
    """Return a tracer that sends to a collector's address, such as http://127.0.0.1:4318.

    Raises: CannotStart without OpenTelemetry's packages.
    """
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise CannotStart(
            "--otlp-endpoint needs OpenTelemetry: pip install 'quickchange-server[otel]'"
        ) from error
    path = "" if endpoint.rstrip("/").endswith("/v1/traces") else "/v1/traces"
    exporter = OTLPSpanExporter(endpoint=endpoint.rstrip("/") + path, timeout=3)
    resource = Resource.create({"service.name": "quickchange", "service.version": version})
    provider = TracerProvider(resource=resource)
    provider.add_span_processor(BatchSpanProcessor(exporter))
    return RequestTracer(provider)


def _name(record: RequestRecord) -> str:
    if record.generation is None:
        return f"{record.method} {record.route}"
    return f"{_operation(record.generation)} {record.generation.model}"


def _operation(generation: GenerationRecord) -> str:
    return "chat" if generation.is_chat else "text_completion"


def _attributes(record: RequestRecord) -> Iterator[tuple[str, Any]]:
    yield "http.request.method", record.method
    yield "http.route", record.route
    yield "http.response.status_code", record.status
    yield "quickchange.request_id", record.id
    if record.tenant:
        yield "quickchange.tenant", record.tenant
    if record.error_code:
        yield "error.type", record.error_code
    if (generation := record.generation) is not None:
        yield "gen_ai.provider.name", "quickchange"
        yield "gen_ai.operation.name", _operation(generation)
        yield "gen_ai.request.model", generation.model
        yield "gen_ai.request.choice.count", generation.num_choices
        yield "gen_ai.usage.input_tokens", generation.num_prompt_tokens
        yield "gen_ai.usage.output_tokens", generation.num_generated_tokens
        yield "gen_ai.response.finish_reasons", generation.finish_reasons
        yield "quickchange.usage.cached_tokens", generation.num_cached_tokens
        yield "quickchange.adapter.digests", generation.digests
        yield "quickchange.outcome", generation.outcome


def _nanoseconds(seconds: float) -> int:
    return int(seconds * NANO)
