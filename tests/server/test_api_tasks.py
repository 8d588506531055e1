"""task.json from the upload to the answer, over a real engine, store and catalog."""

import hashlib
import json
import sqlite3
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from quickchange_adapters.catalog import Catalog, sqlite_url
from quickchange_adapters.records import FileRecord, NewVersion
from quickchange_server.api.app import create_app
from quickchange_server.errors import Conflict, QuickchangeError

from tests.conftest import MakeAdapter
from tests.server.conftest import BASE_URL, serve_in_process
from tests.server.real_services import real_services

CONFIG, WEIGHTS, TASK = "adapter_config.json", "adapter_model.safetensors", "task.json"
VALUES = {
    "prompt": "review: {input} positive",
    "system": "be brief",
    "max_tokens": 6,
    "temperature": 0,
}
TEXT = json.dumps(VALUES, indent=4) + "\n"

Json = dict[str, Any]


@asynccontextmanager
async def serving(base: Path, store: Path) -> AsyncIterator[httpx.AsyncClient]:
    store.mkdir(exist_ok=True)
    async for client in serve_in_process(create_app(real_services(base, store))):
        yield client


@pytest.fixture
async def client(tiny_base: Path, tmp_path: Path) -> AsyncIterator[httpx.AsyncClient]:
    async with serving(tiny_base, tmp_path / "store") as client:
        yield client


@pytest.fixture
def folder(make_adapter: MakeAdapter) -> Path:
    return make_adapter(seed=1)


async def push(
    client: httpx.AsyncClient, folder: Path, task: str | bytes | None = TEXT, query: str = ""
) -> httpx.Response:
    parts = {"adapter_config": CONFIG, "adapter_model": WEIGHTS}
    files: dict[str, Any] = {
        key: (name, (folder / name).read_bytes()) for key, name in parts.items()
    }
    if task is not None:
        files["task"] = (TASK, task)
    return await client.post(f"/v1/adapters{query}", data={"name": "ada"}, files=files)


async def answer_of(client: httpx.AsyncClient, path: str = "completions", **fields: Any) -> Json:
    prompt: Json = {"prompt": "the quick"} if path == "completions" else {}
    answer = await client.post(f"/v1/{path}", json={"model": "ada", **prompt, **fields})
    assert answer.status_code == 200, answer.text
    body: Json = answer.json()
    return body


async def test_a_task_is_shown_and_comes_back_byte_for_byte(
    client: httpx.AsyncClient, folder: Path, tmp_path: Path
) -> None:
    pushed = await push(client, folder)
    assert pushed.status_code == 201, pushed.text
    version = pushed.json()
    assert version["task"] == VALUES
    raw = [(folder / name).read_bytes() for name in (CONFIG, WEIGHTS)]
    digests = b"".join(hashlib.sha256(data).digest() for data in (*raw, TEXT.encode()))
    assert version["digest"] == hashlib.sha256(digests).hexdigest()
    assert version["bytes"]["file"] == sum(map(len, raw)) + len(TEXT)
    file = await client.get(f"/v1/adapters/ada/versions/1/files/{TASK}")
    assert file.content == TEXT.encode()
    assert (await client.get("/v1/adapters/ada/versions/1")).json()["task"] == VALUES
    assert (await client.get("/v1/adapters/ada")).json()["versions"][0]["task"] == VALUES
    assert (await client.get("/v1/adapters")).json()["data"][0]["versions"][0]["task"] == VALUES
    assert list((tmp_path / "store" / "incoming").iterdir()) == []


async def test_the_openai_client_sends_a_bare_input_and_may_ask_raw(
    client: httpx.AsyncClient, folder: Path
) -> None:
    await push(client, folder)
    any_client: Any = client
    sdk = openai.AsyncOpenAI(
        base_url=f"{BASE_URL}/v1", api_key="unused", http_client=any_client, max_retries=0
    )
    bare: Any = {"model": "ada", "messages": [{"role": "user", "content": "fox"}]}
    filled = await sdk.chat.completions.create(**bare)
    by_hand: Any = {
        "model": "ada",
        "messages": [
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": "review: fox positive"},
        ],
        "max_tokens": 6,
        "temperature": 0,
    }
    raw = {"raw_prompt": True}
    same = await sdk.chat.completions.create(**by_hand, extra_body=raw)
    assert filled.choices[0].message.content == same.choices[0].message.content
    assert filled.usage is not None
    assert same.usage is not None
    assert filled.usage.completion_tokens <= 6
    assert filled.usage.prompt_tokens == same.usage.prompt_tokens
    without = await sdk.chat.completions.create(**bare, extra_body=raw, max_tokens=6)
    assert without.usage is not None
    assert without.usage.prompt_tokens < filled.usage.prompt_tokens
    completed = await sdk.completions.create(model="ada", prompt="fox", echo=True)
    assert completed.choices[0].text.startswith("review: fox positive")


