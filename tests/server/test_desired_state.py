"""Pin, merge and disable as desired state: on every server of a catalog, and after a restart."""

import asyncio
import logging
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from quickchange_server.adapter_views import ActionView
from quickchange_server.engine.interface import ResidentAdapter
from quickchange_server.errors import Conflict, NotFound, PreconditionFailed, Unavailable

from tests.adapters.adapter_files import config_values, q_pairs, write_adapter
from tests.server.service_world import SEEN_S, SPEC, World, meaning, seen


@pytest.fixture
async def worlds(tmp_path: Path) -> AsyncIterator[tuple[World, World]]:
    """Two servers that share their disk, with `a` version 1 known to both."""
    async for pair in two_servers(tmp_path, ""):
        yield pair


@pytest.fixture
async def worlds_anywhere(tmp_path: Path, catalog_url: str) -> AsyncIterator[tuple[World, World]]:
    """The same, on each kind of database."""
    async for pair in two_servers(tmp_path, catalog_url):
        yield pair


async def two_servers(tmp_path: Path, url: str) -> AsyncIterator[tuple[World, World]]:
    """Start two servers on one disk and catalog."""
    here, there = (World(tmp_path / "store", catalog_url=url) for _ in range(2))
    for world in (here, there):
        await world.start()
    await here.upload("a")
    await seen(lambda: meaning(there, "a") == 1)
    yield here, there
    for world in (here, there):
        await world.service.stop()


def resident(world: World, model: str = "a") -> ResidentAdapter | None:
    """Return what a server's engine holds of a model."""
    return world.engine.snapshot().adapters.get(world.service.resolve(model).digest)


def is_pinned(world: World, model: str = "a") -> bool:
    held = resident(world, model)
    return held is not None and held.is_pinned


def is_merged(world: World, model: str = "a") -> bool:
    held = resident(world, model)
    return held is not None and held.merged_bytes > 0


async def same_etag(here: World, there: World) -> None:
    """Wait until both servers have seen the same changes of `a`."""
    async with asyncio.timeout(SEEN_S):
        while (await here.service.get("a")).etag != (await there.service.get("a")).etag:
            await asyncio.sleep(0.01)


async def actions(world: World, name: str = "a") -> list[Any]:
    return [event["action"] for event in await world.service.events(name)]


async def test_pin_and_merge_are_done_everywhere_and_undone(
    worlds_anywhere: tuple[World, World],
) -> None:
    here, there = worlds_anywhere
    pinned = await here.service.wish("pin", "a", actor="admin")
    assert (pinned.version.pinned, pinned.version.tier) == (True, "device")
    assert pinned.to_json()["pinned"]
    assert is_pinned(here)
    await seen(lambda: is_pinned(there))
    assert (await there.service.get_version("a")).pinned
    merged = await there.service.wish("merge", "a")
    assert merged.merged_bytes > 0
    await seen(lambda: is_merged(here))
    for action in ("pin", "merge"):  # a repeat changes nothing, here or in the log
        await here.service.wish(action, "a")  # type: ignore[arg-type]
    assert (await here.service.wish("unmerge", "a")).freed.merged == merged.merged_bytes
    await seen(lambda: not is_merged(there))
    await there.service.wish("unpin", "a")
    await seen(lambda: not is_pinned(here))
    assert is_merged(here) is is_merged(there) is False
    assert (await actions(here))[-4:] == ["pin", "merge", "unmerge", "unpin"]
    by = {event["action"]: event["actor"] for event in await here.service.events("a")}
    assert by["pin"] == "admin"


async def test_a_disabled_version_is_unknown_to_requests_and_gives_its_memory_back(
    worlds: tuple[World, World],
) -> None:
    here, there = worlds
    await here.upload("a", 1)
    await seen(lambda: meaning(there, "a:2") == 2)
    async with there.running("a") as running:
        before = await here.service.get("a")
        done = await here.service.set_state("disable", "a", 1)
        assert done.version.state == done.to_json()["state"] == "disabled"
        assert meaning(here, "a") is None
        assert meaning(here, "a:2") == 2
        await seen(lambda: meaning(there, "a") is None)
        assert "a" not in [model.id for model in there.service.models()]
        assert (await there.service.get_version("a", 1)).state == "disabled"
        assert (await there.service.get("a")).etag != before.etag
        assert there.engine.live == {"r"}
        there.engine.resume.set()
        assert len(await running) > 1  # the running request finished
    await seen(lambda: not there.engine.loaded)
    with pytest.raises(Conflict, match="enable it first"):
        await here.service.load("a", 1)
    with pytest.raises(Conflict, match="enable it first"):
        await here.service.set_alias("a", "canary", 1)
    assert await here.service.set_state("disable", "a", 1)  # idempotent
    await here.service.set_state("enable", "a", 1)
    await seen(lambda: meaning(there, "a") == 1)
    await there.service.acquire(there.service.resolve("a"))
    assert (await actions(here))[-2:] == ["disable", "enable"]


