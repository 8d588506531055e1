"""The async client, through httpx.ASGITransport: it offers what the plain one does."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from quickchange_client import (
    AsyncQuickchange,
    NotFound,
    Quickchange,
    Unavailable,
    UploadRefused,
)
from quickchange_client.async_client import AsyncAdapters, AsyncModels
from quickchange_client.client import Adapters, Models
from quickchange_client.keys import AsyncKeys, Keys

from tests.clients.fake_server import BASE, WORDS, FakeServer, refusal

SAID = "".join(WORDS)


def public_methods(kind: type) -> dict[str, Callable[..., Any]]:
    return {
        name: value
        for name, value in vars(kind).items()
        if inspect.isfunction(value) and not name.startswith("_")
    }


@pytest.mark.parametrize(
    ("plain", "with_await"),
    [
        (Quickchange, AsyncQuickchange),
        (Adapters, AsyncAdapters),
        (Models, AsyncModels),
        (Keys, AsyncKeys),
    ],
)
def test_both_clients_offer_the_same(plain: type, with_await: type) -> None:
    ours, theirs = public_methods(plain), public_methods(with_await)
    assert ours.keys() == theirs.keys()
    for name, method in ours.items():
        parameters = inspect.signature(method).parameters
        assert parameters == inspect.signature(theirs[name]).parameters
        assert method.__doc__ == theirs[name].__doc__
        is_async = inspect.iscoroutinefunction(theirs[name])
        assert is_async or inspect.isasyncgenfunction(theirs[name])


async def test_generation(async_client: AsyncQuickchange) -> None:
    assert (await async_client.chat(BASE, "x")).text == SAID
    assert (await async_client.complete(BASE, "x", max_tokens=1)).text == WORDS[0]
    with pytest.raises(NotFound):
        await async_client.chat("nobody", "x")


async def test_streams(async_client: AsyncQuickchange) -> None:
    chat = [chunk async for chunk in await async_client.stream_chat(BASE, "x")]
    assert "".join(chunk.text for chunk in chat) == SAID
    async with await async_client.stream_complete(BASE, "x") as stream:
        texts = [chunk.text async for chunk in stream]
    assert "".join(texts) == SAID


async def test_an_adapter_from_upload_to_deletion(
    async_client: AsyncQuickchange, fake_server: FakeServer, adapter_folder: Path
) -> None:
    adapters = async_client.adapters
    seen: list[int] = []
    version = await adapters.upload(
        adapter_folder, name="x", progress=lambda sent, total: seen.append(total - sent)
    )
    assert (version.version, seen[-1]) == (1, 0)
    assert (await adapters.dry_run(adapter_folder, name="y")).ok
    assert [adapter.name async for adapter in adapters.iterate()] == ["x"]
    assert (await adapters.list()).data[0].versions[0].digest == version.digest
    assert (await adapters.set_alias("x", "prod", 1)).aliases == {"default": 1, "prod": 1}
    assert (await adapters.delete_alias("x", "prod")).aliases == {"default": 1}
    assert (await adapters.merge("x")).merged
    assert not (await adapters.unmerge("x", 1)).merged
    assert (await adapters.pin("x", here_only=True)).pinned
    assert not (await adapters.unpin("x")).pinned
    assert (await adapters.disable("x")).state == "disabled"
    assert (await adapters.enable("x")).state == "ready"
    assert (await adapters.load("x")).tier == "host"
    assert (await adapters.unload("x")).tier == "disk"
    assert (await adapters.get_version("x", 1)).name == (await adapters.get("x")).name
    assert (await adapters.delete("x")).deleted
    assert fake_server.adapters == {}


async def test_iterate_walks_all_pages(
    async_client: AsyncQuickchange, adapter_folder: Path
) -> None:
    for number in range(5):
        await async_client.adapters.upload(adapter_folder, name=f"a{number}")
    names = [adapter.name async for adapter in async_client.adapters.iterate()]
    assert names == [f"a{number}" for number in range(5)]


async def test_a_refused_upload_says_why(
    async_client: AsyncQuickchange, pickle_folder: Path
) -> None:
    with pytest.raises(UploadRefused, match="no safetensors"):
        await async_client.adapters.upload(pickle_folder, name="x")


async def test_models_memory_and_health(async_client: AsyncQuickchange) -> None:
    assert [model.id for model in (await async_client.models.list()).data] == [BASE]
    assert (await async_client.models.get(BASE)).root == BASE
    assert (await async_client.memory()).bytes == {"base": 1_500_000, "kv_used": 0}
    assert (await async_client.health()).status == "ok"


async def test_a_busy_server_is_asked_again(
    async_client: AsyncQuickchange, fake_server: FakeServer, adapter_folder: Path
) -> None:
    busy = {"headers": {"retry-after": "0"}}
    fake_server.next_answers += [refusal(429, "queue_full", "busy", **busy) for _ in range(2)]
    assert (await async_client.chat(BASE, "x")).text == SAID
    fake_server.next_answers.append(refusal(503, "store_unavailable", "busy", **busy))
    assert (await async_client.adapters.upload(adapter_folder, name="x")).version == 1
    fake_server.next_answers += [refusal(503, "draining", "busy") for _ in range(3)]
    with pytest.raises(Unavailable):
        await async_client.health()


async def test_connections_are_closed_with_the_client(fake_server: FakeServer) -> None:
    transport = httpx.ASGITransport(fake_server.app)
    client = AsyncQuickchange("http://fake", transport=transport)
    await client.health()
    await client.close()
    with pytest.raises(RuntimeError, match="closed"):
        await client.health()
