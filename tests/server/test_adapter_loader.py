"""What loads of many versions do to each other."""

import asyncio
import threading
from collections.abc import Mapping

import pytest
from quickchange_adapters.packed_size import PackedSize
from quickchange_adapters.records import VersionRecord
from quickchange_adapters.structure import Structure
from quickchange_adapters.weights import AdapterWeights
from quickchange_server.adapter_loader import MAX_UNPACKED, AdapterLoader
from quickchange_server.adapter_views import Tier
from quickchange_server.errors import QueueFull
from quickchange_server.load_observer import NoLoadObserver

from tests.server.adapter_records import version_record
from tests.server.scripted_engine import ScriptedEngine


class SlowStore:
    """Files of names that begin with `far` are elsewhere, and do not come before they may."""

    def __init__(self) -> None:
        self.may_come = threading.Event()

    def is_on_disk(self, version: VersionRecord) -> bool:
        return not version.name.startswith("far")

    def fetch(self, version: VersionRecord) -> None:
        assert self.may_come.wait(60)

    def measure(self, version: VersionRecord) -> Structure:
        return Structure()

    def read_weights(self, version: VersionRecord) -> AdapterWeights:
        return AdapterWeights(version.digest, {})


def loader_of(engine: ScriptedEngine, files: SlowStore) -> AdapterLoader:
    async def read_again(version: VersionRecord) -> None:
        raise AssertionError("nothing was lost here")

    return AdapterLoader(engine, files, lambda digest: True, read_again)


def version(name: str) -> VersionRecord:
    return version_record(name, 1, f"digest of {name}")


async def test_versions_that_a_store_is_slow_to_give_hold_up_no_other() -> None:
    engine, files = ScriptedEngine(), SlowStore()
    loader = loader_of(engine, files)
    far = [asyncio.create_task(loader.load(version(f"far{index}"))) for index in range(4)]
    async with asyncio.timeout(30):
        await loader.load(version("near"))
    assert set(engine.loaded) == {"digest of near"}
    files.may_come.set()
    await asyncio.gather(*far)
    assert len(engine.loaded) == 5
    await loader.stop()


async def test_no_more_requests_wait_for_loads_than_may_wait_at_all() -> None:
    engine, files = ScriptedEngine(max_requests=3), SlowStore()
    loader = loader_of(engine, files)
    names = ["far0", "far0", "far1"]
    waiting = [asyncio.create_task(loader.load(version(name))) for name in names]
    await asyncio.sleep(0)
    with pytest.raises(QueueFull, match="3 requests wait for adapters"):
        await loader.load(version("far2"))
    files.may_come.set()
    await asyncio.gather(*waiting)
    await loader.load(version("far2"))
    assert len(engine.loaded) == 3
    await loader.stop()


class FullEngine(ScriptedEngine):
    """Has no room until `may_come`."""

    def __init__(self) -> None:
        super().__init__()
        self.may_come = asyncio.Event()

    async def load_adapter(self, weights: AdapterWeights) -> None:
        await self.may_come.wait()
        await super().load_adapter(weights)


class CountedFiles(SlowStore):
    """Counts the versions whose tensors were read."""

    num_read = 0

    def read_weights(self, version: VersionRecord) -> AdapterWeights:
        self.num_read += 1
        return super().read_weights(version)


async def test_loads_that_wait_for_room_hold_no_tensors_but_the_next_ones() -> None:
    """Else as many copies as requests may wait lie beside the ceiling of host memory."""
    engine, files = FullEngine(), CountedFiles()
    loader = loader_of(engine, files)
    loads = [asyncio.create_task(loader.load(version(f"near{index}"))) for index in range(20)]
    async with asyncio.timeout(30):
        while files.num_read < MAX_UNPACKED:
            await asyncio.sleep(0.005)
    await asyncio.sleep(0.2)
    assert files.num_read == MAX_UNPACKED
    engine.may_come.set()
    await asyncio.gather(*loads)
    assert len(engine.loaded) == files.num_read == 20
    await loader.stop()


