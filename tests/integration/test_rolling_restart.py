"""Servers on one store and catalog are restarted one after another under load: nothing is lost."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from quickchange_adapters.catalog import sqlite_url

from tests.conftest import MakeAdapter
from tests.integration.balancer import Balancer
from tests.integration.rolling_load import CONFIG, WEIGHTS, Load
from tests.server.server_process import Server

SEEN_S = 20.0
LEAVE_S = 120
READY_S = 0.5
"""How long the balancer may take to see who is ready: five of its looks."""


@pytest.fixture
def catalog(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """URL of a catalog that servers share: PostgreSQL where it can run, else SQLite."""
    try:
        url: str = request.getfixturevalue("postgres").empty_database()
    except pytest.skip.Exception:
        return sqlite_url(tmp_path / "catalog.db")
    return url


class Fleet:
    """Server processes behind a balancer; a server that starts again has another port."""

    def __init__(self, base: Path, catalog: str, folder: Path) -> None:
        self._options = ["--model", str(base), "--catalog", catalog]
        self._options += ["--store", str(folder / "store"), "--drain-delay", "3"]
        self._options += ["--drain-timeout", str(LEAVE_S)]
        self._folder = folder
        self.balancer = Balancer()
        self.servers: list[Server] = []
        self.logs: list[Path] = []

    def launch(self) -> Server:
        """Start a process."""
        folder = self._folder / f"server-{len(self.logs)}"
        folder.mkdir()
        server = Server(self._options, folder)
        self.servers.append(server)
        self.logs.append(server.log)
        return server

    async def join(self, server: Server) -> None:
        """Wait until a process is ready, and let the balancer know it."""
        await asyncio.to_thread(server.wait_ready)
        self.balancer.servers.add(server.url)

    async def retire(self, server: Server) -> int:
        """Tell a server to stop, as Kubernetes does, and return its exit code."""
        server.process.terminate()
        code = await asyncio.to_thread(server.process.wait, LEAVE_S)
        self.balancer.servers.discard(server.url)
        self.servers.remove(server)
        return code

    def close(self) -> None:
        """Kill what is left."""
        for server in self.servers:
            server.process.kill()
            server.process.wait()


@pytest.fixture
async def fleet(tiny_base: Path, catalog: str, tmp_path: Path) -> AsyncIterator[Fleet]:
    """Two servers that are ready."""
    fleet = Fleet(tiny_base, catalog, tmp_path)
    try:
        for server in (fleet.launch(), fleet.launch()):
            await fleet.join(server)
        yield fleet
    finally:
        fleet.close()


async def push(client: httpx.AsyncClient, folder: Path, name: str) -> str:
    files = {part: (part, (folder / part).read_bytes()) for part in (CONFIG, WEIGHTS)}
    parts = {"adapter_config": files[CONFIG], "adapter_model": files[WEIGHTS]}
    answer = await client.post("/v1/adapters", data={"name": name}, files=parts)
    assert answer.status_code == 201, answer.text
    digest: str = answer.json()["digest"]
    return digest


async def act(client: httpx.AsyncClient, name: str, action: str) -> None:
    answer = await client.post(f"/v1/adapters/{name}/{action}")
    assert answer.status_code == 200, answer.text


async def seen(is_true: Callable[[], Any]) -> None:
    """Wait until something shows, for as long as a busy machine may take."""
    deadline_s = time.monotonic() + SEEN_S
    while not await is_true():
        assert time.monotonic() < deadline_s
        await asyncio.sleep(0.1)


async def states(url: str) -> dict[str, tuple[object, ...]]:
    """Return what each named version is on a server, and what its requests get there."""
    found: dict[str, tuple[object, ...]] = {}
    async with httpx.AsyncClient(base_url=url, timeout=60) as client:
        for name in ("ada", "pinned", "merged", "disabled", "late"):
            answer = await client.get(f"/v1/adapters/{name}/versions/1")
            version = answer.json()
            body = {"model": name, "prompt": "the", "max_tokens": 1}
            status = (await client.post("/v1/completions", json=body)).status_code
            shown = (version.get(key) for key in ("digest", "state", "pinned", "merged"))
            found[name] = (status, *shown)
    return found


async def test_a_rolling_restart_under_load_loses_nothing(
    fleet: Fleet, make_adapter: MakeAdapter
) -> None:
    address = await fleet.balancer.start()
    folder = make_adapter(seed=0)
    names = ("ada", "pinned", "merged", "disabled", "late")
    async with httpx.AsyncClient(base_url=fleet.servers[0].url, timeout=60) as client:
        digests = {
            name: await push(client, make_adapter(seed=n), name) for n, name in enumerate(names)
        }
        for name, action in (("pinned", "pin"), ("merged", "merge"), ("disabled", "disable")):
            await act(client, name, action)
    wished = {
        "ada": (200, digests["ada"], "ready", False, False),
        "pinned": (200, digests["pinned"], "ready", True, False),
        "merged": (200, digests["merged"], "ready", False, True),
        "disabled": (404, digests["disabled"], "disabled", False, False),
        "late": (200, digests["late"], "ready", False, False),
    }

    async def all_as_wished() -> bool:
        return all([await states(server.url) == wished for server in fleet.servers])

    await seen(all_as_wished)
    models = {"tiny-llama": None} | {name: digests[name] for name in ("ada", "pinned", "merged")}
    load = Load(address, folder, models)
    working = asyncio.create_task(load.run())
    for server in list(fleet.servers):
        before = load.done.copy()
        assert await fleet.retire(server) == 0
        assert load.done["streams"] > before["streams"]
        if wished["late"][3] is False:  # while one is away, the other is asked for something
            async with httpx.AsyncClient(base_url=address, timeout=60) as client:
                await act(client, "late", "pin")
            wished["late"] = (200, digests["late"], "ready", True, False)
        successor = fleet.launch()
        await fleet.join(successor)
        await asyncio.sleep(READY_S)
        assert fleet.balancer.ready == {each.url for each in fleet.servers}
    load.stop.set()
    await working
    assert load.lost == []
    assert load.done["refused"] > 0
    assert min(load.done[kind] for kind in ("streams", "uploads", "downloads")) > 4
    await seen(all_as_wished)
    for server in fleet.servers:
        for name, digest in load.uploads.items():
            answer = await asyncio.to_thread(server.generate, name, max_tokens=1)
            assert answer.status_code == 200, answer.text
            assert answer.headers["x-quickchange-adapter-digest"] == digest
    await fleet.balancer.stop()
    for log in fleet.logs:
        assert "Traceback" not in log.read_text()
        assert "did not finish in time" not in log.read_text()
    print(dict(load.done))
