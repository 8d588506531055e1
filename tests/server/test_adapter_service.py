"""The adapter service over a scripted engine, a real store and a real catalog."""

import asyncio
import hashlib
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from quickchange_adapters.event_log import EventRule
from quickchange_server.adapter_service import UploadForm, UploadRefused
from quickchange_server.errors import (
    Conflict,
    Forbidden,
    NotFound,
    PreconditionFailed,
    QuickchangeError,
    TooLarge,
    Unavailable,
)

from tests.adapters.adapter_files import (
    Array,
    config_values,
    q_pairs,
    small_spec,
    weights_bytes,
    write_adapter,
)
from tests.server.service_world import SPEC, SlowEngine, World, chunks, seen

VERSION_KEYS = {
    *("object", "name", "version", "digest", "state", "peft_type", "rank", "ranks"),
    *("target_modules", "task", "bytes", "tier", "pinned", "merged", "base", "created_at"),
    *("last_used_at", "requests", "report"),
}
ADAPTER_KEYS = {
    *("object", "name", "tenant", "visibility", "aliases", "versions", "tags", "created_at"),
}


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    world = World(tmp_path / "store")
    await world.engine.start()
    await world.service.start()
    yield world
    await world.service.stop()


def folder_of(path: Path, tensors: Mapping[str, Array] | None = None) -> Path:
    write_adapter(path, q_pairs(SPEC) if tensors is None else tensors, config_values())
    return path


async def test_an_upload_is_served_at_once(world: World) -> None:
    form = await world.form("sentiment")
    result = await world.service.upload(form)
    assert result.created
    shown = result.version.to_json()
    assert shown.keys() == VERSION_KEYS
    assert (shown["version"], shown["tier"], shown["state"]) == (1, "disk", "ready")
    assert (shown["rank"], shown["ranks"], shown["target_modules"]) == (4, [4], ["q_proj"])
    assert shown["bytes"]["file"] == sum(f.num_bytes for f in form.staged)
    assert shown["report"]["ok"]
    assert len(shown["report"]["modules"]["matched"]) == 2
    resolved = world.service.resolve("sentiment")
    assert (resolved.kind, resolved.served_name, resolved.version) == ("adapter", "sentiment", 1)
    assert resolved.digest == result.version.digest
    assert (shown["requests"], shown["last_used_at"]) == (0, None)
    await world.service.acquire(resolved)
    assert world.engine.loaded[resolved.digest].pairs.keys() == {
        m for m in SPEC.modules if m.endswith("q_proj")
    }
    await world.service.acquire(resolved)
    await world.service.acquire(resolved, is_repeat=True)  # the same request, tried once more
    view = await world.service.get_version("sentiment")
    assert view.to_json()["requests"] == 2
    assert (view.tier, view.host_bytes > 0, view.last_used_at is not None) == ("device", True, True)
    assert world.incoming() == []


async def test_the_digest_is_that_of_the_files_as_they_were_sent(world: World) -> None:
    form = await world.form("a")
    raw = b"".join(bytes.fromhex(file.sha256) for file in form.staged)
    version = (await world.service.upload(form)).version
    assert version.digest == hashlib.sha256(raw).hexdigest()


async def test_files_come_back_byte_for_byte(world: World) -> None:
    weights = weights_bytes(q_pairs(SPEC))
    await world.service.upload(await world.form_of("a", weights))
    async with world.service.open_file("a", 1, "adapter_model.safetensors") as held:
        assert held.path.read_bytes() == weights
    with pytest.raises(NotFound) as caught:
        async with world.service.open_file("a", 1, "task.json"):
            pass
    assert caught.value.code == "file_not_found"


async def test_the_same_bytes_again_are_the_same_version(world: World) -> None:
    await world.upload("a", 0)
    await world.upload("a", 1)
    again = await world.service.upload(await world.form("a", 1, alias="default"))
    assert (again.created, again.version.version) == (False, 2)
    assert world.service.resolve("a").version == 2
    num_blobs = len(world.blobs())
    assert await world.upload("b", 1) == 1
    assert len(world.blobs()) == num_blobs
    assert world.incoming() == []