class BookedOut(ScriptedEngine):
    """Gives nobody room until `may_come`."""

    def __init__(self) -> None:
        super().__init__()
        self.may_come = asyncio.Event()
        self.num_asked = 0

    async def book_room(self, owner: str, sizes: Mapping[str, PackedSize]) -> None:
        self.num_asked += 1
        await self.may_come.wait()
        await super().book_room(owner, sizes)


async def leave(*tasks: "asyncio.Task[None]") -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await asyncio.sleep(0)


async def asked_for_room(engine: BookedOut, number: int) -> None:
    async with asyncio.timeout(30):
        while engine.num_asked < number:
            await asyncio.sleep(0.005)


async def test_a_load_that_nobody_waits_for_any_more_leaves_the_line_for_room() -> None:
    """Else who asks and leaves, again and again, has everybody wait behind loads for nobody."""
    engine = BookedOut()
    loader, ada = loader_of(engine, SlowStore()), version("near")
    first, second = (asyncio.create_task(loader.load(ada)) for _ in range(2))
    await asked_for_room(engine, 1)
    await leave(first)
    assert loader.loading() == [ada.digest]
    await leave(second)
    assert loader.loading() == []
    again = asyncio.create_task(loader.load(ada))
    await asked_for_room(engine, 2)
    engine.may_come.set()
    await again
    assert set(engine.loaded) == {ada.digest}
    assert not engine.booked
    await loader.stop()


async def test_who_comes_while_a_load_is_given_up_gets_one_of_its_own() -> None:
    engine = BookedOut()
    loader, ada = loader_of(engine, SlowStore()), version("near")
    first = asyncio.create_task(loader.load(ada))
    await asked_for_room(engine, 1)
    first.cancel()
    await asyncio.sleep(0)
    second = asyncio.create_task(loader.load(ada))
    engine.may_come.set()
    async with asyncio.timeout(30):
        await second
    assert set(engine.loaded) == {ada.digest}
    await loader.stop()


async def test_a_load_that_has_room_goes_on_though_nobody_waits() -> None:
    engine, files = FullEngine(), CountedFiles()
    loader, ada = loader_of(engine, files), version("near")
    asking = asyncio.create_task(loader.load(ada))
    async with asyncio.timeout(30):
        while not files.num_read:
            await asyncio.sleep(0.005)
        await leave(asking)
        engine.may_come.set()
        while not engine.loaded:
            await asyncio.sleep(0.005)
    await loader.stop()


async def test_a_mix_that_waits_for_room_is_on_its_way() -> None:
    engine = BookedOut()
    loader, mixed = loader_of(engine, SlowStore()), [version("near0"), version("near1")]
    asking = asyncio.create_task(loader.load_together("mix", mixed))
    await asked_for_room(engine, 1)
    assert sorted(loader.loading()) == [each.digest for each in mixed]
    await leave(asking)
    assert loader.loading() == []
    await loader.stop()


class FetchedFiles(SlowStore):
    """Files that are on this machine once they were fetched."""

    def __init__(self) -> None:
        super().__init__()
        self.here: set[str] = set()

    def is_on_disk(self, version: VersionRecord) -> bool:
        return version.digest in self.here or super().is_on_disk(version)

    def fetch(self, version: VersionRecord) -> None:
        super().fetch(version)
        self.here.add(version.digest)


class NotedLoads(NoLoadObserver):
    """Keeps where loaded versions came from."""

    def __init__(self) -> None:
        self.tiers: list[Tier] = []

    def on_load(self, from_tier: Tier, to_tier: Tier, seconds: float) -> None:
        self.tiers.append(from_tier)


async def test_what_a_mix_had_fetched_came_from_the_store() -> None:
    """It was fetched to learn its size, before its load."""
    files = FetchedFiles()
    loader = loader_of(ScriptedEngine(), files)
    loader.observer = noted = NotedLoads()
    files.may_come.set()
    await loader.load_together("mix", [version("far0"), version("near"), version("far1")])
    assert sorted(noted.tiers) == ["disk", "remote", "remote"]
    await loader.load(version("far2"))
    assert noted.tiers[-1] == "remote"
    assert not loader._starts
    await loader.stop()