async def test_the_same_bytes_as_a_disabled_version_are_that_version(
    worlds: tuple[World, World],
) -> None:
    here, _ = worlds
    await here.service.set_state("disable", "a")
    result = await here.service.upload(await here.form("a"))
    assert (result.created, result.version.version, result.version.state) == (False, 1, "disabled")
    with pytest.raises(Conflict, match="disabled"):
        await here.upload("a", alias="default")
    assert await here.upload("a", 1) == 2
    assert meaning(here, "a") is None  # default still means version 1


async def test_desired_state_comes_back_after_a_restart(tmp_path: Path) -> None:
    world = World(tmp_path / "store")
    await world.start()
    for name in ("a", "b", "c"):
        await world.upload(name, ord(name))
    await world.service.wish("pin", "a")
    await world.service.wish("merge", "b")
    await world.service.set_state("disable", "c")
    world = await world.restart()
    await seen(lambda: is_pinned(world, "a") and is_merged(world, "b"))
    assert meaning(world, "c") is None
    assert (await world.service.get_version("c", 1)).state == "disabled"
    await world.service.wish("unpin", "a")
    await world.service.delete_adapter("b")
    world = await world.restart()
    assert await world.upload("b", ord("b")) == 2  # the deleted version's wish went with it
    await asyncio.sleep(0.1)
    assert not world.engine.loaded
    await world.service.stop()


async def test_scope_replica_acts_here_alone_until_the_catalog_says_something_new(
    worlds: tuple[World, World],
) -> None:
    here, there = worlds
    await here.service.wish("merge", "a", is_here_only=True)
    await here.service.set_state("disable", "a", is_here_only=True)
    await seen(lambda: not here.engine.loaded)  # what takes no requests needs no memory
    assert meaning(here, "a") is None
    await here.service.set_state("enable", "a", is_here_only=True)
    await here.service.wish("pin", "a", is_here_only=True)
    await there.upload("other", 5)
    await seen(lambda: meaning(here, "other") == 1)
    assert is_pinned(here)
    assert not there.engine.loaded
    assert "pin" not in await actions(here)
    await there.service.wish("pin", "a")
    await same_etag(here, there)
    await there.service.wish("unpin", "a")
    await seen(lambda: not is_pinned(here))
    await there.service.wish("merge", "a")
    await seen(lambda: is_merged(here))
    await here.service.wish("unmerge", "a", is_here_only=True)
    await asyncio.sleep(0.1)
    assert not is_merged(here)
    assert is_merged(there)
    await here.service.wish("merge", "a")  # says again what the catalog says: here too
    assert is_merged(here)


async def test_a_server_that_cannot_afford_a_merge_says_so_and_tries_again(
    worlds: tuple[World, World], caplog: pytest.LogCaptureFixture
) -> None:
    here, there = worlds
    there.engine.merge_ceiling_bytes = 0
    with caplog.at_level(logging.WARNING):
        await here.service.wish("merge", "a")
        await seen(lambda: there.service.num_unmet() == {"pin": 0, "merge": 1})
        await seen(lambda: "a:1: merge does not work here yet" in caplog.text)
        await there.service.acquire(there.service.resolve("a"))  # it is served unmerged
        await asyncio.sleep(1.2)  # more than one attempt
    assert caplog.text.count("does not work here yet") == 1
    assert here.service.num_unmet() == {"pin": 0, "merge": 0}
    there.engine.merge_ceiling_bytes = 1 << 30
    await seen(lambda: is_merged(there))
    await seen(lambda: there.service.num_unmet()["merge"] == 0)


async def test_a_merge_that_this_server_cannot_afford_is_nobody_s_wish(
    worlds: tuple[World, World],
) -> None:
    here, there = worlds
    here.engine.merge_ceiling_bytes = 0
    with pytest.raises(Conflict) as refused:
        await here.service.wish("merge", "a")
    assert refused.value.code == "merge_budget"
    assert "merge" not in await actions(here)
    await asyncio.sleep(0.2)
    assert not there.engine.merged
    assert here.service.num_unmet()["merge"] == 0


async def test_unloading_what_is_pinned_is_refused_and_what_is_merged_waits_for_use(
    worlds: tuple[World, World],
) -> None:
    here, _ = worlds
    await here.service.wish("pin", "a")
    await here.service.wish("merge", "a")
    with pytest.raises(Conflict, match="unpin it first"):
        await here.service.unload("a")
    await here.service.wish("unpin", "a", is_here_only=True)
    freed = (await here.service.unload("a")).freed
    assert freed.merged > 0
    await asyncio.sleep(0.2)
    assert not here.engine.loaded
    await here.service.acquire(here.service.resolve("a"))
    await seen(lambda: is_merged(here))


