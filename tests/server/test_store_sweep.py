"""What crashes and failing disks left goes by itself while the server runs."""

import asyncio
import errno
import os
import sqlite3
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import torch
from quickchange_adapters import fault_points
from quickchange_adapters.catalog import RESERVATION_S, Catalog, sqlite_url
from quickchange_adapters.event_log import EventRule
from quickchange_adapters.limits import AdapterLimits
from quickchange_adapters.store import LocalStore
from quickchange_server.adapter_directory import AdapterDirectory
from quickchange_server.adapter_loader import AdapterLoader
from quickchange_server.adapter_remover import AdapterRemover
from quickchange_server.errors import StorageFull, Unavailable
from quickchange_server.live_catalog import LiveCatalog
from quickchange_server.store_sweep import StoreSweep
from quickchange_server.version_files import VersionFiles

from tests.adapters.adapter_files import small_spec
from tests.adapters.crash_model import Operation, file_records
from tests.adapters.crash_run import World
from tests.server.failing_disk import FailingDisk, Faults
from tests.server.scripted_engine import ScriptedEngine

PATIENCE_S = 20.0


class Clock:
    """Time that moves when it is told to."""

    ahead_s = 0.0

    def __call__(self) -> float:
        return time.time() + self.ahead_s


class Parts:
    """A remover and a sweep over a disk that fails on demand, with `ada:1` uploaded."""

    def __init__(self, root: Path, interval_s: float) -> None:
        spec, self.faults, self.clock = small_spec(), Faults(), Clock()
        self.root = root
        self.store = LocalStore(root, FailingDisk(self.faults))
        self.catalog = Catalog(sqlite_url(root / "catalog.db"), self.clock)
        directory = AdapterDirectory()
        live = LiveCatalog(self.catalog, directory)
        files = VersionFiles(self.store, spec, AdapterLimits(), torch.float32)
        loader = AdapterLoader(
            ScriptedEngine(base=spec),
            files,
            directory.is_served,
            live.read_again,
        )
        self.remover = AdapterRemover(self.store, live, directory, loader)
        self.sweep = StoreSweep(self.store, live, self.remover, interval_s=interval_s)

    def left(self) -> int:
        """Return how many files there are beyond the catalog."""
        blobs = len(list(self.store.list()))
        return blobs + len(list((self.root / "incoming").iterdir()))

    async def until_nothing_is_left(self) -> None:
        deadline_s = time.monotonic() + PATIENCE_S
        while self.left():
            assert time.monotonic() < deadline_s
            await asyncio.sleep(0.02)


@pytest.fixture
async def parts(tmp_path: Path) -> AsyncIterator[Parts]:
    World(tmp_path).do(Operation("upload", "ada", 0))
    parts = Parts(tmp_path, interval_s=0.02)
    yield parts
    await parts.sweep.stop()


@pytest.mark.parametrize(
    ("fail_at", "number", "kind"),
    [(1, errno.ENOSPC, StorageFull), (2, errno.EIO, Unavailable), (3, errno.EROFS, Unavailable)],
)
async def test_a_deletion_that_the_disk_cut_short_is_ended(
    parts: Parts, fail_at: int, number: int, kind: type[Exception]
) -> None:
    gone = parts.catalog.begin_delete_adapter("ada")
    fault_points.observe(parts.faults.on_point)
    parts.faults.arm(fail_at, number, is_lasting=True)
    try:
        with pytest.raises(kind):
            await parts.remover.remove(gone, timeout_s=PATIENCE_S)
        with pytest.raises(kind):
            await parts.sweep.sweep()
        assert parts.left() > 0
    finally:
        fault_points.observe(None)
    parts.faults.heal()
    await parts.sweep.sweep()
    assert parts.catalog.list_deleting() == []
    assert parts.left() == 0


async def test_a_deletion_whose_server_was_killed_is_ended_by_another_one_s_second_sweep(
    parts: Parts,
) -> None:
    parts.catalog.begin_delete_adapter("ada")
    await parts.sweep.sweep()
    assert len(parts.catalog.list_deleting()) == 1  # its server may be about to end it
    await parts.sweep.sweep()
    assert parts.catalog.list_deleting() == []
    assert parts.left() == 0


async def test_it_happens_by_itself_and_survives_a_disk_that_fails(parts: Parts) -> None:
    await parts.sweep.start()
    parts.faults.arm(1, errno.EIO, is_lasting=True)
    gone = parts.catalog.begin_delete_adapter("ada")
    for version in gone:
        parts.catalog.purge(version)
    parts.catalog.reserve("killed", file_records(3))
    incoming = parts.root / "incoming" / "left"
    incoming.write_bytes(b"half")
    os.utime(incoming, (time.time() - 3700,) * 2)
    await asyncio.sleep(0.1)
    assert parts.left() == 3
    parts.faults.heal()
    await parts.until_nothing_is_left()
    parts.clock.ahead_s = RESERVATION_S + 1
    deadline_s = time.monotonic() + PATIENCE_S
    while _num_reserved(parts.root):
        assert time.monotonic() < deadline_s
        await asyncio.sleep(0.02)


def _num_reserved(root: Path) -> int:
    with sqlite3.connect(root / "catalog.db") as database:
        count: int = database.execute("SELECT count(*) FROM reservations").fetchone()[0]
    database.close()
    return count


async def test_a_part_that_fails_keeps_no_other(tmp_path: Path) -> None:
    World(tmp_path).do(Operation("upload", "ada", 0))
    parts = Parts(tmp_path, interval_s=600)
    await parts.sweep.sweep()
    left = parts.root / "incoming" / "left"
    left.write_bytes(b"half an upload")
    os.utime(left, (1, 1))
    version = parts.catalog.resolve("ada")
    assert version is not None
    for place in range(4):
        parts.catalog.set_alias(f"a{place}", version)
    parts.sweep._event_rule = EventRule(None, 2, 1)

    async def fail() -> None:
        raise Unavailable("this deletion never ends")

    parts.remover.retry = fail  # type: ignore[method-assign]
    with pytest.raises(Unavailable, match="never ends"):
        await parts.sweep.sweep()
    assert not left.exists()
    assert len(parts.catalog.list_events("ada")) == 2
