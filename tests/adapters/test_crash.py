"""SIGKILL at each named point, power cuts in between: what was acknowledged stays, whole."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from quickchange_adapters import fault_points
from quickchange_adapters.catalog import Catalog, sqlite_url
from quickchange_adapters.disk import Disk
from quickchange_adapters.publication import finish_deletion, publish_upload
from quickchange_adapters.records import CONFIG_FILE, FileRecord, NewVersion
from quickchange_adapters.store import LocalStore, StagedFile

from tests.adapters.crash_run import ANY_MOMENT, named_points
from tests.adapters.recording_disk import RecordingDisk

NUM_HITS = 20
TIMEOUT_S = 570
SHARED_MEMORY = Path("/dev/shm")


@pytest.fixture
def fast_folder(tmp_path: Path) -> Iterator[Path]:
    """Folder in memory if there is one: a killed process leaves the same there as on a disk."""
    if not os.access(SHARED_MEMORY, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=SHARED_MEMORY) as folder:
        yield Path(folder)


@pytest.fixture
def reached() -> Iterator[list[str]]:
    """Points that were reached, in their order."""
    points: list[str] = []
    fault_points.observe(points.append)
    yield points
    fault_points.observe(None)


def test_sigkill_at_every_point_loses_nothing_and_leaves_nothing_half(fast_folder: Path) -> None:
    words = [sys.executable, "-m", "tests.adapters.crash_run", str(fast_folder), str(NUM_HITS)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert done.returncode == 0, done.stderr
    hits = json.loads(done.stdout)
    print("\n".join(f"{count:3} kills {point}" for point, count in hits.items()))
    assert hits == dict.fromkeys([*named_points(), ANY_MOMENT], NUM_HITS)
    assert len(hits) >= 29


def points_of(*steps: str) -> list[str]:
    return [f"{when} {step}" for step in steps for when in ("before", "after")]


def upload(catalog: Catalog, store: LocalStore, data: bytes, name: str = "a") -> FileRecord:
    with store.stage(1 << 20) as writer:
        writer.write(data)
        staged = writer.finish()
    file = FileRecord(CONFIG_FILE, staged.sha256, staged.num_bytes)
    new = NewVersion(name, (file,), "tiny", "b" * 64, (4,), ("q_proj",), {}, upload_id=name)
    publish_upload(catalog, store, new, [staged])
    return file


def test_what_an_upload_and_a_deletion_reach(tmp_path: Path, reached: list[str]) -> None:
    store, catalog = LocalStore(tmp_path), Catalog(sqlite_url(tmp_path / "catalog.db"))
    upload(catalog, store, b"bytes")
    assert reached == points_of(
        "stage.sync", "reserve.commit", "put.rename", "put.sync", "publish.commit"
    )
    reached.clear()
    finish_deletion(catalog, store, catalog.begin_delete_adapter("a"))
    assert reached == points_of("begin_delete.commit", "purge.commit", "delete.remove") + points_of(
        "delete.sync", "collect.commit"
    )


def test_the_table_names_all_points_that_are_reached(tmp_path: Path, reached: list[str]) -> None:
    store, catalog = LocalStore(tmp_path), Catalog(sqlite_url(tmp_path / "catalog.db"))
    upload(catalog, store, b"bytes")
    adapter = catalog.get("a")
    assert adapter is not None
    catalog.set_alias("canary", adapter.versions[0])
    catalog.delete_alias("a", "canary")
    finish_deletion(catalog, store, catalog.begin_delete_adapter("a"))
    catalog.release("a")
    # The reply is the server's: tests/server/test_crash_server.py reaches it.
    assert set(reached) == set(named_points()) - {"before reply", "after reply"}


def test_before_each_commit_a_power_cut_would_change_nothing(tmp_path: Path) -> None:
    root = tmp_path / "new" / "store"
    disk = RecordingDisk(tmp_path / "new")
    store, catalog = LocalStore(root, disk), Catalog(sqlite_url(root / "catalog.db"))
    num_looks = 0

    def look(point: str) -> None:
        nonlocal num_looks
        blobs = {path for path in disk.names if path.parent.parent == root / "blobs"}
        if point == "before publish.commit":
            assert blobs
            assert all(disk.survives(path) for path in blobs)
        elif point == "before collect.commit":
            assert {path for path in disk.on_disk if path.parent.parent == root / "blobs"} == blobs
        else:
            return
        num_looks += 1

    fault_points.observe(look)
    try:
        for data in (b"first", b"second", b"third"):
            upload(catalog, store, data, name=data.decode())
        for name in ("second", "first"):
            finish_deletion(catalog, store, catalog.begin_delete_adapter(name))
    finally:
        fault_points.observe(None)
    assert num_looks == 5


def test_each_rename_comes_after_the_files_sync_and_before_the_folders(tmp_path: Path) -> None:
    disk = RecordingDisk(tmp_path / "store")
    store = LocalStore(tmp_path / "store", disk)
    with store.stage(1 << 20) as writer:
        writer.write(b"bytes")
        staged = writer.finish()
    store.put(staged)
    incoming = f"store/incoming/{staged.path.name}"
    folder = f"store/blobs/{staged.sha256[:2]}"
    assert disk.calls == [
        ("make_folder", "store"),
        ("sync_folder", "."),
        ("make_folder", "store/incoming"),
        ("sync_folder", "store"),
        ("make_folder", "store/blobs"),
        ("sync_folder", "store"),
        ("sync_folder", "store"),
        ("create", incoming),
        ("write", incoming),
        ("sync_file", incoming),
        ("make_folder", folder),
        ("rename", incoming, f"{folder}/{staged.sha256}"),
        ("sync_folder", folder),
        ("sync_folder", "store/blobs"),
    ]


class ForgetfulDisk(RecordingDisk):
    """Says that it synced, and did not."""

    def sync_folder(self, folder: Path) -> None:
        Disk.sync_folder(self, folder)


def test_the_check_finds_a_forgotten_sync(tmp_path: Path) -> None:
    disk = ForgetfulDisk(tmp_path / "store")
    store = LocalStore(tmp_path / "store", disk)
    with store.stage(10) as writer:
        writer.write(b"bytes")
        staged: StagedFile = writer.finish()
    store.put(staged)
    assert not disk.survives(store.path(staged.sha256))
