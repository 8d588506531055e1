"""The check of a store and its catalog: each damage is found and told, and nothing is lost."""

import os
import shutil
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from quickchange_adapters.catalog import Catalog, sqlite_url
from quickchange_adapters.errors import BlobMissing
from quickchange_adapters.findings import CheckReport
from quickchange_adapters.records import CONFIG_FILE, WEIGHTS_FILE
from quickchange_adapters.store_check import StoreCheck

from tests.adapters.crash_model import Operation, contents, file_records
from tests.adapters.crash_run import World

WEIGHTS = {number: file_records(number)[1].sha256 for number in range(4)}
SHARED_CONFIG = file_records(0)[0].sha256


@pytest.fixture
def world(tmp_path: Path) -> World:
    """Return a store with a:1, a:2 and b:1; the first and the last have the same bytes."""
    world = World(tmp_path / "store")
    for name, content in (("a", 0), ("a", 1), ("b", 0)):
        world.do(Operation("upload", name, content))
    return world


def later() -> float:
    return time.time() + 3 * 3600


def check(world: World, *, repair: bool = False, clock: Callable[[], float] = later) -> CheckReport:
    return StoreCheck(world.store, world.catalog, clock, settle_s=0).run(repair=repair)


def found(report: CheckReport) -> list[tuple[str, str, bool]]:
    return [(each.code, each.where, each.is_repaired) for each in report.findings]


def execute(world: World, *statements: str) -> None:
    with sqlite3.connect(world.root / "catalog.db") as database:
        for statement in statements:
            database.execute(statement)
    database.close()


def age(path: Path) -> Path:
    os.utime(path, (time.time() - 4000,) * 2)
    return path


def test_a_sound_store_is_said_to_be_sound(world: World) -> None:
    num_read: list[int] = []
    checked = StoreCheck(world.store, world.catalog)
    report = checked.run(on_progress=num_read.append)
    assert (report.is_ok, report.findings) == (True, ())
    # Four files of three versions: one config and one weights file are shared.
    assert (report.num_versions, report.num_blobs) == (3, 4)
    assert sum(num_read) == report.num_bytes == checked.num_bytes() > 2000


def test_a_missing_blob_names_the_versions_that_need_it(world: World) -> None:
    world.store.delete(WEIGHTS[0])
    for repair in (False, True):
        report = check(world, repair=repair)
        assert found(report) == [("blob_missing", WEIGHTS[0], False)]
        assert report.findings[0].used_by == ("a:1", "b:1")
        assert "upload the same files again" in report.findings[0].hint
    world.do(Operation("upload", "b", 0))
    assert check(world).is_ok


@pytest.mark.parametrize("damage", [b"", b"short", b"x" * 1000])
def test_a_damaged_blob_is_put_aside_and_healed_by_the_same_upload(
    world: World, damage: bytes
) -> None:
    world.store.path(WEIGHTS[0]).write_bytes(damage)
    assert found(check(world)) == [("blob_damaged", WEIGHTS[0], False)]
    assert world.store.path(WEIGHTS[0]).read_bytes() == damage
    report = check(world, repair=True)
    assert found(report) == [("blob_damaged", WEIGHTS[0], False)]
    assert f"damaged/{WEIGHTS[0]}" in report.findings[0].hint
    assert (world.root / "damaged" / WEIGHTS[0]).read_bytes() == damage
    with pytest.raises(BlobMissing):
        world.store.path(WEIGHTS[0])
    assert found(check(world)) == [("blob_missing", WEIGHTS[0], False)]
    world.do(Operation("upload", "a", 0))
    assert world.store.path(WEIGHTS[0]).read_bytes() == contents(0)[WEIGHTS_FILE]
    assert check(world).is_ok
    adapter = world.catalog.get("a")
    assert adapter is not None
    assert [version.number for version in adapter.versions] == [1, 2]


def test_the_same_upload_heals_without_a_repair_too(world: World) -> None:
    world.store.path(WEIGHTS[0]).write_bytes(b"rotten")
    world.do(Operation("upload", "a", 0))
    assert check(world).is_ok


def test_a_blob_that_is_being_uploaded_again_is_left_in_its_place(world: World) -> None:
    world.store.path(WEIGHTS[0]).write_bytes(b"rotten")
    world.catalog.reserve("under way", file_records(0))
    report = check(world, repair=True, clock=time.time)
    assert found(report) == [("blob_damaged", WEIGHTS[0], False)]
    assert world.store.path(WEIGHTS[0]).read_bytes() == b"rotten"


def test_a_blob_that_was_healed_while_it_was_read_is_no_problem(world: World) -> None:
    def heal(num_read: int) -> None:
        if num_read == len(b"rotten"):
            world.do(Operation("upload", "a", 0))

    world.store.path(WEIGHTS[0]).write_bytes(b"rotten")
    assert StoreCheck(world.store, world.catalog).run(repair=True, on_progress=heal).is_ok
    assert world.store.path(WEIGHTS[0]).read_bytes() == contents(0)[WEIGHTS_FILE]