async def test_an_unload_that_outlasts_its_caller_leaves_it_away_until_it_is_used(
    worlds: tuple[World, World],
) -> None:
    here, _ = worlds
    await here.service.wish("merge", "a")
    async with here.running("a"):
        with pytest.raises(Unavailable, match="it is unloaded when they end"):
            await here.service.unload("a", timeout_s=5 * here.poll_s)
    await seen(lambda: not here.engine.loaded)
    await asyncio.sleep(5 * here.poll_s)
    assert not here.engine.loaded
    assert here.engine.num_loads == 1
    await here.service.acquire(here.service.resolve("a"))
    await seen(lambda: is_merged(here))


async def test_what_a_static_adapter_shadows_needs_no_memory(tmp_path: Path) -> None:
    world = World(tmp_path / "store")
    await world.start()
    await world.upload("a", 1)
    await world.service.wish("pin", "a")
    write_adapter(tmp_path / "static", q_pairs(SPEC), config_values())
    await world.service.add_static("a", tmp_path / "static")
    await seen(lambda: not world.engine.loaded)
    await seen(lambda: world.service.num_unmet() == {"pin": 0, "merge": 0})
    await world.service.stop()


async def test_what_another_server_deletes_is_drained_and_unloaded(
    worlds_anywhere: tuple[World, World],
) -> None:
    here, there = worlds_anywhere
    await here.service.wish("pin", "a")
    await seen(lambda: is_pinned(there))
    async with there.running("a") as running:
        deleted = await here.service.delete_adapter("a")
        assert deleted.freed.disk > 0
        assert here.blobs() == set()
        await seen(lambda: meaning(there, "a") is None)
        await asyncio.sleep(0.1)
        assert there.engine.loaded  # its request still runs
        there.engine.resume.set()
        assert len(await running) > 1
    await seen(lambda: not there.engine.loaded)
    await asyncio.sleep(0.1)
    assert not there.engine.loaded  # its pin has gone with it


async def test_bytes_that_another_server_removes_during_a_load_are_a_clean_404(
    worlds: tuple[World, World],
) -> None:
    here, _ = worlds
    there = World(here.root, poll_s=60.0)  # it will not see what comes
    await there.start()
    await here.service.delete_adapter("a")
    assert meaning(there, "a") == 1
    with pytest.raises(NotFound) as refused:
        await there.service.acquire(there.service.resolve("a"))
    assert refused.value.code == "model_not_found"
    assert meaning(there, "a") is None  # it has looked again by itself
    await there.service.stop()


async def test_bytes_that_are_lost_are_said_to_be_unavailable(worlds: tuple[World, World]) -> None:
    here, there = worlds
    for sha256 in here.blobs():
        here.store.delete(sha256)
    with pytest.raises(Unavailable) as refused:
        await there.service.acquire(there.service.resolve("a"))
    assert refused.value.code == "store_unavailable"
    assert meaning(there, "a") == 1


async def test_bytes_under_two_names_stay_pinned_while_one_of_them_wishes(
    worlds: tuple[World, World],
) -> None:
    here, there = worlds
    await here.upload("same")
    await here.service.wish("pin", "a")
    await here.service.wish("pin", "same")
    await here.service.wish("unpin", "a")
    assert is_pinned(here, "same")
    assert (await here.service.get_version("same")).pinned
    await here.service.wish("unpin", "same")
    assert not is_pinned(here, "a")
    await seen(lambda: not is_pinned(there, "a"))


async def test_state_changes_compare_the_etag_and_obey_the_owner(
    worlds: tuple[World, World], tmp_path: Path
) -> None:
    here, _ = worlds
    old = (await here.service.get("a")).etag
    await here.upload("a", 1)
    with pytest.raises(PreconditionFailed):
        await here.service.set_state("disable", "a", 2, if_match=old)
    with pytest.raises(PreconditionFailed):
        await here.service.delete_version("a", 2, if_match=old)
    with pytest.raises(PreconditionFailed):
        await here.service.delete_adapter("a", if_match=old)
    new = (await here.service.get("a")).etag
    assert meaning(here, "a:2") == 2
    await here.service.set_state("disable", "a", 2, if_match=new)
    folder = tmp_path / "static"
    write_adapter(folder, q_pairs(SPEC), config_values())
    await here.service.add_static("fixed", folder)
    with pytest.raises(Conflict, match="static"):
        await here.service.set_state("disable", "fixed")
    shown: ActionView = await here.service.wish("pin", "fixed")
    assert shown.version.pinned
    with pytest.raises(Conflict, match="pinned"):
        await here.service.unload("a")  # the same bytes


async def test_what_does_not_exist_cannot_be_wished_for(
    worlds: tuple[World, World],
) -> None:
    here, _ = worlds
    with pytest.raises(NotFound):
        await here.service.wish("pin", "nobody")
    with pytest.raises(NotFound):
        await here.service.wish("merge", "a", 9)
    with pytest.raises(NotFound):
        await here.service.set_state("disable", "a", 9)