async def test_a_second_version_goes_live_by_its_alias(world: World) -> None:
    await world.upload("a", 0)
    await world.upload("a", 1)
    assert world.service.resolve("a").version == 1
    assert world.service.resolve("a:2").version == 2
    view = await world.service.set_alias("a", "default", 2)
    assert view.aliases == {"default": 2}
    assert world.service.resolve("a").version == 2
    with pytest.raises(PreconditionFailed):
        await world.service.set_alias("a", "default", 1, if_match='"1"')
    with pytest.raises(PreconditionFailed):
        await world.service.set_alias("a", "default", 1, if_match='"not a number"')
    await world.service.set_alias("a", "default", 1, if_match=view.etag)
    assert world.service.resolve("a").version == 1
    await world.service.set_alias("a", "canary", 2, if_match="*")
    assert world.service.resolve("a@canary").version == 2
    await world.service.delete_alias("a", "canary")
    with pytest.raises(NotFound):
        world.service.resolve("a@canary")


@pytest.mark.parametrize(
    ("changes", "code", "kind"),
    [
        ({"name": "No Good"}, "invalid_name", UploadRefused),
        ({"name": "tiny"}, "conflict", Conflict),
        ({"alias": "sha256"}, "invalid_name", UploadRefused),
        ({"visibility": "secret"}, "config_invalid", UploadRefused),
    ],
)
async def test_forms_that_are_refused(
    world: World, changes: dict[str, Any], code: str, kind: type[QuickchangeError]
) -> None:
    with pytest.raises(kind) as caught:
        await world.service.upload(await world.form(**{"name": "a", **changes}))
    assert caught.value.code == code
    assert world.blobs() == set()
    assert world.incoming() == []


async def test_refused_weights_leave_nothing(world: World) -> None:
    form = await world.form_of("a", b"\x80\x04pickled" * 20, config_values(use_dora=True))
    with pytest.raises(UploadRefused) as caught:
        await world.service.upload(form)
    codes = [problem.code for problem in caught.value.problems]
    assert codes == ["config_unsupported", "weights_not_safetensors"]
    assert (caught.value.status, caught.value.code) == (400, "config_unsupported")
    assert world.blobs() == set()
    assert world.incoming() == []
    with pytest.raises(NotFound):
        world.service.resolve("a")


async def test_missing_parts_and_a_bad_task_are_said(world: World) -> None:
    task = await world.service.stage("task.json", chunks(b"{"))
    with pytest.raises(UploadRefused) as caught:
        await world.service.upload(UploadForm("a", None, None, task))
    codes = {(p.code, p.where) for p in caught.value.problems}
    assert codes == {
        ("config_invalid", "adapter_config"),
        ("weights_invalid", "adapter_model"),
        ("task_invalid", "task"),
    }
    assert world.incoming() == []


async def test_a_dry_run_tells_all_and_keeps_nothing(world: World) -> None:
    report = await world.service.check(await world.form("a"))
    assert (report["object"], report["ok"], report["problems"]) == ("adapter.report", True, [])
    bad = await world.form_of("tiny", b"nothing", config_values(r=0))
    report = await world.service.check(bad)
    assert not report["ok"]
    found = {problem["code"] for problem in report["problems"]}
    assert found == {"conflict", "config_invalid", "weights_not_safetensors"}
    assert all(sorted(p) == ["code", "hint", "message", "where"] for p in report["problems"])
    assert world.blobs() == set()
    assert world.incoming() == []
    assert (await world.service.list()).data == ()


async def test_a_part_that_is_too_large_leaves_nothing(world: World) -> None:
    with pytest.raises(TooLarge) as caught:
        await world.service.stage("adapter_model.safetensors", chunks(bytes((1 << 20) + 1)))
    assert caught.value.code == "too_large"
    assert world.incoming() == []


