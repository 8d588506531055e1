"""The async client against the real server in this process, without a socket."""

from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
import pytest_asyncio
from quickchange_client import AsyncQuickchange, InvalidApiKey, NotFound, UploadRefused
from quickchange_server.config import load_config
from quickchange_server.embedded import running_app

from tests.conftest import MakeAdapter


@pytest_asyncio.fixture
async def client(
    tiny_base: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> AsyncIterator[AsyncQuickchange]:
    """Return a client of a whole server with a static adapter."""
    settings = {
        "model": str(tiny_base),
        "served_model_name": "tiny",
        "store": str(tmp_path / "store"),
        "device": "cpu",
        "adapter": [f"given={make_adapter(seed=1)}"],
        "kv_cache_bytes": "4MiB",
        "adapter_host_bytes": "16MiB",
        "adapter_device_bytes": "8MiB",
    }
    async with running_app(load_config(settings, {})) as app:
        transport = httpx.ASGITransport(app)
        async with AsyncQuickchange("http://127.0.0.1", transport=transport) as client:
            yield client


async def test_from_upload_to_rollback(
    client: AsyncQuickchange, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    sent: list[tuple[int, int]] = []
    first = await client.adapters.upload(
        make_adapter(seed=2),
        name="a",
        tags=["v1", "tried"],
        progress=lambda *each: sent.append(each),
    )
    assert sent[-1][0] == sent[-1][1] > first.bytes.file
    second = await client.adapters.upload(make_adapter(seed=3), name="a", alias="default")
    adapter = await client.adapters.get("a")
    assert (adapter.aliases, adapter.tags) == ({"default": 2}, ["v1", "tried"])
    answer = await client.chat("a", "hello", max_tokens=4)
    assert answer.meta.adapter_digest == second.digest
    async with await client.stream_complete("a:1", "hello", max_tokens=4) as stream:
        assert stream.meta.adapter_digest == first.digest
        assert [chunk async for chunk in stream][-1].usage
    assert (await client.adapters.rollback("a")).aliases == {"default": 1}
    used = await client.adapters.get("a")
    assert [version.requests for version in used.versions] == [1, 1]
    config = (await client.adapters.get_config("a", 1)).values
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 8, 16)
    await client.adapters.download("a", 1, tmp_path / "copy")
    assert [event.action for event in await client.adapters.events("a")][-1] == "set_alias"
    assert (await client.memory()).bytes["base"] > 0
    assert (await client.adapters.delete("a")).deleted


async def test_refusals_and_keys(client: AsyncQuickchange, tmp_path: Path) -> None:
    assert [model.id for model in (await client.models.list()).data] == [
        *("tiny", "given", "given@default")
    ]
    with pytest.raises(NotFound):
        await client.chat("nobody", "x")
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "adapter_config.json").write_text("{}")
    (bad / "adapter_model.safetensors").write_bytes(b"\x80pickle")
    with pytest.raises(UploadRefused) as refused:
        await client.adapters.upload(bad, name="bad")
    assert refused.value.problems
    await client.keys.create(scopes=["admin"])
    with pytest.raises(InvalidApiKey):  # from here on everybody needs one
        await client.models.list()