def test_wrong_counts_are_set_right_and_cost_no_bytes(world: World) -> None:
    execute(world, "UPDATE blobs SET num_refs = 0")
    world.catalog.collect(world.store.delete)
    report = check(world)
    assert {each.code for each in report.findings} == {"count_wrong"}
    assert len(report.findings) == 4
    assert check(world, repair=True).is_ok
    assert found(check(world)) == []


def test_a_size_that_is_not_the_blobs_is_set_right(world: World) -> None:
    execute(world, f"UPDATE blobs SET num_bytes = 1 WHERE sha256 = '{WEIGHTS[1]}'")
    assert found(check(world)) == [("size_wrong", WEIGHTS[1], False)]
    assert found(check(world, repair=True)) == [("size_wrong", WEIGHTS[1], True)]
    assert found(check(world)) == []


def test_rows_that_contradict_each_other_are_told(world: World) -> None:
    execute(
        world,
        "UPDATE versions SET digest = 'feed' WHERE id = 1",
        f"DELETE FROM version_files WHERE version_id = 2 AND file = '{CONFIG_FILE}'",
        "UPDATE versions SET state = 'deleting' WHERE id = 3",
    )
    report = check(world, repair=True)
    assert {("digest_wrong", "a:1"), ("file_unknown", "a:2"), ("alias_broken", "b@default")} <= {
        (each.code, each.where) for each in report.findings
    }
    assert not report.is_ok


def test_a_row_that_refers_to_nothing_is_told(world: World) -> None:
    execute(world, f"DELETE FROM blobs WHERE sha256 = '{WEIGHTS[1]}'")
    (finding,) = check(world, repair=True).findings
    assert finding.code == "catalog_damaged"
    assert "a row of version_files refers to a row of blobs" in finding.message


def test_what_uploads_and_deletions_left_is_removed(world: World) -> None:
    world.catalog.reserve("killed", file_records(2))
    world.catalog.begin_delete_version("a", 2)
    world.catalog.purge(world.catalog.list_deleting()[0])
    # The config of 2 is that of 0, and that of 1 is nobody's now.
    gone = {("blob_unused", record.sha256) for record in file_records(1)}
    gone.add(("blob_unused", WEIGHTS[2]))
    assert {(each.code, each.where) for each in check(world).findings} == gone
    assert WEIGHTS[1] in {blob.sha256 for blob in world.store.list()}
    assert check(world, repair=True, clock=time.time).is_ok
    # The clock of the catalog is what lets a reservation lapse.
    assert found(check(world, clock=time.time)) == []
    assert {blob.sha256 for blob in world.store.list()} == {WEIGHTS[0], SHARED_CONFIG}


def test_staged_files_are_removed_when_they_are_old_and_nobodys(world: World) -> None:
    old = age_of_nobody(world)
    young = world.root / "incoming" / "young"
    young.write_bytes(b"under way")
    with world.store.stage(100) as writer:
        writer.write(b"slow")
        held = writer.finish()
        age(held.path)
        assert found(check(world)) == [("incoming_left", f"incoming/{old.name}", False)]
        assert found(check(world, repair=True)) == [("incoming_left", f"incoming/{old.name}", True)]
    assert set((world.root / "incoming").iterdir()) == {young, held.path}


def age_of_nobody(world: World) -> Path:
    path = world.root / "incoming" / "old"
    path.write_bytes(b"left")
    return age(path)


def put_unknown(world: World, number: int) -> str:
    """Put a blob that no catalog knows, and return its sha256."""
    with world.store.stage(1 << 20) as writer:
        writer.write(b"unknown %d" % number)
        staged = writer.finish()
    world.store.put(staged)
    return staged.sha256


def test_an_unknown_blob_is_removed_when_it_is_old(world: World) -> None:
    sha256 = put_unknown(world, 0)
    assert found(check(world, clock=time.time)) == []
    age(world.store.path(sha256))
    assert found(check(world)) == [("blob_unknown", sha256, False)]
    assert found(check(world, repair=True)) == [("blob_unknown", sha256, True)]
    assert sha256 not in {blob.sha256 for blob in world.store.list()}
    assert check(world).is_ok


def test_a_wrong_catalog_never_costs_the_bytes_of_the_right_one(
    world: World, tmp_path: Path
) -> None:
    for blob in world.store.list():
        age(world.store.path(blob.sha256))
    wrong = Catalog(sqlite_url(tmp_path / "wrong.db"))
    before = {blob.sha256 for blob in world.store.list()}
    report = StoreCheck(world.store, wrong, later).run(repair=True)
    assert {each.code for each in report.findings} == {"blob_unknown"}
    assert all("is it the right" in each.hint for each in report.findings)
    assert {blob.sha256 for blob in world.store.list()} == before
    assert check(world).is_ok


def test_a_copy_of_catalog_and_blobs_is_a_backup(world: World, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    with (
        sqlite3.connect(world.root / "catalog.db") as source,
        sqlite3.connect(copy / "catalog.db") as target,
    ):
        source.backup(target)
    world.do(Operation("upload", "a", 3))  # between the two copies
    shutil.copytree(world.root / "blobs", copy / "blobs")
    restored = World(copy)
    report = check(restored, repair=True)
    assert {each.code for each in report.findings} <= {"blob_unknown"}
    assert report.is_ok
    assert report.num_versions == 3