async def test_a_part_that_breaks_off_leaves_nothing(world: World) -> None:
    async def broken() -> AsyncIterator[bytes]:
        yield b"x" * 5000
        raise ConnectionError("the client left")

    with pytest.raises(ConnectionError):
        await world.service.stage("adapter_model.safetensors", broken())
    assert world.incoming() == []


async def test_a_cold_adapter_is_loaded_once_for_all_who_wait(world: World) -> None:
    await world.upload("a")
    world.engine.load_s = 0.05
    resolved = world.service.resolve("a")
    await asyncio.gather(*(world.service.acquire(resolved) for _ in range(20)))
    assert world.engine.num_loads == 1
    assert world.engine.is_loaded(resolved.digest)


async def test_a_waiter_who_leaves_does_not_stop_the_load(world: World) -> None:
    await world.upload("a")
    world.engine.load_s = 0.5
    resolved = world.service.resolve("a")
    first, second = (asyncio.create_task(world.service.acquire(resolved)) for _ in range(2))
    await seen(lambda: world.engine.num_loads == 1)
    first.cancel()
    await second
    assert first.cancelled()
    assert world.engine.num_loads == 1


async def test_the_base_needs_no_loading(world: World) -> None:
    resolved = world.service.resolve("tiny")
    assert (resolved.kind, resolved.digest, resolved.version) == ("base", SPEC.digest, None)
    await world.service.acquire(resolved)
    assert world.engine.num_loads == 0


@pytest.mark.parametrize("model", ["b", "a:2", "a@b", "tiny@default", "", "a@sha256:00", "../a"])
async def test_unknown_models(world: World, model: str) -> None:
    await world.upload("a")
    with pytest.raises(NotFound) as caught:
        world.service.resolve(model)
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


async def test_delete_gives_everything_back(world: World) -> None:
    await world.upload("a")
    resolved = world.service.resolve("a")
    await world.service.acquire(resolved)
    await world.service.merge("a")
    num_bytes = world.engine.loaded[resolved.digest].num_bytes
    file_bytes = sum(blob.num_bytes for blob in world.store.list())
    done = await world.service.delete_adapter("a")
    shown = done.to_json()
    assert (shown["object"], shown["deleted"]) == ("adapter.deleted", True)
    assert shown["freed_bytes"] == {
        "device": num_bytes,
        "host": num_bytes,
        "merged": 64 * 64 * 4,
        "disk": file_bytes,
        "remote": 0,
    }
    assert not world.engine.is_loaded(resolved.digest)
    assert world.blobs() == set()
    with pytest.raises(NotFound):
        world.service.resolve("a")
    with pytest.raises(NotFound) as caught:
        await world.service.acquire(resolved)
    assert caught.value.code == "model_not_found"
    with pytest.raises(NotFound):
        await world.service.delete_adapter("a")


async def test_delete_waits_for_running_requests_and_new_ones_get_404(world: World) -> None:
    await world.upload("a", alias="prod")
    async with world.running("a") as task:
        done = await world.service.delete_adapter("a", timeout_s=0.05)
        assert (done.done, done.to_json()["state"]) == (False, "deleting")
        with pytest.raises(NotFound):
            world.service.resolve("a@prod")
        assert not task.done()
    assert task.result() == [5, 6, 7, 2]
    while world.engine.loaded or world.blobs():
        await asyncio.sleep(0.005)


@pytest.mark.parametrize("timeout_s", [0, 0.05])
async def test_a_version_that_drains_shows_as_deleting_until_it_is_gone(
    world: World, timeout_s: float
) -> None:
    await world.upload("a", 0)
    await world.upload("a", 1)
    async with world.running("a:2"):
        assert not (await world.service.delete_version("a", 2, timeout_s=timeout_s)).done
        assert (await world.service.get_version("a", 2)).state == "deleting"
        again = asyncio.create_task(world.service.delete_version("a", 2))
        await asyncio.sleep(0.02)
        world.engine.resume.set()
        assert (await again).to_json()["object"] == "adapter.version.deleted"
    with pytest.raises(NotFound):
        await world.service.get_version("a", 2)
    assert world.service.resolve("a").version == 1


