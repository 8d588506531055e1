"""Three servers on one catalog, asked for anything at once, come to agree with one another."""

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from quickchange_server.errors import QuickchangeError

from tests.server.service_world import World

NUM_SERVERS, NUM_CALLERS, NUM_CALLS = 3, 4, 40
NAMES = ("a", "b", "c")
WISHES = ("pin", "unpin", "merge", "unmerge")
DOINGS = ("upload", "upload", "move", "acquire", "acquire", "delete", "disable", "enable", *WISHES)


@pytest.fixture
async def worlds(tmp_path: Path) -> AsyncIterator[list[World]]:
    """Start servers that share their disk."""
    worlds = [World(tmp_path / "store") for _ in range(NUM_SERVERS)]
    for world in worlds:
        await world.start()
    yield worlds
    for world in worlds:
        await world.service.stop()


async def do_something(world: World, chosen: random.Random) -> str:
    """Ask a server for one thing, and return what it was."""
    doing, name = chosen.choice(DOINGS), chosen.choice(NAMES)
    service = world.service
    if doing == "upload":
        await world.upload(name, chosen.randrange(5))
    elif doing == "move":
        await service.set_alias(name, "default", chosen.randrange(1, 5))
    elif doing == "acquire":
        await service.acquire(service.resolve(name))
    elif doing == "delete" and chosen.random() < 0.4:
        await service.delete_adapter(name, timeout_s=5)
    elif doing == "delete":
        await service.delete_version(name, chosen.randrange(1, 5), timeout_s=5)
    elif doing in WISHES:
        await service.wish(doing, name)  # type: ignore[arg-type]
    else:
        await service.set_state(doing, name)  # type: ignore[arg-type]
    return doing


async def picture(world: World) -> dict[str, Any]:
    """Return what a server shows of all adapters."""
    found: dict[str, Any] = {}
    for adapter in (await world.service.list(limit=100)).data:
        shown = [(v.version, v.state, v.pinned, v.merged) for v in adapter.versions]
        found[adapter.name] = adapter.etag, adapter.aliases, shown
    return found


def is_settled(world: World) -> bool:
    """Whether a server holds nothing that is not served, and does all that is wished."""
    adapters = world.catalog.list_adapters()
    ready = [v for adapter in adapters for v in adapter.versions if v.state == "ready"]
    wants_pin = {v.digest for v in ready if v.wants_pin}
    wants_merge = {v.digest for v in ready if v.wants_merge}
    engine = world.engine
    return (
        engine.loaded.keys() <= {v.digest for v in ready}
        and engine.pinned == wants_pin
        and engine.merged.keys() == wants_merge
    )


async def test_whatever_they_are_asked_at_once_they_come_to_agree(worlds: list[World]) -> None:
    done: Counter[str] = Counter()
    refused: set[int] = set()

    async def call(seed: int) -> None:
        chosen = random.Random(seed)
        for _ in range(NUM_CALLS):
            try:
                done[await do_something(chosen.choice(worlds), chosen)] += 1
            except QuickchangeError as error:
                refused.add(error.status)
            await asyncio.sleep(chosen.random() * 0.01)

    await asyncio.gather(*(call(seed) for seed in range(NUM_CALLERS)))
    assert refused <= {404, 409}  # not there (any more), or not in this state
    assert sum(done.values()) > NUM_CALLS
    assert done["upload"]
    assert done["delete"]
    async with asyncio.timeout(20):
        while True:
            pictures = [await picture(world) for world in worlds]
            if all(map(is_settled, worlds)) and pictures.count(pictures[0]) == NUM_SERVERS:
                break
            await asyncio.sleep(0.05)
    listed = worlds[0].catalog.list_adapters()
    referred = {f.sha256 for a in listed for v in a.versions for f in v.files}
    assert worlds[0].blobs() == referred
    print(dict(done), {name: shown[1:] for name, shown in pictures[0].items()})
