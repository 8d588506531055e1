"""The adapter routes over a real engine, store and catalog."""

import hashlib
import json
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio
from quickchange_adapters.limits import AdapterLimits
from quickchange_server.api.app import create_app

from tests.conftest import MakeAdapter
from tests.server.conftest import serve_in_process
from tests.server.real_services import real_services

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@pytest_asyncio.fixture
async def real_client(tiny_base: Path, tmp_path: Path) -> AsyncIterator[httpx.AsyncClient]:
    limits = AdapterLimits(max_config_bytes=20_000)
    async for each in serve_in_process(create_app(real_services(tiny_base, tmp_path, limits))):
        yield each


async def push(
    client: httpx.AsyncClient, folder: Path, name: str = "ada", query: str = "", **fields: str
) -> httpx.Response:
    files = {
        "adapter_config": (CONFIG, (folder / CONFIG).read_bytes()),
        "adapter_model": (WEIGHTS, (folder / WEIGHTS).read_bytes()),
    }
    return await client.post(f"/v1/adapters{query}", data={"name": name, **fields}, files=files)


async def text_of(client: httpx.AsyncClient, model: str, **fields: Any) -> str:
    body = {"model": model, "prompt": "the quick brown", "temperature": 0, "max_tokens": 12}
    answer = await client.post("/v1/completions", json={**body, **fields})
    assert answer.status_code == 200, answer.text
    text: str = answer.json()["choices"][0]["text"]
    return text


async def test_life_of_an_adapter(
    real_client: httpx.AsyncClient, make_adapter: MakeAdapter
) -> None:
    base_text = await text_of(real_client, "tiny")
    pushed = await push(real_client, make_adapter(seed=1), tags="a, b")
    assert pushed.status_code == 201, pushed.text
    version = pushed.json()
    assert (version["object"], version["version"], version["rank"]) == ("adapter.version", 1, 8)
    adapter_text = await text_of(real_client, "ada")
    assert adapter_text != base_text

    merged = await real_client.post("/v1/adapters/ada/merge")
    assert merged.status_code == 200, merged.text
    assert merged.json()["bytes"]["merged"] > 0
    assert await text_of(real_client, "ada") == adapter_text
    assert (await real_client.get("/v1/memory")).json()["bytes"]["merged"] > 0
    unmerged = await real_client.post("/v1/adapters/ada/unmerge")
    assert unmerged.json()["freed_bytes"]["merged"] == merged.json()["bytes"]["merged"]
    assert await text_of(real_client, "ada") == adapter_text

    deleted = await real_client.delete("/v1/adapters/ada")
    assert deleted.status_code == 200
    assert deleted.json()["deleted"] is True
    gone = await real_client.post("/v1/completions", json={"model": "ada", "prompt": "a"})
    assert gone.json()["error"]["code"] == "model_not_found"
    assert await text_of(real_client, "tiny") == base_text


async def test_same_bytes_again_are_the_same_version(
    real_client: httpx.AsyncClient, make_adapter: MakeAdapter
) -> None:
    first = await push(real_client, make_adapter(seed=1))
    again = await push(real_client, make_adapter(seed=1))
    assert (first.status_code, again.status_code) == (201, 200)
    assert again.json()["digest"] == first.json()["digest"]


async def test_versions_and_aliases(
    real_client: httpx.AsyncClient, make_adapter: MakeAdapter
) -> None:
    await push(real_client, make_adapter(seed=1))
    await push(real_client, make_adapter(seed=2))
    texts = [await text_of(real_client, f"ada:{number}") for number in (1, 2)]
    assert texts[0] != texts[1]
    assert await text_of(real_client, "ada") == texts[0]

    shown = await real_client.get("/v1/adapters/ada")
    assert [version["version"] for version in shown.json()["versions"]] == [1, 2]
    headers = {"if-match": shown.headers["etag"]}
    path = "/v1/adapters/ada/aliases/default"
    moved = await real_client.put(path, json={"version": 2}, headers=headers)
    assert moved.json()["aliases"] == {"default": 2}
    assert moved.headers["etag"] != shown.headers["etag"]
    assert await text_of(real_client, "ada") == texts[1]
    stale = await real_client.put(path, json={"version": 1}, headers=headers)
    assert stale.status_code == 412

    in_use = await real_client.delete("/v1/adapters/ada/versions/2")
    assert (in_use.status_code, in_use.json()["error"]["code"]) == (409, "alias_in_use")
    assert (await real_client.delete("/v1/adapters/ada/versions/1")).status_code == 200
    assert (await real_client.get("/v1/adapters/ada/versions/1")).status_code == 404
    assert (await real_client.get("/v1/adapters/ada/versions/2")).json()["version"] == 2


