"""A server whose catalog goes away: uploads are refused, serving goes on, metrics say so."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
import torch
from quickchange_adapters.catalog import Catalog
from quickchange_adapters.catalog_engine import CatalogTimeouts
from quickchange_adapters.limits import AdapterLimits
from quickchange_adapters.store import LocalStore
from quickchange_server.adapter_service import AdapterService
from quickchange_server.api.app import AppServices, create_app
from quickchange_server.metrics import ServerMetrics
from quickchange_server.metrics_text import MAX_AGE_S
from quickchange_server.tokenizer import Tokenizer

from tests.adapters.adapter_files import config_values, q_pairs, small_spec, weights_bytes
from tests.postgres_server import PostgresServer
from tests.server.conftest import serve_in_process
from tests.server.scripted_engine import ScriptedEngine

SPEC = small_spec()
TIMEOUTS = CatalogTimeouts(connect_s=2, reply_s=5)


@pytest.fixture
async def client(
    postgres: PostgresServer, tokenizer: Tokenizer, tmp_path: Path
) -> AsyncIterator[httpx.AsyncClient]:
    """A client of an app whose catalog is in PostgreSQL, with the adapter `a` uploaded."""
    catalog = Catalog(postgres.empty_database(), timeouts=TIMEOUTS)
    engine, metrics = ScriptedEngine(base=SPEC), ServerMetrics()
    metrics.watch_catalog(lambda: catalog.database.is_up)
    service = AdapterService(engine, LocalStore(tmp_path), catalog, AdapterLimits(), torch.float32)
    async for client in serve_in_process(
        create_app(AppServices(engine, service, tokenizer, metrics))
    ):
        assert (await upload(client, "a")).status_code == 201
        yield client


async def upload(client: httpx.AsyncClient, name: str) -> httpx.Response:
    files = {
        "adapter_config": json.dumps(config_values()).encode(),
        "adapter_model": weights_bytes(q_pairs(SPEC)),
    }
    return await client.post("/v1/adapters", data={"name": name}, files=files)


async def generate(client: httpx.AsyncClient, model: str) -> httpx.Response:
    body = {"model": model, "prompt": "the quick", "max_tokens": 2}
    return await client.post("/v1/completions", json=body)


async def catalog_up(client: httpx.AsyncClient) -> str:
    await asyncio.sleep(MAX_AGE_S)
    text = (await client.get("/metrics")).text
    return text.partition("\nquickchange_catalog_up ")[2].partition("\n")[0]


async def test_uploads_are_503_and_serving_goes_on_while_the_catalog_is_away(
    client: httpx.AsyncClient, postgres: PostgresServer
) -> None:
    assert await catalog_up(client) == "1.0"
    postgres.stop()
    try:
        refused = await upload(client, "b")
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "store_unavailable"
        assert int(refused.headers["retry-after"]) > 0
        assert str(postgres.port) not in refused.text
        assert await catalog_up(client) == "0.0"
        moved = await client.put("/v1/adapters/a/aliases/x", json={"version": 1})
        assert moved.status_code == 503
        for model in ("tiny", "a", "a:1"):
            assert (await generate(client, model)).status_code == 200
        assert (await client.get("/readyz")).status_code == 200
        names = [model["id"] for model in (await client.get("/v1/models")).json()["data"]]
        assert names == ["tiny", "a", "a@default"]
        page = (await client.get("/v1/adapters")).json()
        assert [adapter["name"] for adapter in page["data"]] == ["a"]
    finally:
        postgres.start()
    assert (await upload(client, "b")).status_code == 201
    assert await catalog_up(client) == "1.0"


async def test_a_refused_upload_leaves_no_bytes_waiting(
    client: httpx.AsyncClient, postgres: PostgresServer, tmp_path: Path
) -> None:
    postgres.stop()
    try:
        assert (await upload(client, "b")).status_code == 503
        assert list((tmp_path / "incoming").iterdir()) == []
    finally:
        postgres.start()