async def test_a_version_under_an_alias_stays(world: World) -> None:
    await world.upload("a")
    with pytest.raises(Conflict) as caught:
        await world.service.delete_version("a", 1)
    assert caught.value.code == "alias_in_use"
    assert world.service.resolve("a").version == 1


async def test_bytes_that_another_name_serves_stay_loaded(world: World) -> None:
    await world.upload("a")
    await world.upload("b")
    await world.service.acquire(world.service.resolve("a"))
    done = await world.service.delete_adapter("a")
    assert done.freed.to_json() == {"device": 0, "host": 0, "merged": 0, "disk": 0, "remote": 0}
    await world.service.acquire(world.service.resolve("b"))
    assert (world.engine.num_loads, world.engine.num_unloads) == (1, 0)


async def test_unload_gives_memory_back_and_the_next_request_loads_again(world: World) -> None:
    await world.upload("a")
    loaded = await world.service.load("a")
    assert (loaded.version.tier, loaded.to_json()["action"]) == ("device", "load")
    assert (await world.service.load("a")).version.tier == "device"
    unloaded = await world.service.unload("a")
    assert unloaded.version.tier == "disk"
    assert unloaded.freed.host == loaded.version.host_bytes > 0
    assert (await world.service.unload("a")).freed.host == 0
    await world.service.acquire(world.service.resolve("a"))
    assert world.engine.num_loads == 2


async def test_no_time_to_wait_is_enough_where_nobody_is_waited_for(world: World) -> None:
    await world.upload("a")
    await world.service.load("a")
    assert (await world.service.unload("a", timeout_s=0)).freed.host > 0
    await world.service.load("a")
    assert (await world.service.delete_adapter("a", timeout_s=0)).done


async def test_a_request_during_an_unload_waits_and_is_served(world: World) -> None:
    await world.upload("a")
    async with world.running("a"):
        with pytest.raises(Unavailable) as caught:
            await world.service.unload("a", timeout_s=0.02)
        assert caught.value.code == "draining"
        world.engine.pause_after = None
    resolved = world.service.resolve("a")
    await world.service.acquire(resolved)
    assert world.engine.is_loaded(resolved.digest)


async def test_merge_and_unmerge_are_idempotent(world: World) -> None:
    await world.upload("a")
    for _ in range(2):
        merged = await world.service.merge("a")
        assert (merged.version.merged, merged.merged_bytes) == (True, 64 * 64 * 4)
    unmerged = await world.service.unmerge("a")
    assert (unmerged.version.merged, unmerged.freed.merged) == (False, 64 * 64 * 4)
    assert (await world.service.unmerge("a")).freed.merged == 0
    shown = merged.to_json()
    assert shown.keys() >= {"tier", "bytes", "seconds", "replica", "digest", "merged"}


async def test_a_merge_beyond_the_ceiling_is_a_conflict(world: World) -> None:
    await world.upload("a")
    world.engine.merge_ceiling_bytes = 1
    with pytest.raises(Conflict) as caught:
        await world.service.merge("a")
    assert caught.value.code == "merge_budget"