async def test_alias_is_a_model_until_it_is_removed(
    real_client: httpx.AsyncClient, make_adapter: MakeAdapter
) -> None:
    await push(real_client, make_adapter(seed=1), alias="blue")
    ids = [model["id"] for model in (await real_client.get("/v1/models")).json()["data"]]
    assert ids[0] == "tiny"
    assert {"ada", "ada@blue"} <= set(ids)
    assert (await real_client.delete("/v1/adapters/ada/aliases/blue")).status_code == 200
    answer = await real_client.post("/v1/completions", json={"model": "ada@blue", "prompt": "a"})
    assert answer.status_code == 404


async def test_list_pages(real_client: httpx.AsyncClient, make_adapter: MakeAdapter) -> None:
    for name in ("ada", "bob", "cy"):
        await push(real_client, make_adapter(seed=1), name)
    page = (await real_client.get("/v1/adapters?limit=2")).json()
    assert [adapter["name"] for adapter in page["data"]] == ["ada", "bob"]
    assert page["has_more"] is True
    rest = (await real_client.get(f"/v1/adapters?after={page['last_id']}")).json()
    assert [adapter["name"] for adapter in rest["data"]] == ["cy"]


async def test_files_come_back_as_they_were_sent(
    real_client: httpx.AsyncClient, make_adapter: MakeAdapter
) -> None:
    folder = make_adapter(seed=1)
    await push(real_client, folder)
    for file in (CONFIG, WEIGHTS):
        answer = await real_client.get(f"/v1/adapters/ada/versions/1/files/{file}")
        assert answer.content == (folder / file).read_bytes()
        assert answer.headers["etag"] == f'"{hashlib.sha256(answer.content).hexdigest()}"'


async def test_what_the_caller_has_is_not_sent_again(
    real_client: httpx.AsyncClient, make_adapter: MakeAdapter
) -> None:
    await push(real_client, make_adapter(seed=1))
    for path in ("/v1/adapters/ada", f"/v1/adapters/ada/versions/1/files/{WEIGHTS}"):
        etag = (await real_client.get(path)).headers["etag"]
        for known in (etag, f"W/{etag}", f'"x", {etag}', "*"):
            answer = await real_client.get(path, headers={"if-none-match": known})
            assert (answer.status_code, answer.content) == (304, b""), known
            assert answer.headers["etag"] == etag
        for other in ('"x"', etag.strip('"')):
            answer = await real_client.get(path, headers={"if-none-match": other})
            assert answer.status_code == 200, other


async def test_what_can_be_read_can_be_asked_for_by_head(
    real_client: httpx.AsyncClient, make_adapter: MakeAdapter
) -> None:
    folder = make_adapter(seed=1)
    await push(real_client, folder)
    file = f"/v1/adapters/ada/versions/1/files/{WEIGHTS}"
    paths = ["", "/ada", "/ada/events", "/ada/versions/1"]
    for path in (*(f"/v1/adapters{each}" for each in paths), file, "/v1/models/ada", "/docs"):
        asked, read = await real_client.head(path), await real_client.get(path)
        assert (asked.status_code, read.status_code) == (200, 200), path
        for name in ("content-type", "content-length", "etag"):
            assert asked.headers.get(name) == read.headers.get(name), path
    assert asked.headers["content-length"] != "0"
    assert (await real_client.head("/v1/adapters/nix")).status_code == 404


