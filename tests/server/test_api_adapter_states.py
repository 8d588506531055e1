"""Pin, merge, disable and their opposites over HTTP, with a real engine."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest_asyncio
from quickchange_server.api.app import create_app

from tests.conftest import MakeAdapter
from tests.server.conftest import serve_in_process
from tests.server.real_services import real_services
from tests.server.test_api_adapters import push, text_of


@pytest_asyncio.fixture
async def real_client(
    tiny_base: Path, tmp_path: Path, make_adapter: MakeAdapter
) -> AsyncIterator[httpx.AsyncClient]:
    """Return a client of a server with the adapter `ada`."""
    async for client in serve_in_process(create_app(real_services(tiny_base, tmp_path))):
        assert (await push(client, make_adapter(seed=1))).status_code == 201
        yield client


async def act(client: httpx.AsyncClient, action: str, status: int = 200, **body: Any) -> Any:
    answer = await client.post(f"/v1/adapters/ada/{action}", json=body or None)
    assert answer.status_code == status, answer.text
    return answer.json()


async def test_pin_loads_and_holds_until_unpin(real_client: httpx.AsyncClient) -> None:
    pinned = await act(real_client, "pin")
    assert (pinned["object"], pinned["action"]) == ("adapter.action", "pin")
    assert (pinned["pinned"], pinned["tier"], pinned["state"]) == (True, "device", "ready")
    assert pinned["bytes"]["host"] > 0
    assert pinned["replica"]
    assert (await real_client.get("/v1/adapters/ada/versions/1")).json()["pinned"]
    refused = await act(real_client, "unload", 409)
    assert refused["error"]["code"] == "conflict"
    assert "unpin it first" in refused["error"]["message"]
    assert not (await act(real_client, "unpin", version=1))["pinned"]
    assert (await act(real_client, "unload"))["tier"] == "disk"


async def test_what_is_disabled_is_404_and_what_is_enabled_answers_as_before(
    real_client: httpx.AsyncClient,
) -> None:
    before = await text_of(real_client, "ada")
    etag = (await real_client.get("/v1/adapters/ada")).headers["etag"]
    assert (await act(real_client, "disable"))["state"] == "disabled"
    refused = await real_client.post("/v1/completions", json={"model": "ada", "prompt": "a"})
    assert refused.status_code == 404
    assert refused.json()["error"]["code"] == "model_not_found"
    models = (await real_client.get("/v1/models")).json()["data"]
    assert [model["id"] for model in models] == ["tiny"]
    assert (await real_client.get("/v1/models/ada")).status_code == 404
    shown = await real_client.get("/v1/adapters/ada")
    assert shown.json()["versions"][0]["state"] == "disabled"
    assert shown.headers["etag"] != etag
    stale = await real_client.post("/v1/adapters/ada/enable", headers={"if-match": etag})
    assert stale.status_code == 412
    assert (await act(real_client, "merge", 409))["error"]["code"] == "conflict"
    fresh = {"if-match": shown.headers["etag"]}
    enabled = await real_client.post("/v1/adapters/ada/enable", headers=fresh)
    assert enabled.json()["state"] == "ready"
    assert await text_of(real_client, "ada") == before
    events = (await real_client.get("/v1/adapters/ada/events")).json()["data"]
    assert [event["action"] for event in events] == ["publish", "disable", "enable"]


async def test_deletions_compare_the_etag(
    real_client: httpx.AsyncClient, make_adapter: MakeAdapter
) -> None:
    old = {"if-match": (await real_client.get("/v1/adapters/ada")).headers["etag"]}
    await push(real_client, make_adapter(seed=2), tags="new")
    shown = await real_client.get("/v1/adapters/ada")
    assert shown.json()["tags"] == ["new"]
    for path in ("/v1/adapters/ada/versions/2", "/v1/adapters/ada"):
        assert (await real_client.delete(path, headers=old)).status_code == 412
    new = {"if-match": shown.headers["etag"]}
    await text_of(real_client, "ada:2")  # neither use nor tier is part of it
    gone = await real_client.delete("/v1/adapters/ada/versions/2", headers=new)
    assert gone.status_code == 200


async def test_scope_replica_leaves_the_catalog_alone(real_client: httpx.AsyncClient) -> None:
    etag = (await real_client.get("/v1/adapters/ada")).headers["etag"]
    for action in ("pin", "merge", "unmerge", "unpin", "disable", "enable"):
        await act(real_client, f"{action}?scope=replica")
    assert (await real_client.get("/v1/adapters/ada")).headers["etag"] == etag
    assert (await act(real_client, "pin?scope=world", 400))["error"]["param"] == "scope"


async def test_load_to_the_device(real_client: httpx.AsyncClient) -> None:
    assert (await act(real_client, "load", tier="host"))["bytes"]["device"] == 0
    assert (await act(real_client, "load", tier="device"))["tier"] == "device"
    assert (await act(real_client, "load", 400, tier="remote"))["error"]["param"] == "tier"


async def test_metrics_say_how_well_the_catalog_is_followed(
    real_client: httpx.AsyncClient,
) -> None:
    text = (await real_client.get("/metrics")).text
    assert 'quickchange_adapters_unmet{wish="pin"} 0.0' in text
    assert 'quickchange_adapters_unmet{wish="merge"} 0.0' in text
