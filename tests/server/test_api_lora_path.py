"""vLLM's load and unload by path, over a real engine, store and catalog."""

import json
import shutil
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
import pytest_asyncio
from quickchange_adapters.records import Quota
from quickchange_server.api.app import AppServices, create_app
from quickchange_server.lora_roots import LoraRoots
from quickchange_server.upload_quotas import UploadQuotas

from tests.conftest import MakeAdapter
from tests.server.conftest import serve_in_process
from tests.server.real_services import real_services
from tests.server.test_api_scopes import Keys

ADDED = "Success: LoRA adapter 'ada' added successfully."


@pytest.fixture
def root(tmp_path: Path, make_adapter: MakeAdapter) -> Path:
    """A folder with the adapters one and two, and a third that the base cannot take."""
    folder = tmp_path / "loras"
    for seed, name in enumerate(("one", "two", "bad")):
        shutil.copytree(make_adapter(seed=seed + 1), folder / name)
    config = json.loads((folder / "bad" / "adapter_config.json").read_text())
    (folder / "bad" / "adapter_config.json").write_text(json.dumps({**config, "use_dora": True}))
    return folder


@pytest.fixture
def by_path(tiny_base: Path, tmp_path: Path, root: Path) -> AppServices:
    (tmp_path / "store").mkdir()
    services = real_services(tiny_base, tmp_path / "store")
    return replace(services, lora_roots=LoraRoots([root]))


@pytest_asyncio.fixture
async def client(by_path: AppServices) -> AsyncIterator[httpx.AsyncClient]:
    async for each in serve_in_process(create_app(by_path)):
        yield each


async def load(
    client: httpx.AsyncClient, path: str, name: str = "ada", **more: object
) -> httpx.Response:
    body = {"lora_name": name, "lora_path": path, **more}
    return await client.post("/v1/load_lora_adapter", json=body)


async def unload(client: httpx.AsyncClient, name: str = "ada") -> httpx.Response:
    return await client.post("/v1/unload_lora_adapter", json={"lora_name": name})


async def text_of(client: httpx.AsyncClient, model: str = "ada") -> str:
    body = {"model": model, "prompt": "the quick", "temperature": 0, "max_tokens": 8}
    answer = await client.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    text: str = answer.json()["choices"][0]["text"]
    return text


async def test_a_loaded_folder_is_a_version_like_any_upload(
    client: httpx.AsyncClient, root: Path
) -> None:
    loaded = await load(client, str(root / "one"))
    assert (loaded.status_code, loaded.text) == (200, ADDED)
    assert loaded.headers["content-type"].startswith("text/plain")
    adapter = (await client.get("/v1/adapters/ada")).json()
    assert adapter["aliases"] == {"default": 1}
    assert adapter["versions"][0]["report"]["ok"]
    file = await client.get("/v1/adapters/ada/versions/1/files/adapter_model.safetensors")
    assert file.content == (root / "one" / "adapter_model.safetensors").read_bytes()
    assert await text_of(client) != await text_of(client, "tiny")
    shutil.rmtree(root / "one")
    assert (await client.post("/v1/adapters/ada/unload")).status_code == 200
    assert await text_of(client)


async def test_an_identical_repeat_is_200_and_other_bytes_need_load_inplace(
    client: httpx.AsyncClient, root: Path
) -> None:
    for _ in range(2):
        assert (await load(client, "one")).text == ADDED
    refused = await load(client, "two")
    assert refused.status_code == 400
    assert refused.json()["error"]["message"] == (
        "The lora adapter 'ada' has already been loaded. If you want to load the adapter in "
        "place, set 'load_inplace' to True."
    )
    before = await text_of(client)
    assert (await load(client, "two", load_inplace=True)).text == ADDED
    adapter = (await client.get("/v1/adapters/ada")).json()
    assert (adapter["aliases"], len(adapter["versions"])) == ({"default": 2}, 2)
    assert await text_of(client) != before
    assert (await load(client, "one", load_inplace=True)).status_code == 200
    adapter = (await client.get("/v1/adapters/ada")).json()
    assert (adapter["aliases"], len(adapter["versions"])) == ({"default": 1}, 2)


