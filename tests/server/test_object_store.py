"""A server whose adapters lie in an object store: tiers, outages, and a start without it."""

import asyncio
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Literal

import httpx
import pytest
from quickchange_adapters.disk_cache import DiskCache
from quickchange_adapters.object_blobs import ObjectBlobs, Patience
from quickchange_adapters.remote_store import RemoteStore
from quickchange_adapters.store import LocalStore, StagedFile
from quickchange_server.config import load_config
from quickchange_server.errors import CannotStart, NotFound, Unavailable
from quickchange_server.storage import open_storage

from tests.conftest import MakeAdapter
from tests.s3_server import FaultyProxy, S3Server
from tests.server.service_world import World
from tests.server.test_serving import StartServer, start_server

__all__ = ["start_server"]
PATIENCE = Patience(
    max_attempts=2, pause_s=0.01, give_up_s=60, connect_s=30, reply_s=60, delete_s=60
)
WEIGHTS: Literal["adapter_model.safetensors"] = "adapter_model.safetensors"
METHODS = ("GET", "HEAD", "PUT", "POST", "DELETE")


@pytest.fixture
def url(s3_server: S3Server, s3_proxy: FaultyProxy) -> str:
    return f"s3://{s3_server.create_bucket()}/adapters"


@pytest.fixture
async def world(url: str, tmp_path: Path) -> AsyncIterator[World]:
    """A started service on an object store, with the adapter `a`."""

    def open_store(root: Path) -> RemoteStore:
        blobs = ObjectBlobs(url, PATIENCE)
        return RemoteStore(blobs, DiskCache(root / "cache", 1 << 24, blobs))

    world = World(tmp_path / "world", open_store=open_store)
    await world.start()
    await world.upload("a")
    yield world
    await world.service.stop()


def evict_all(world: World) -> int:
    return sum(world.store.evict(sha256) for sha256 in world.blobs())


def go_away(proxy: FaultyProxy) -> None:
    for method in METHODS:
        proxy.fail(method, "503", times=500)


async def tier(world: World, name: str = "a") -> str:
    return (await world.service.get_version(name)).tier


async def test_a_version_is_remote_until_it_is_asked_for(world: World) -> None:
    assert await tier(world) == "disk"
    assert evict_all(world) > 0
    assert await tier(world) == "remote"
    await world.service.acquire(world.service.resolve("a"))
    assert await tier(world) in ("host", "device")
    await world.service.unload("a")
    assert await tier(world) == "disk"


async def test_a_file_comes_back_byte_for_byte_through_the_cache(world: World) -> None:
    async with world.service.open_file("a", 1, WEIGHTS) as held:
        data = held.path.read_bytes()
    evict_all(world)
    async with world.service.open_file("a", 1, WEIGHTS) as held:
        # Whoever deletes it meanwhile does not take it away from a download.
        assert [world.store.evict(sha256) for sha256 in world.blobs() if sha256 == held.sha256] == [
            0
        ]
        assert held.path.read_bytes() == data
    assert not held.path.exists()


async def test_a_delete_frees_the_bytes_there_and_here(world: World) -> None:
    num_bytes = sum(blob.num_bytes for blob in world.store.list())
    freed = (await world.service.delete_adapter("a")).freed
    assert (freed.remote, freed.disk) == (num_bytes, num_bytes)
    assert world.blobs() == set()


async def test_an_outage_stops_uploads_and_not_what_is_here(
    world: World, s3_proxy: FaultyProxy
) -> None:
    await world.upload("b", 1)
    await world.service.acquire(world.service.resolve("a"))
    (here,) = (v for v in (await world.service.get("b")).versions)
    assert here.tier == "disk"
    go_away(s3_proxy)
    with pytest.raises(Unavailable) as caught:
        await world.upload("c", 2)
    assert caught.value.code == "store_unavailable"
    assert not world.store.is_up
    for model in ("a", "b"):
        await world.service.acquire(world.service.resolve(model))
    assert not (await world.service.delete_adapter("b")).done
    with pytest.raises(NotFound):
        world.service.resolve("b")
    s3_proxy.heal()
    assert await world.upload("c", 2) == 1
    again = await world.restart()
    # The deleted version's bytes go with a sweep, at the next start at the latest.
    assert len(again.blobs()) == 3
    await again.service.stop()


