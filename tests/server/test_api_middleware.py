from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from typing import Any

import httpx
import pytest
import pytest_asyncio
from fastapi import FastAPI
from quickchange_server.adapter_views import AdapterView
from quickchange_server.api.app import AppServices, BodyLimits, create_app
from starlette.types import Message

from tests.server.conftest import serve_in_process
from tests.server.scripted_adapters import ScriptedAdapters
from tests.server.scripted_engine import ScriptedEngine

PAGE = "https://app.example"
Headers = Sequence[tuple[bytes, bytes]]


@pytest_asyncio.fixture
async def open_client(services: AppServices) -> AsyncIterator[httpx.AsyncClient]:
    async for each in serve_in_process(create_app(replace(services, is_loopback_only=False))):
        yield each


@pytest_asyncio.fixture
async def cors_client(services: AppServices) -> AsyncIterator[httpx.AsyncClient]:
    async for each in serve_in_process(create_app(replace(services, cors_origins=(PAGE,)))):
        yield each


async def test_sane_request_id_is_kept(client: httpx.AsyncClient) -> None:
    answer = await client.get("/livez", headers={"x-request-id": "trace-1.2:3"})
    assert answer.headers["x-request-id"] == "trace-1.2:3"


@pytest.mark.parametrize("sent", [None, "", "a b", "x" * 129, "é", "<script>"])
async def test_other_request_ids_are_replaced(client: httpx.AsyncClient, sent: str | None) -> None:
    headers = {} if sent is None else {b"x-request-id": sent.encode()}
    answers = [await client.get("/livez", headers=headers) for _ in range(2)]
    ids = {answer.headers["x-request-id"] for answer in answers}
    assert len(ids) == 2
    assert sent not in ids


@pytest.mark.parametrize(
    "host",
    [
        *("localhost:8000", "127.0.0.1", "127.1.2.3:80", "[::1]:8000", "a.localhost"),
        *("localhost.", "localhost.:8000", "LOCALHOST", "127.0.0.1:"),
    ],
)
async def test_loopback_names_are_answered(client: httpx.AsyncClient, host: str) -> None:
    assert (await client.get("/livez", headers={"host": host})).status_code == 200


@pytest.mark.parametrize(
    "host",
    [
        *("evil.example", "10.0.0.1:8000", "", "localhost.evil.example", "[bad", "127.0.0.1@x"),
        *("evil.example@localhost", "localhost/evil.example", "localhost?evil.example"),
        *("localhost#evil.example", "localhost\\evil.example", "localhost, evil.example"),
        *("localhost..", ".", "localhost:80:80", "localhost:x", "[localhost]", "127.0.0.1."),
    ],
)
async def test_other_hosts_are_refused(client: httpx.AsyncClient, host: str) -> None:
    answer = await client.get("/v1/models", headers={"host": host})
    assert answer.status_code == 403
    assert answer.json()["error"]["code"] == "foreign_host"
    assert answer.headers["x-request-id"]


@pytest.mark.parametrize("hosts", [("localhost", "evil.example"), ("localhost", "localhost")])
async def test_a_second_host_header_is_refused(
    client: httpx.AsyncClient, hosts: tuple[str, ...]
) -> None:
    answer = await client.get("/v1/models", headers=[("host", host) for host in hosts])
    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "foreign_host")


async def ask_old(app: FastAPI, path: str, headers: Headers = (), version: str = "1.0") -> int:
    """Send a request by hand: httpx always names a host."""
    scope = {
        "type": "http",
        "http_version": version,
        "method": "GET",
        "path": path,
        "query_string": b"",
        "headers": list(headers),
    }
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    async def receive() -> Message:
        return {"type": "http.request", "body": b"", "more_body": False}

    await app(scope, receive, send)
    status: int = sent[0]["status"]
    return status


async def test_probes_without_host_pass_over_http_1_0(services: AppServices) -> None:
    app = create_app(services)
    async with app.router.lifespan_context(app):
        for path in ("/livez", "/readyz", "/health"):
            assert await ask_old(app, path) == 200
            assert await ask_old(app, path, version="1.1") == 403
            assert await ask_old(app, path, [(b"host", b"evil.example")]) == 403
            assert await ask_old(app, path, [(b"origin", b"https://evil.example")]) == 403
        assert await ask_old(app, "/v1/models") == 403


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        *(("http://localhost:3000", 200), ("https://127.0.0.1", 200), (PAGE, 403), ("null", 403)),
        *(("http://[bad", 403), ("http://evil.example@localhost", 403), ("localhost", 403)),
    ],
)
async def test_pages_of_other_sites_are_refused(
    client: httpx.AsyncClient, origin: str, status: int
) -> None:
    answer = await client.get("/v1/models", headers={"origin": origin})
    assert answer.status_code == status