async def test_a_download_does_not_tell_when_others_sent_the_same_bytes(
    real_client: httpx.AsyncClient, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    folder = make_adapter(seed=1)
    await push(real_client, folder)
    file = f"/v1/adapters/ada/versions/1/files/{WEIGHTS}"
    before = await real_client.get(file)
    blobs = list(tmp_path.rglob("blobs/*/*"))
    assert blobs
    for blob in blobs:
        os.utime(blob, (1e9, 1e9))
    after = await real_client.get(file)
    for name in ("etag", "last-modified"):
        assert before.headers[name] == after.headers[name]


async def test_events_tell_what_was_done(
    real_client: httpx.AsyncClient, make_adapter: MakeAdapter
) -> None:
    await push(real_client, make_adapter(seed=1))
    events = (await real_client.get("/v1/adapters/ada/events")).json()
    assert events["object"] == "list"
    assert [event["action"] for event in events["data"]] == ["publish"]


async def test_events_come_in_pages(
    real_client: httpx.AsyncClient, make_adapter: MakeAdapter
) -> None:
    await push(real_client, make_adapter(seed=1), alias="blue")
    for version in (1, 1, 1):
        path = "/v1/adapters/ada/aliases/green"
        await real_client.put(path, json={"version": version})
        await real_client.delete(path)
    path = "/v1/adapters/ada/events"
    whole = (await real_client.get(path)).json()
    assert (whole["has_more"], whole["first_id"]) == (False, whole["data"][0]["id"])
    pages = [(await real_client.get(f"{path}?limit=3")).json()]
    while pages[-1]["has_more"]:
        after = pages[-1]["last_id"]
        pages.append((await real_client.get(f"{path}?limit=3&after={after}")).json())
    assert all(len(page["data"]) == 3 for page in pages[:-1])
    assert [event for page in pages for event in page["data"]] == whole["data"]
    assert len({event["id"] for event in whole["data"]}) == len(whole["data"]) >= 7
    beyond = (await real_client.get(f"{path}?after={whole['last_id']}")).json()
    assert (beyond["data"], beyond["first_id"], beyond["last_id"]) == ([], None, None)
    assert beyond["has_more"] is False
    for query in ("limit=0", "limit=101", "after=x", "after=-1", f"after={1 << 63}"):
        assert (await real_client.get(f"{path}?{query}")).status_code == 400
    await real_client.delete("/v1/adapters/ada")
    for after in (0, 1000):  # the log outlives the name, also behind its end
        assert (await real_client.get(f"{path}?after={after}")).status_code == 200
    assert (await real_client.get("/v1/adapters/nobody/events")).status_code == 404


async def test_unload_gives_bytes_back_and_the_next_request_loads_again(
    real_client: httpx.AsyncClient, make_adapter: MakeAdapter
) -> None:
    await push(real_client, make_adapter(seed=1))
    loaded = await real_client.post("/v1/adapters/ada/load", json={"version": 1})
    assert loaded.json()["bytes"]["host"] > 0
    text = await text_of(real_client, "ada")
    unloaded = await real_client.post("/v1/adapters/ada/unload")
    assert unloaded.json()["freed_bytes"]["host"] == loaded.json()["bytes"]["host"]
    assert await text_of(real_client, "ada") == text


async def test_mix_is_served(real_client: httpx.AsyncClient, make_adapter: MakeAdapter) -> None:
    await push(real_client, make_adapter(seed=1), "ada")
    await push(real_client, make_adapter(seed=2), "bob")
    alone = await text_of(real_client, "ada")
    assert await text_of(real_client, "tiny", adapters=[{"model": "ada"}]) == alone
    mix = [{"model": "ada", "weight": 0.5}, {"model": "bob", "weight": -1.5}]
    assert await text_of(real_client, "tiny", adapters=mix) != alone


async def test_pickle_is_refused_with_every_problem(
    real_client: httpx.AsyncClient, make_adapter: MakeAdapter
) -> None:
    config = json.loads((make_adapter(seed=1) / CONFIG).read_text())
    config["use_dora"] = True
    files = {
        "adapter_config": (CONFIG, json.dumps(config).encode()),
        "adapter_model": ("adapter_model.bin", b"\x80\x04\x95pickle"),
    }
    answer = await real_client.post("/v1/adapters", data={"name": "Bad/Name"}, files=files)
    body = answer.json()
    assert answer.status_code == 400
    codes = {problem["code"] for problem in body["problems"]}
    assert {"invalid_name", "config_unsupported", "weights_not_safetensors"} <= codes
    assert body["error"]["code"] == body["problems"][0]["code"]
    assert set(body["problems"][0]) == {"code", "where", "message", "hint"}
    text = (await real_client.get("/metrics")).text
    code = body["error"]["code"]
    assert f'quickchange_adapter_rejections_total{{code="{code}"}} 1.0' in text
    assert (await real_client.get("/v1/adapters")).json()["data"] == []


async def test_dry_run_reports_and_keeps_nothing(
    real_client: httpx.AsyncClient, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    good = await push(real_client, make_adapter(seed=1), query="?dry_run=true")
    assert (good.status_code, good.json()["object"]) == (200, "adapter.report")
    assert good.json()["ok"] is True
    bad = await push(real_client, make_adapter(seed=1, std=0.0), query="?dry_run=true")
    assert (bad.status_code, bad.json()["ok"]) == (200, False)
    assert [problem["code"] for problem in bad.json()["problems"]] == ["no_effect"]
    assert (await real_client.get("/v1/adapters")).json()["data"] == []
    assert list((tmp_path / "incoming").iterdir()) == []


async def test_dry_run_reports_what_is_wrong_with_the_form(
    real_client: httpx.AsyncClient, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    files = {
        "task": ("task.json", b" " * 20_000),
        "adapter_config": (CONFIG, b"no json"),
        "adapter_model": (WEIGHTS, (make_adapter(seed=1) / WEIGHTS).read_bytes()),
    }
    answer = await real_client.post("/v1/adapters?dry_run=true", files=files)
    assert (answer.status_code, answer.json()["object"]) == (200, "adapter.report")
    problems = [(problem["code"], problem["where"]) for problem in answer.json()["problems"]]
    assert problems == [
        ("too_large", "task"),
        ("invalid_name", "name"),
        ("config_invalid", "adapter_config"),
    ]
    assert list((tmp_path / "incoming").iterdir()) == []


async def test_noop_may_be_asked_for(
    real_client: httpx.AsyncClient, make_adapter: MakeAdapter
) -> None:
    answer = await push(real_client, make_adapter(seed=1, std=0.0), allow_noop="true")
    assert answer.status_code == 201


async def test_too_large_part_is_413_and_leaves_nothing(
    real_client: httpx.AsyncClient, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    files = {
        "adapter_model": (WEIGHTS, (make_adapter(seed=1) / WEIGHTS).read_bytes()),
        "adapter_config": (CONFIG, b" " * 20_001),
    }
    answer = await real_client.post("/v1/adapters", data={"name": "ada"}, files=files)
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "too_large")
    assert "20000 bytes" in answer.json()["error"]["message"]
    assert answer.json()["error"]["param"] == "adapter_config"
    assert list((tmp_path / "incoming").iterdir()) == []


@pytest.mark.parametrize("action", ["load", "unload", "merge", "unmerge"])
async def test_actions_on_nobody_are_404(real_client: httpx.AsyncClient, action: str) -> None:
    answer = await real_client.post(f"/v1/adapters/nobody/{action}")
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "adapter_not_found")


async def test_base_s_name_is_taken(
    real_client: httpx.AsyncClient, make_adapter: MakeAdapter
) -> None:
    answer = await push(real_client, make_adapter(seed=1), "tiny")
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "conflict")
    assert [problem["where"] for problem in answer.json()["problems"]] == ["name"]
    text = (await real_client.get("/metrics")).text
    assert 'quickchange_adapter_rejections_total{code="conflict"} 1.0' in text


async def test_series_of_a_deleted_adapter_go(
    real_client: httpx.AsyncClient, make_adapter: MakeAdapter
) -> None:
    await push(real_client, make_adapter(seed=1))
    await text_of(real_client, "ada")
    accept = {"accept": "text/plain"}
    assert 'adapter="ada"' in (await real_client.get("/metrics", headers=accept)).text
    await real_client.delete("/v1/adapters/ada")
    openmetrics = {"accept": "application/openmetrics-text; version=1.0.0"}
    assert 'adapter="ada"' not in (await real_client.get("/metrics", headers=openmetrics)).text


async def test_a_part_of_a_file_is_sent_and_a_wrong_range_refused(
    real_client: httpx.AsyncClient, make_adapter: MakeAdapter
) -> None:
    folder = make_adapter(seed=1)
    await push(real_client, folder)
    whole, path = (folder / WEIGHTS).read_bytes(), f"/v1/adapters/ada/versions/1/files/{WEIGHTS}"
    for asked, status in (("bytes=10-19", 206), ("bytes=99999999-", 416), ("furlongs=1", 400)):
        answer = await real_client.get(path, headers={"range": asked})
        assert answer.status_code == status, asked
        if status == 206:
            assert answer.content == whole[10:20]
        if status == 400:
            assert answer.json()["error"]["param"] == "range"