async def test_a_static_folder_wins_and_is_read_only(world: World, tmp_path: Path) -> None:
    await world.upload("a", 7)
    folder = folder_of(tmp_path / "folder")
    view = await world.service.add_static("a", folder)
    assert await world.service.add_static("a", folder) == view
    resolved = world.service.resolve("a")
    assert resolved.digest == view.digest
    await world.service.acquire(resolved)
    assert (await world.service.get("a")).is_static
    assert (await world.service.get_version("a")).to_json()["report"]["ok"]
    async with world.service.open_file("a", 1, "adapter_config.json") as held:
        assert held.path.read_bytes() == (folder / "adapter_config.json").read_bytes()
    for change in (
        world.service.upload(await world.form("a", 8)),
        world.service.set_alias("a", "x", 1),
        world.service.delete_alias("a", "default"),
        world.service.delete_version("a", 1),
        world.service.delete_adapter("a"),
    ):
        with pytest.raises(Conflict):
            await change
    again = await world.restart()
    assert again.service.resolve("a").digest != view.digest
    await again.service.stop()


async def test_a_static_folder_that_changed_is_not_served(world: World, tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "folder")
    await world.service.add_static("a", folder)
    folder_of(folder, {name: array * 2 for name, array in q_pairs(SPEC).items()})
    with pytest.raises(Conflict, match="changed"):
        await world.service.acquire(world.service.resolve("a"))
    (folder / "adapter_config.json").unlink()
    with pytest.raises(Conflict):
        await world.service.acquire(world.service.resolve("a"))
    with pytest.raises(Conflict):
        await world.service.add_static(
            "a",
            folder_of(
                tmp_path / "other", {name: array * 3 for name, array in q_pairs(SPEC).items()}
            ),
        )


async def test_static_folders_are_checked(world: World, tmp_path: Path) -> None:
    with pytest.raises(QuickchangeError, match="adapter_config.json"):
        await world.service.add_static("a", tmp_path)
    with pytest.raises(UploadRefused):
        await world.service.add_static("No", folder_of(tmp_path / "good"))
    with pytest.raises(Conflict):
        await world.service.add_static("tiny", folder_of(tmp_path / "good"))
    bad = q_pairs(SPEC, rank=5)
    with pytest.raises(UploadRefused) as caught:
        await world.service.add_static("a", folder_of(tmp_path / "bad", bad))
    assert caught.value.code == "shape_mismatch"


async def test_lists_come_in_pages(world: World) -> None:
    for name in ("c", "a", "b"):
        await world.upload(name)
    page = (await world.service.list(limit=2)).to_json()
    assert [adapter["name"] for adapter in page["data"]] == ["a", "b"]
    assert (page["has_more"], page["first_id"], page["last_id"]) == (True, "a", "b")
    rest = (await world.service.list(after="b", limit=2)).to_json()
    assert [adapter["name"] for adapter in rest["data"]] == ["c"]
    assert not rest["has_more"]
    shown = (await world.service.get("a")).to_json()
    assert shown.keys() == ADAPTER_KEYS
    assert shown["versions"][0]["report"]["ok"]


async def test_models_are_the_base_bare_names_and_aliases(world: World) -> None:
    await world.upload("a", 0, alias="prod")
    await world.upload("a", 1)
    shown = [model.to_json() for model in world.service.models()]
    assert [model["id"] for model in shown] == ["tiny", "a", "a@default", "a@prod"]
    assert [model["parent"] for model in shown] == [None, "tiny", "tiny", "tiny"]
    assert {model["max_model_len"] for model in shown} == {512}
    assert world.service.model("a:2").root == "a:2"
    assert world.service.model("tiny").parent is None
    with pytest.raises(NotFound):
        world.service.model("nobody")


async def test_tenants_see_their_own_and_what_is_public(world: World) -> None:
    await world.upload("own", tenant="x", visibility="private")
    await world.upload("open", tenant="x", visibility="public")
    await world.upload("both", 0, tenant="x", visibility="public")
    await world.upload("both", 1, tenant="y", visibility="private")
    with pytest.raises(NotFound):
        world.service.resolve("own", tenant="y")
    with pytest.raises(NotFound):
        await world.service.get("own", tenant="y")
    assert world.service.resolve("open", tenant="y").tenant == "x"
    assert world.service.resolve("both", tenant="y").tenant == "y"
    assert world.service.resolve("both", tenant="z").tenant == "x"
    names = [adapter.name for adapter in (await world.service.list(tenant="y")).data]
    assert names == ["both", "open"]
    with pytest.raises(Forbidden):
        await world.service.delete_adapter("open", tenant="y")
    await world.service.acquire(world.service.resolve("open", tenant="y"))