async def test_versions_of_equal_weights_differ_by_their_task(
    client: httpx.AsyncClient, folder: Path
) -> None:
    for number, task in enumerate((None, TEXT, json.dumps({**VALUES, "max_tokens": 2})), start=1):
        pushed = await push(client, folder, task)
        assert (pushed.status_code, pushed.json()["version"]) == (201, number)
    again = await push(client, folder)
    assert (again.status_code, again.json()["version"]) == (200, 2)
    shown = (await client.get("/v1/adapters/ada")).json()["versions"]
    assert len({version["digest"] for version in shown}) == 3
    assert [version["task"] and version["task"]["max_tokens"] for version in shown] == [None, 6, 2]
    answers = [await answer_of(client, model=f"ada:{n}", ignore_eos=True) for n in (1, 2, 3)]
    assert [answer["usage"]["completion_tokens"] for answer in answers] == [16, 6, 2]
    # The bare name means another task as soon as its alias moves, and the old one after a rollback.
    for number, tokens in ((3, 2), (1, 16)):
        await client.put("/v1/adapters/ada/aliases/default", json={"version": number})
        answer = await answer_of(client, ignore_eos=True)
        assert answer["usage"]["completion_tokens"] == tokens


async def test_a_mix_of_an_adapter_with_a_task_is_asked_as_it_is(
    client: httpx.AsyncClient, folder: Path
) -> None:
    await push(client, folder)
    mixed = await answer_of(client, model="tiny", adapters=[{"model": "ada"}], temperature=0)
    raw = await answer_of(client, raw_prompt=True, temperature=0)
    assert mixed["choices"][0]["text"] == raw["choices"][0]["text"]
    assert mixed["usage"]["prompt_tokens"] == raw["usage"]["prompt_tokens"]


async def test_a_bad_task_is_refused_with_everything_else_that_is_wrong(
    client: httpx.AsyncClient, folder: Path, tmp_path: Path
) -> None:
    bad = json.dumps({"prompt": "no place", "temperature": 3, "tokens": 5}).encode()
    files = {
        "task": (TASK, bad),
        "adapter_config": (CONFIG, b"{}"),
        "adapter_model": (WEIGHTS, (folder / WEIGHTS).read_bytes()),
    }
    for query, status in (("", 400), ("?dry_run=true", 200)):
        answer = await client.post(f"/v1/adapters{query}", data={"name": "ada"}, files=files)
        assert answer.status_code == status
        found = [(each["code"], each["where"]) for each in answer.json()["problems"]]
        assert ("config_invalid", "peft_type") in found
        assert found[-3:] == [
            ("task_invalid", "task.tokens"),
            ("task_invalid", "task.prompt"),
            ("task_invalid", "task.temperature"),
        ]
    only = await push(client, folder, b"{'prompt': 5}")
    assert only.json()["error"] | {"message": ""} == {
        "message": "",
        "type": "invalid_request_error",
        "param": "task",
        "code": "task_invalid",
    }
    large = await push(client, folder, b" " * (16 * 1024) + b"{}")
    assert (large.status_code, large.json()["error"]["param"]) == (413, "task")
    assert (await client.get("/v1/adapters")).json()["data"] == []
    assert list((tmp_path / "store" / "incoming").iterdir()) == []
    metrics = (await client.get("/metrics")).text
    assert 'quickchange_adapter_rejections_total{code="task_invalid"} 1.0' in metrics


async def test_a_dry_run_of_a_good_task_keeps_nothing(
    client: httpx.AsyncClient, folder: Path
) -> None:
    answer = await push(client, folder, query="?dry_run=true")
    assert (answer.status_code, answer.json()["ok"]) == (200, True)
    assert (await client.get("/v1/adapters")).json()["data"] == []