async def test_unload_takes_the_name_away_and_load_brings_it_back(
    client: httpx.AsyncClient, root: Path
) -> None:
    await load(client, "one")
    before = await text_of(client)
    gone = await unload(client)
    assert (gone.status_code, gone.text) == (
        200,
        "Success: LoRA adapter 'ada' removed successfully.",
    )
    assert (await client.get("/v1/models/ada")).status_code == 404
    again = await unload(client)
    assert again.status_code == 404
    assert again.json()["error"]["message"] == "The lora adapter 'ada' cannot be found."
    await load(client, "one")
    assert await text_of(client) == before


async def test_what_was_uploaded_otherwise_is_not_deleted_by_unload(
    client: httpx.AsyncClient, root: Path
) -> None:
    names = {"adapter_config": "adapter_config.json", "adapter_model": "adapter_model.safetensors"}
    files = {part: (root / "one" / file).read_bytes() for part, file in names.items()}
    await client.post("/v1/adapters", data={"name": "ada"}, files=files)
    assert (await load(client, "two", load_inplace=True)).status_code == 200
    refused = await unload(client)
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "conflict")
    assert "DELETE /v1/adapters/ada" in refused.json()["error"]["message"]
    assert len((await client.get("/v1/adapters/ada")).json()["versions"]) == 2


async def test_an_upload_s_checks_hold_and_nothing_is_left(
    client: httpx.AsyncClient, root: Path, tmp_path: Path
) -> None:
    refused = await load(client, "bad")
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "config_unsupported")
    assert [each["code"] for each in refused.json()["problems"]] == ["config_unsupported"]
    assert (await load(client, "one", "No Name")).json()["error"]["code"] == "invalid_name"
    assert (await load(client, "one", "tiny")).status_code == 409
    assert list((tmp_path / "store" / "incoming").iterdir()) == []
    assert list((tmp_path / "store" / "blobs").glob("??/*")) == []


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ({}, 400, "Both 'lora_name' and 'lora_path' must be provided."),
        ({"lora_name": "ada"}, 400, "Both 'lora_name' and 'lora_path' must be provided."),
        ({"lora_name": "ada", "lora_path": "nobody"}, 404, "No adapter found for 'nobody'"),
        ({"lora_name": "ada", "lora_path": "/etc"}, 400, "(--lora-root)"),
        ({"lora_name": "ada", "lora_path": "../store"}, 400, "(--lora-root)"),
        (
            {"lora_name": "ada", "lora_path": "one", "is_3d_lora_weight": True},
            400,
            "is_3d_lora_weight: is not supported",
        ),
    ],
)
async def test_refusals(
    client: httpx.AsyncClient, body: dict[str, object], status: int, message: str
) -> None:
    answer = await client.post("/v1/load_lora_adapter", json=body)
    assert answer.status_code == status
    assert message in answer.json()["error"]["message"]


async def test_without_roots_both_are_off(by_path: AppServices) -> None:
    async for client in serve_in_process(create_app(replace(by_path, lora_roots=LoraRoots()))):
        for answer in (await load(client, "/etc"), await unload(client)):
            assert answer.status_code == 404
            assert "--lora-root" in answer.json()["error"]["message"]


async def test_keys_names_and_quotas_hold_as_for_uploads(by_path: AppServices) -> None:
    keys = Keys()
    quotas = UploadQuotas(Quota(1, None), 2)
    async for client in serve_in_process(
        create_app(replace(by_path, keyring=keys.ring, quotas=quotas))
    ):
        client.headers.update(keys.make("generate", "adapters:read"))
        assert (await load(client, "one")).status_code == 403
        client.headers.update(keys.make("adapters:write", adapters=("bob",)))
        assert (await load(client, "one")).status_code == 403
        assert (await unload(client)).status_code == 404
        client.headers.update(keys.make("adapters:write", "adapters:read"))
        assert (await load(client, "one")).status_code == 200
        assert (await client.get("/v1/adapters/ada")).json()["visibility"] == "private"
        over = await load(client, "two", load_inplace=True)
        assert (over.status_code, over.json()["error"]["code"]) == (403, "quota_exceeded")
        often = await load(client, "one")
        assert (often.status_code, often.json()["error"]["code"]) == (429, "rate_limited")