async def test_guard_is_off_when_the_server_is_public(open_client: httpx.AsyncClient) -> None:
    headers = {"host": "models.example", "origin": PAGE}
    assert (await open_client.get("/v1/models", headers=headers)).status_code == 200


async def test_allowed_origin_gets_cors_headers(cors_client: httpx.AsyncClient) -> None:
    answer = await cors_client.get("/v1/models", headers={"origin": PAGE})
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == PAGE
    preflight = await cors_client.options(
        "/v1/completions", headers={"origin": PAGE, "access-control-request-method": "POST"}
    )
    assert preflight.status_code == 200
    other = await cors_client.get("/v1/models", headers={"origin": "https://evil.example"})
    assert other.status_code == 403


class Failing(ScriptedAdapters):
    """Makes a mistake in a look-up."""

    async def get(self, name: str, *, tenant: str = "default") -> AdapterView:
        raise RuntimeError("a mistake of ours")


REFUSED: list[tuple[str, str, dict[str, Any], int]] = [
    ("GET", "/v1/adapters/ada", {}, 500),
    ("GET", "/nowhere", {}, 404),
    ("POST", "/v1/completions", {"json": {"model": 3}}, 400),
    ("POST", "/v1/completions", {"content": b"x" * 2000}, 413),
    ("POST", "/v1/completions", {"json": {"model": "tiny", "prompt": "a"}}, 429),
    ("GET", "/v1/models", {"headers": {"host": "evil.example"}}, 403),
]


@pytest.mark.parametrize(("method", "path", "sent", "status"), REFUSED)
async def test_pages_can_read_every_refusal(
    services: AppServices,
    scripted_engine: ScriptedEngine,
    method: str,
    path: str,
    sent: dict[str, Any],
    status: int,
) -> None:
    limits = BodyLimits(json_bytes=1000)
    changed = replace(services, cors_origins=(PAGE,), limits=limits, adapters=Failing())
    scripted_engine.max_queue = 0
    headers = {"origin": PAGE, "x-request-id": "r-1", **sent.pop("headers", {})}
    async for client in serve_in_process(create_app(changed)):
        answer = await client.request(method, path, headers=headers, **sent)
        assert answer.status_code == status
        assert answer.headers["access-control-allow-origin"] == PAGE
        assert answer.headers["x-request-id"] == "r-1"


async def test_pages_can_read_that_a_server_drains(services: AppServices) -> None:
    app = create_app(replace(services, cors_origins=(PAGE,)))
    body = {"model": "tiny", "prompt": "a"}
    async for client in serve_in_process(app):
        app.state.drain.begin()
        asking = {"origin": PAGE, "access-control-request-method": "POST"}
        preflight = await client.options("/v1/completions", headers=asking)
        refused = await client.post("/v1/completions", json=body, headers={"origin": PAGE})
        read = await client.get("/v1/models", headers={"origin": PAGE})
        assert [preflight.status_code, refused.status_code, read.status_code] == [200, 503, 200]
        assert refused.json()["error"]["code"] == "draining"
        assert "retry-after" in refused.headers
        for answer in (preflight, refused, read):
            assert answer.headers["access-control-allow-origin"] == PAGE
            assert answer.headers["connection"] == "close"
        assert app.state.drain.num_running == 0


async def test_http_requests_are_counted_by_template(client: httpx.AsyncClient) -> None:
    await client.get("/v1/models/ada")
    await client.get("/v1/models/nobody")
    await client.get("/some/path/of/mine")
    await client.request("WIBBLE", "/livez")
    text = (await client.get("/metrics")).text
    route = 'route="/v1/models/{model_id:path}"'
    for status in (200, 404):
        line = f'quickchange_http_requests_total{{method="GET",{route},status="{status}"}} 1.0'
        assert line in text
    assert 'route="_unmatched",status="404"' in text
    assert 'method="_other"' in text
    assert "mine" not in text
    assert "WIBBLE" not in text
