"""Deleting a name whose requests still run, while the name is taken anew."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
import pytest_asyncio
import torch
from quickchange_adapters.catalog import Catalog, sqlite_url
from quickchange_adapters.limits import AdapterLimits
from quickchange_adapters.store import LocalStore
from quickchange_server.adapter_service import AdapterService
from quickchange_server.api.app import AppServices, create_app
from quickchange_server.metrics import ServerMetrics
from quickchange_server.tokenizer import Tokenizer

from tests.adapters.adapter_files import config_values, q_pairs, small_spec, weights_bytes
from tests.server.conftest import serve_in_process
from tests.server.scripted_engine import ScriptedEngine

SPEC = small_spec()


@pytest.fixture
def engine() -> ScriptedEngine:
    """Return an engine that pauses each request after its first token."""
    return ScriptedEngine(base=SPEC, pause_after=1)


@pytest.fixture
def services(engine: ScriptedEngine, tmp_path: Path, tokenizer: Tokenizer) -> AppServices:
    """Return a real adapter service around a scripted engine."""
    catalog = Catalog(sqlite_url(tmp_path / "catalog.db"))
    store = LocalStore(tmp_path)
    service = AdapterService(engine, store, catalog, AdapterLimits(), torch.float32)
    return AppServices(engine, service, tokenizer, ServerMetrics())


@pytest_asyncio.fixture
async def client(services: AppServices) -> AsyncIterator[httpx.AsyncClient]:
    async for each in serve_in_process(create_app(services)):
        yield each


async def push(client: httpx.AsyncClient, seed: int) -> None:
    weights = weights_bytes({name: array + seed for name, array in q_pairs(SPEC).items()})
    files = {
        "adapter_config": json.dumps(config_values()).encode(),
        "adapter_model": weights,
    }
    answer = await client.post("/v1/adapters", data={"name": "ada"}, files=files)
    assert answer.status_code == 201, answer.text


async def begin(client: httpx.AsyncClient, engine: ScriptedEngine) -> asyncio.Task[httpx.Response]:
    """Send a request to `ada`; return when the engine has it."""
    num_requests = len(engine.requests)
    body = {"model": "ada", "prompt": "the quick brown", "max_tokens": 4}
    asking = asyncio.create_task(client.post("/v1/completions", json=body))
    while len(engine.requests) == num_requests:
        await asyncio.sleep(0.005)
    return asking


async def test_a_new_adapter_of_a_deleted_name_keeps_its_series(
    client: httpx.AsyncClient, services: AppServices, engine: ScriptedEngine
) -> None:
    await push(client, seed=0)
    old = await begin(client, engine)
    deleting = asyncio.create_task(client.delete("/v1/adapters/ada"))
    while (await client.get("/v1/adapters/ada")).status_code == 200:
        await asyncio.sleep(0.005)
    await push(client, seed=1)
    new = await begin(client, engine)
    assert not deleting.done()
    engine.resume.set()
    assert [(await task).status_code for task in (old, new, deleting)] == [200, 200, 200]
    counted = services.metrics.registry.get_sample_value
    labels = {"adapter": "ada", "outcome": "ok"}
    assert counted("quickchange_adapter_requests_total", labels)