async def test_the_log_of_a_name_outlives_it(world: World) -> None:
    await world.upload("a")
    await world.service.delete_adapter("a")
    log = await world.service.events("a")
    assert [event["action"] for event in log] == [
        "publish",
        "delete_version",
        "delete_adapter",
        "purge",
    ]
    assert [event["id"] for event in log] == ["1", "2", "3", "4"]
    world.catalog.event_log.prune(EventRule(max_age_s=None, max_per_name=3, min_kept=1))
    assert await world.service.events("a") == log[1:]
    assert await world.service.events("a", after=2, limit=1) == log[2:3]
    with pytest.raises(NotFound):
        await world.service.events("nobody")


async def test_a_restart_serves_what_was_there(world: World) -> None:
    await world.upload("a", 0)
    await world.upload("a", 1, alias="default")
    digest = world.service.resolve("a").digest
    again = await world.restart()
    assert again.service.resolve("a").digest == digest
    await again.service.acquire(again.service.resolve("a:1"))
    assert (await again.service.get("a")).aliases == {"default": 2}
    await again.service.stop()


async def test_a_deletion_that_a_crash_cut_short_ends_at_the_next_start(world: World) -> None:
    await world.upload("a")
    await world.upload("b", 1)
    world.catalog.begin_delete_adapter("a")
    again = await world.restart()
    assert [adapter.name for adapter in (await again.service.list()).data] == ["b"]
    assert len(again.blobs()) == 2
    await again.service.stop()


async def test_lost_bytes_are_unavailable_not_the_bases_answer(world: World) -> None:
    await world.upload("a")
    for sha256 in world.blobs():
        world.store.delete(sha256)
    with pytest.raises(Unavailable) as caught:
        await world.service.acquire(world.service.resolve("a"))
    assert caught.value.code == "store_unavailable"


async def test_a_version_that_does_not_fit_another_base_is_a_conflict(world: World) -> None:
    await world.upload("a")
    await world.service.stop()
    other = World(world.root, SlowEngine(base=small_spec(num_layers=1)))
    await other.engine.start()
    await other.service.start()
    with pytest.raises(Conflict) as caught:
        await other.service.acquire(other.service.resolve("a"))
    assert caught.value.code == "base_mismatch"
    await other.service.stop()


async def test_a_quarantined_version_is_shown_and_refused(world: World) -> None:
    await world.upload("a")
    resolved = world.service.resolve("a")
    world.engine.damaged = frozenset({resolved.digest})
    assert (await world.service.get_version("a")).state == "quarantined"
    with pytest.raises(Conflict) as caught:
        await world.service.acquire(resolved)
    assert caught.value.code == "adapter_quarantined"


async def test_uploads_at_once_all_get_their_own_number(world: World) -> None:
    forms = [await world.form("a", seed) for seed in range(12)]
    results = await asyncio.gather(*(world.service.upload(form) for form in forms))
    assert sorted(result.version.version for result in results) == list(range(1, 13))
    assert len((await world.service.get("a")).versions) == 12


async def test_uploads_and_deletes_at_once_leave_memory_and_disk_agreeing(world: World) -> None:
    async def churn(name: str) -> None:
        for seed in range(4):
            await world.upload(name, seed)
            await world.service.acquire(world.service.resolve(name))
            await world.service.delete_adapter(name)

    # All names carry the same bytes, so that their blobs and digests are shared.
    await asyncio.gather(*(churn(name) for name in "abcd"))
    assert world.blobs() == set()
    assert world.engine.loaded == {}
    assert (await world.service.list()).data == ()