async def test_what_is_not_here_is_unavailable_until_the_store_is_back(
    world: World, s3_proxy: FaultyProxy
) -> None:
    evict_all(world)
    go_away(s3_proxy)
    with pytest.raises(Unavailable) as caught:
        await world.service.acquire(world.service.resolve("a"))
    assert caught.value.code == "store_unavailable"
    s3_proxy.heal()
    await world.service.acquire(world.service.resolve("a"))


async def test_a_service_starts_while_the_store_is_away(
    world: World, s3_proxy: FaultyProxy
) -> None:
    go_away(s3_proxy)
    again = await world.restart()
    await again.service.acquire(again.service.resolve("a"))
    await again.service.stop()


class SlowStore(LocalStore):
    """A store that takes its time to keep bytes."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.may_put = threading.Event()
        self.may_put.set()

    def put(self, staged: StagedFile) -> None:
        assert self.may_put.wait(30)
        super().put(staged)


async def test_a_slow_upload_holds_up_no_other_change(tmp_path: Path) -> None:

    world = World(tmp_path / "world", open_store=SlowStore)
    await world.start()
    await world.upload("a")
    assert isinstance(world.store, SlowStore)
    world.store.may_put.clear()
    upload = asyncio.create_task(world.upload("b", 1))
    await asyncio.sleep(0.1)
    await asyncio.wait_for(world.service.set_alias("a", "x", 1), 20)
    assert not upload.done()
    world.store.may_put.set()
    assert await upload == 1
    await world.service.stop()


def test_a_whole_server_on_an_object_store(
    start_server: StartServer, make_adapter: MakeAdapter, url: str, tmp_path: Path
) -> None:
    catalog = ["--catalog", f"sqlite:///{tmp_path}/catalog.db"]
    server = start_server("--store", url, *catalog).wait_ready()
    folder = make_adapter(seed=3)
    files = {
        "adapter_config": (folder / "adapter_config.json").read_bytes(),
        "adapter_model": (folder / WEIGHTS).read_bytes(),
    }
    done = httpx.post(f"{server.url}/v1/adapters", data={"name": "a"}, files=files, timeout=60)
    assert (done.status_code, done.json()["tier"]) == (201, "disk")
    answer = server.generate("a", max_tokens=4).json()["choices"]
    server.process.kill()
    again = start_server("--store", url, *catalog).wait_ready()
    shown = httpx.get(f"{again.url}/v1/adapters/a/versions/1").json()
    assert shown["tier"] == "remote"
    file = httpx.get(f"{again.url}/v1/adapters/a/versions/1/files/{WEIGHTS}")
    assert file.content == files["adapter_model"]
    assert again.generate("a", max_tokens=4).json()["choices"] == answer
    gone = httpx.delete(f"{again.url}/v1/adapters/a", timeout=60).json()
    assert gone["freed_bytes"]["remote"] == sum(map(len, files.values()))


@pytest.mark.parametrize(
    ("store", "reason"),
    [
        ("s3://no-such-bucket/x", "there is no such bucket"),
        ("gs://bucket/x", "gs:// needs a package that is not here: "),
        ("nonsense://bucket/x", "nonsense:// is not known"),
    ],
)
def test_a_store_that_no_waiting_helps_ends_the_start(
    s3_proxy: FaultyProxy, tmp_path: Path, store: str, reason: str
) -> None:
    config = load_config({"store": store, "cache": str(tmp_path)}, {})
    with pytest.raises(CannotStart, match=f"^--store {store}: {reason}"):
        open_storage(config)
