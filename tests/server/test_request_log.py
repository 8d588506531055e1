"""One line for each request, without anybody's words; and the same as spans."""

import contextlib
import io
import json
import logging
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace

import httpx
import pytest
import pytest_asyncio
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from quickchange_server.api.app import AppServices, create_app
from quickchange_server.request_log import log_request, set_up_logging
from quickchange_server.request_record import RequestRecord
from quickchange_server.tracing import RequestTracer

from tests.server.conftest import DIGEST_A, serve_in_process
from tests.server.scripted_engine import ScriptedEngine

SECRET = "the word nobody may read"
TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = "b7ad6b7169203331"


@pytest.fixture
def records() -> list[RequestRecord]:
    return []


@pytest.fixture
def spans() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def observed(
    services: AppServices, records: list[RequestRecord], spans: InMemorySpanExporter
) -> AppServices:
    """Return services whose requests are logged, traced and kept."""
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(spans))
    observers = (log_request, RequestTracer(provider).on_request, records.append)
    return replace(services, observers=observers)


@pytest_asyncio.fixture
async def caller(observed: AppServices) -> AsyncIterator[httpx.AsyncClient]:
    async for each in serve_in_process(create_app(observed)):
        yield each


@pytest.fixture
def log_text() -> Iterator[io.StringIO]:
    text = io.StringIO()
    handler = set_up_logging("info", "json", text)
    yield text
    logging.getLogger().removeHandler(handler)
    for room in ("quickchange_server", "quickchange_adapters"):
        logging.getLogger(room).setLevel(logging.NOTSET)


def lines(text: io.StringIO) -> list[dict[str, object]]:
    return [json.loads(line) for line in text.getvalue().splitlines()]


@pytest.mark.parametrize("stream", [False, True])
async def test_a_generation_s_line_has_its_stages_and_no_words(
    caller: httpx.AsyncClient, log_text: io.StringIO, stream: bool
) -> None:
    body = {"model": "ada", "prompt": SECRET, "max_tokens": 3, "stream": stream}
    answer = await caller.post("/v1/completions", json=body, headers={"x-request-id": "r-1"})
    assert answer.status_code == 200
    await caller.get("/readyz")
    (line,) = lines(log_text)
    assert line["message"] == "POST /v1/completions 200"
    assert (line["request_id"], line["model"], line["tenant"]) == ("r-1", "ada", "default")
    assert line["adapter_digest"] == DIGEST_A[:12]
    assert (line["outcome"], line["finish_reason"]) == ("ok", "length")
    assert line["generated_tokens"] == 3
    assert all(isinstance(line[f"{stage}_s"], float) for stage in ("queue", "prefill", "decode"))
    assert "nobody" not in log_text.getvalue()


async def test_prompts_are_told_where_the_operator_asks_for_them(
    observed: AppServices, records: list[RequestRecord]
) -> None:
    async for caller in serve_in_process(create_app(replace(observed, shows_prompts=True))):
        body = {"model": "ada", "prompt": SECRET, "max_tokens": 1}
        await caller.post("/v1/completions", json=body)
    generation = records[0].generation
    assert generation is not None
    assert generation.prompts is not None
    assert SECRET in generation.prompts[0]


async def test_a_refusal_has_its_code_and_no_line_break(
    caller: httpx.AsyncClient, log_text: io.StringIO
) -> None:
    await caller.post("/v1/completions", json={"model": "nobody", "prompt": "x"})
    await caller.get("/v1/%0a%1b[31mforged")
    refused, missing = lines(log_text)
    assert (refused["error"], refused["message"]) == (
        "model_not_found",
        "POST /v1/completions 404",
    )
    assert missing["message"] == "GET /v1/??[31mforged 404"


async def test_every_refusal_has_its_code(
    observed: AppServices, records: list[RequestRecord]
) -> None:
    app = create_app(observed)
    async for caller in serve_in_process(app):
        body = {"model": "ada", "prompt": 3}
        await caller.post("/v1/completions", json=body)
        await caller.post("/v1/completions", content=b"x=1", headers={"content-type": "text/plain"})
        await caller.get("/v1/models", headers={"host": "evil.example"})
        app.state.drain.begin()
        await caller.post("/generate", json={"inputs": "x"})
    assert [(record.status, record.error_code) for record in records] == [
        (400, "invalid_request"),
        (415, "unsupported_media_type"),
        (403, "foreign_host"),
        (503, "draining"),
    ]


