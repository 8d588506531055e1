"""Spans reach a collector over HTTP, in OTLP's own form; one that is away costs nothing."""

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from quickchange_server.request_record import RequestRecord
from quickchange_server.tracing import open_tracer

RECORD = RequestRecord("r-1", "GET", "/v1/models", route="/v1/models", status=200)


class Collector(BaseHTTPRequestHandler):
    """Keeps what is posted."""

    received: list[tuple[str, bytes]]

    def do_POST(self) -> None:  # noqa: N802
        body = self.rfile.read(int(self.headers["content-length"]))
        self.received.append((self.path, body))
        self.send_response(200)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


@pytest.fixture
def collector() -> Iterator[HTTPServer]:
    Collector.received = []
    server = HTTPServer(("127.0.0.1", 0), Collector)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_collector_gets_spans(collector: HTTPServer) -> None:
    tracer = open_tracer(f"http://127.0.0.1:{collector.server_port}", "1.2.3")
    tracer.on_request(RECORD)
    tracer.stop()
    ((path, body),) = Collector.received
    assert path == "/v1/traces"
    (resource,) = ExportTraceServiceRequest.FromString(body).resource_spans
    assert "quickchange" in str(resource.resource)
    (span,) = resource.scope_spans[0].spans
    assert span.name == "GET /v1/models"


def test_a_collector_that_is_away_costs_nothing(collector: HTTPServer) -> None:
    port = collector.server_port
    collector.socket.close()
    tracer = open_tracer(f"http://127.0.0.1:{port}", "1.2.3")
    for _ in range(100):
        tracer.on_request(RECORD)
