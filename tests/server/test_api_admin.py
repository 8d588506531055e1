"""The operators' port: probes and metrics without a key, and nothing else."""

from collections.abc import AsyncIterator
from dataclasses import replace

import httpx
import pytest
import pytest_asyncio
from fastapi import FastAPI
from quickchange_adapters.api_keys import token_hash
from quickchange_server.api.admin_app import create_admin_app
from quickchange_server.api.app import AppServices, create_app
from quickchange_server.keyring import Keyring

from tests.server.conftest import BASE_URL, serve_in_process
from tests.server.routes import routes_of
from tests.server.scripted_engine import ScriptedEngine

SHOWN = {"/livez", "/readyz", "/health", "/version", "/metrics"}


@pytest.fixture
def api(services: AppServices) -> FastAPI:
    return create_app(replace(services, keyring=Keyring(token_hash("k" * 40))))


@pytest_asyncio.fixture
async def admin(api: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    async for _ in serve_in_process(api):
        transport = httpx.ASGITransport(create_admin_app(api))
        async with httpx.AsyncClient(transport=transport, base_url=BASE_URL) as client:
            yield client


async def test_probes_and_metrics_need_no_key_there(api: FastAPI, admin: httpx.AsyncClient) -> None:
    assert {route.template for route in routes_of(create_admin_app(api))} == SHOWN
    for path in SHOWN:
        assert (await admin.get(path)).status_code == 200
    assert "quickchange_requests_running" in (await admin.get("/metrics")).text


async def test_nothing_else_is_there(api: FastAPI, admin: httpx.AsyncClient) -> None:
    for route in routes_of(api):
        if route.template not in SHOWN:
            answer = await admin.request(route.method, route.path)
            assert answer.status_code == 404
            if route.method != "HEAD":
                assert '"code": "not_found"' in answer.text
    assert (await admin.post("/metrics", content=b"x")).status_code == 405


async def test_it_tells_the_api_s_state(
    api: FastAPI, admin: httpx.AsyncClient, scripted_engine: ScriptedEngine
) -> None:
    api.state.is_ready = False
    assert (await admin.get("/readyz")).status_code == 503
    assert (await admin.get("/livez")).status_code == 200
    scripted_engine.is_running = False
    assert (await admin.get("/livez")).status_code == 503


async def test_on_loopback_it_answers_this_machine_alone(admin: httpx.AsyncClient) -> None:
    for headers in ({"host": "evil.example"}, {"origin": "https://evil.example"}):
        assert (await admin.get("/metrics", headers=headers)).status_code == 403


async def test_on_a_public_address_it_answers_by_any_name(services: AppServices) -> None:
    app = create_app(replace(services, is_loopback_only=False))
    async for _ in serve_in_process(app):
        transport = httpx.ASGITransport(create_admin_app(app))
        async with httpx.AsyncClient(transport=transport, base_url="http://10.1.2.3") as client:
            assert (await client.get("/metrics")).status_code == 200