async def test_a_stream_that_breaks_off_is_a_failure_in_log_and_traces(
    caller: httpx.AsyncClient,
    scripted_engine: ScriptedEngine,
    log_text: io.StringIO,
    spans: InMemorySpanExporter,
) -> None:
    scripted_engine.fail_after = 1
    body = {"model": "ada", "prompt": SECRET, "max_tokens": 3, "stream": True}
    answer = await caller.post("/v1/completions", json=body)
    assert (answer.status_code, "[DONE]" in answer.text) == (200, False)
    (line,) = lines(log_text)
    assert (line["level"], line["outcome"]) == ("warning", "error")
    assert line["error"] == "not_finite"
    whole = spans.get_finished_spans()[-1]
    assert not whole.status.is_ok
    assert dict(whole.attributes or {})["error.type"] == "not_finite"


async def test_a_mistake_of_ours_has_a_code(
    caller: httpx.AsyncClient, observed: AppServices, log_text: io.StringIO
) -> None:
    def fail() -> None:
        raise RuntimeError("no")

    object.__setattr__(observed.engine, "snapshot", fail)
    with contextlib.suppress(RuntimeError):  # what calls in this process may see it
        await caller.get("/readyz")
    assert [(line["level"], line["error"]) for line in lines(log_text)] == [
        ("warning", "internal_error")
    ]


async def test_a_parent_that_is_too_long_is_left_without_a_word(
    caller: httpx.AsyncClient, log_text: io.StringIO, spans: InMemorySpanExporter
) -> None:
    await caller.get("/v1/models", headers={"traceparent": "0" * 5000})
    assert len(lines(log_text)) == 1
    assert spans.get_finished_spans()[-1].parent is None


def test_text_lines_quote_what_could_be_mistaken() -> None:
    text = io.StringIO()
    handler = set_up_logging("info", "text", text)
    try:
        record = RequestRecord("id", "GET", "/v1/models", status=200, tenant='a "b"\n')
        log_request(record)
    finally:
        logging.getLogger().removeHandler(handler)
        logging.getLogger("quickchange_server").setLevel(logging.NOTSET)
        logging.getLogger("quickchange_adapters").setLevel(logging.NOTSET)
    assert text.getvalue().count("\n") == 1
    assert ' info GET /v1/models 200 request_id=id duration_s=0.0 tenant="a \\"b\\"\\n"' in (
        text.getvalue()
    )


async def test_spans_are_the_request_and_its_stages_under_the_caller_s_trace(
    caller: httpx.AsyncClient, spans: InMemorySpanExporter
) -> None:
    headers = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
    body = {"model": "ada", "max_tokens": 3, "messages": [{"role": "user", "content": SECRET}]}
    answer = await caller.post("/v1/chat/completions", json=body, headers=headers)
    assert answer.status_code == 200
    await caller.get("/metrics")
    found: dict[str, ReadableSpan] = {span.name: span for span in spans.get_finished_spans()}
    assert list(found) == ["queue", "prefill", "decode", "chat ada"]
    whole = found["chat ada"]
    assert whole.parent is not None
    assert f"{whole.context.trace_id:032x}" == TRACE
    assert f"{whole.parent.span_id:016x}" == PARENT
    attributes = dict(whole.attributes or {})
    assert attributes["gen_ai.operation.name"] == "chat"
    assert attributes["gen_ai.usage.output_tokens"] == 3
    assert attributes["quickchange.adapter.digests"] == (DIGEST_A,)
    assert attributes["http.route"] == "/v1/chat/completions"
    assert SECRET not in str(attributes)
    for stage in ("queue", "prefill", "decode"):
        parent = found[stage].parent
        assert parent is not None
        assert parent.span_id == whole.context.span_id


async def test_a_failing_observer_costs_no_answer(services: AppServices) -> None:
    def fail(record: RequestRecord) -> None:
        raise RuntimeError("no")

    async for caller in serve_in_process(create_app(replace(services, observers=(fail,)))):
        assert (await caller.get("/version")).status_code == 200