async def test_a_restart_serves_the_task_as_before(
    tiny_base: Path, folder: Path, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    async with serving(tiny_base, store) as client:
        await push(client, folder)
        await push(client, folder, None)
        before = await answer_of(client)
    async with serving(tiny_base, store) as client:
        after = await answer_of(client)
        assert after["choices"] == before["choices"]
        assert after["usage"]["prompt_tokens"] == before["usage"]["prompt_tokens"]


async def refusal_of(client: httpx.AsyncClient, model: str) -> str:
    """Ask for a model that is refused; return with which sentence."""
    answer = await client.post("/v1/completions", json={"model": model, "prompt": "a"})
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (409, "conflict")
    assert answer.headers["x-should-retry"] == "false"
    message: str = error["message"]
    return message


async def test_a_task_of_tomorrow_stops_its_own_version_alone(
    tiny_base: Path, folder: Path, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    async with serving(tiny_base, store) as client:
        await push(client, folder, None)
    text = '{"format": "of tomorrow"}'
    catalog = Catalog(sqlite_url(store / "catalog.db"))
    known = catalog.resolve("ada")
    assert known is not None
    task = FileRecord(TASK, hashlib.sha256(text.encode()).hexdigest(), len(text))
    catalog.publish(
        NewVersion(
            *("ada", (*known.files, task), "tiny", "b" * 64, known.ranks, known.target_modules, {}),
            task_text=text,
        )
    )
    catalog.close()
    async with serving(tiny_base, store) as client:
        assert "'format'" in await refusal_of(client, "ada:2")
        shown = (await client.get("/v1/adapters/ada")).json()["versions"]
        assert [version["task"] for version in shown] == [None, {"format": "of tomorrow"}]
        await answer_of(client, model="ada:1")
        assert (await client.delete("/v1/adapters/ada")).status_code == 200


@pytest.mark.parametrize(
    ("damage", "shown"),
    [
        ("DELETE FROM tasks", None),
        ("UPDATE tasks SET text = '{\"max_tokens\": 6}'", {"max_tokens": 6}),
        ("UPDATE tasks SET text = 'no JSON'", None),
    ],
)
async def test_a_task_that_is_not_the_digest_s_is_not_served(
    tiny_base: Path, folder: Path, tmp_path: Path, damage: str, shown: Json | None
) -> None:
    store = tmp_path / "store"
    async with serving(tiny_base, store) as client:
        await push(client, folder)
        await push(client, folder, None)
    with closing(sqlite3.connect(store / "catalog.db")) as connection, connection:
        connection.execute(damage)
    async with serving(tiny_base, store) as client:
        assert "ada:1 cannot be served: it is not the one that was uploaded" in await refusal_of(
            client, "ada"
        )
        versions = (await client.get("/v1/adapters/ada")).json()["versions"]
        assert [version["task"] for version in versions] == [shown, None]
        await answer_of(client, model="ada:2")


async def test_a_static_folder_brings_its_task_and_is_held_to_it(
    tiny_base: Path, folder: Path, tmp_path: Path
) -> None:
    services = real_services(tiny_base, tmp_path)
    static = tmp_path / "static"
    static.mkdir()
    for name in (CONFIG, WEIGHTS):
        (static / name).write_bytes((folder / name).read_bytes())
    async for client in serve_in_process(create_app(services)):
        (static / TASK).write_text('{"max_tokens": 0}')
        with pytest.raises(QuickchangeError) as caught:
            await services.adapters.add_static("ada", static)
        assert (caught.value.code, caught.value.param) == ("task_invalid", "task.max_tokens")
        (static / TASK).write_text(TEXT)
        view = await services.adapters.add_static("ada", static)
        assert view.task == VALUES
        assert (await answer_of(client, ignore_eos=True))["usage"]["completion_tokens"] == 6
        file = await client.get(f"/v1/adapters/ada/versions/1/files/{TASK}")
        assert file.content == TEXT.encode()
        await client.post("/v1/adapters/ada/unload")
        for text in (json.dumps({**VALUES, "max_tokens": 5}), None):
            (static / TASK).write_text(text) if text else (static / TASK).unlink()
            with pytest.raises(Conflict, match="have changed"):
                await services.adapters.acquire(services.adapters.resolve("ada"))
