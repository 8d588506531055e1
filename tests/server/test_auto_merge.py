"""Merging by traffic over a scripted engine: what is done, who stands above it, what is told."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from quickchange_adapters.errors import MergeBudgetExceeded
from quickchange_server.auto_merge import AutoMerge, TrafficSource
from quickchange_server.auto_merge_rule import DWELL_S, IDLE_S
from quickchange_server.engine.copy_demand import CopyUse, Demand
from quickchange_server.engine.interface import MergeResult

from tests.server.service_world import SPEC, SlowEngine, World, seen

COPY_BYTES = 64 * 64 * 4


@dataclass
class OneCopyEngine(SlowEngine):
    """Has room for so many merged copies."""

    num_copies: int = 1

    async def merge(self, digest: str) -> MergeResult:
        used = sum(self.merged.values())
        if digest not in self.merged and used + COPY_BYTES > self.num_copies * COPY_BYTES:
            raise MergeBudgetExceeded(COPY_BYTES, used, self.num_copies * COPY_BYTES)
        return await super().merge(digest)


@dataclass
class Site:
    """A server whose traffic and clock the test makes, and what was told of it."""

    world: World
    now_s: float = 0.0
    demand: Demand = field(default_factory=Demand)
    told: Counter[tuple[str, str]] = field(default_factory=Counter)
    said: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        service = self.world.service
        source = TrafficSource(self.take, self.tell, self.said.append, lambda: self.now_s)
        self.auto = AutoMerge(service._directory, service._wishes, service._desired, source)

    def take(self) -> Demand:
        taken, self.demand = self.demand, Demand()
        return taken

    def tell(self, action: str, reason: str) -> None:
        self.told[action, reason] += 1

    def digest(self, model: str) -> str:
        return self.world.service.resolve(model).digest

    async def serve(self, seconds: float, **savings: float) -> None:
        """Run a busy while; `savings`: what each adapter's copy saves of a second."""
        for _ in range(int(seconds / 5)):
            await self.run(**savings)
            await self.auto.look()

    async def run(self, **savings: float) -> None:
        """Let requests run for five seconds; auto-merge has not looked yet."""
        self.now_s += 5
        for model, saving in savings.items():
            await self.world.service.acquire(self.world.service.resolve(model))
            self.demand.copies[self.digest(model)] = CopyUse(2000, 5 * saving)
        self.demand.seconds, self.demand.num_tokens = 5, 2500

    @property
    def merged(self) -> list[str]:
        return [name for name in ("a", "b") if self.digest(name) in self.world.engine.merged]


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    world = World(tmp_path / "store", OneCopyEngine(base=SPEC))
    await world.start()
    await world.upload("a")
    await world.upload("b", seed=1)
    yield Site(world)
    await world.service.stop()


async def test_what_is_hot_is_merged_and_stays_and_is_unmerged_when_it_cools(site: Site) -> None:
    await site.serve(10, a=0.09)
    assert site.merged == ["a"]
    assert site.told == {("merge", "hot"): 1}
    assert site.said == [
        "auto-merge: a:1 is merged: 80% of the recent tokens would run on its copy, which saves "
        "9.0% of the time (worth it from 3%, here 27% of the tokens)"
    ]
    await asyncio.sleep(0.1)  # the desired state is looked at every 0.02 s here
    assert site.merged == ["a"]
    await site.serve(2 * DWELL_S, a=0.02)
    assert site.merged == ["a"]
    await site.serve(3 * DWELL_S, a=0.001)
    assert site.merged == []
    assert site.told["unmerge", "cold"] == 1
    assert "a:1 is unmerged: it has cooled" in site.said[-1]


async def test_what_was_unloaded_is_not_loaded_again_for_a_copy(site: Site) -> None:
    await site.run(a=0.09)
    await site.world.service.unload("a")
    for _ in range(3):
        await site.auto.look()
    assert site.digest("a") not in site.world.engine.loaded
    assert not site.told
    await site.serve(5, a=0.09)
    assert site.merged == ["a"]


async def test_a_copy_that_nobody_uses_any_more_goes(site: Site) -> None:
    await site.serve(10, a=0.09)
    site.now_s += IDLE_S
    await site.auto.look()
    assert site.merged == []
    assert site.told["unmerge", "idle"] == 1


async def test_without_room_it_is_left_alone_for_a_while_and_told_once(site: Site) -> None:
    site.world.engine.merge_ceiling_bytes = 1
    await site.serve(DWELL_S - 5, a=0.09)
    assert site.merged == []
    assert site.told == {("refuse", "no_room"): 1}
    assert "stays unmerged for a while" in site.said[0]
    await seen(lambda: site.world.service.num_unmet()["merge"] == 0)
    site.world.engine.merge_ceiling_bytes = 1 << 30
    await site.serve(DWELL_S, a=0.09)
    assert site.merged == ["a"]


async def test_room_goes_to_what_saves_far_more_and_to_nothing_less(site: Site) -> None:
    await site.serve(10, a=0.04)
    await site.serve(2 * DWELL_S, a=0.04, b=0.06)
    assert site.merged == ["a"]
    await site.serve(DWELL_S + 30, a=0.03, b=0.2)
    assert site.merged == ["b"]
    assert site.told["unmerge", "displaced"] == 1


async def test_an_operators_unmerge_holds_whatever_the_traffic(site: Site) -> None:
    await site.serve(10, a=0.09)
    undone = await site.world.service.unmerge("a")
    assert undone.freed.merged == COPY_BYTES
    await site.serve(3 * DWELL_S, a=0.09)
    assert site.merged == []


async def test_an_operators_merge_is_not_undone_when_it_is_cold(site: Site) -> None:
    await site.world.service.merge("a")
    await site.serve(3 * DWELL_S, a=0.0)
    assert site.merged == ["a"]
    assert not site.told


async def test_an_operator_may_take_over_a_copy_that_traffic_made(site: Site) -> None:
    await site.serve(10, a=0.09)
    await site.world.service.merge("a")
    await site.serve(3 * DWELL_S, a=0.0)
    assert site.merged == ["a"]
    await site.world.service.unmerge("a")
    assert site.merged == []


async def test_the_catalogs_word_from_another_server_wins_too(site: Site, tmp_path: Path) -> None:
    there = World(tmp_path / "store")
    await there.start()
    try:
        await site.serve(10, a=0.09)
        await there.service.merge("a")
        wishes = site.world.service._wishes
        await seen(lambda: wishes.has_word("merge", site.digest("a")))
        await there.service.unmerge("a")
        await seen(lambda: site.merged == [])
        await site.serve(3 * DWELL_S, a=0.09)
        assert site.merged == []
    finally:
        await there.service.stop()


async def test_a_version_that_is_deleted_is_forgotten(site: Site) -> None:
    await site.serve(10, a=0.09)
    digest = site.digest("a")
    await site.world.service.delete_adapter("a", timeout_s=5)
    assert digest not in site.world.engine.merged
    site.demand.copies[digest] = CopyUse(2000, 1)
    site.demand.seconds = 5
    site.now_s += DWELL_S + 5
    await site.auto.look()
    assert digest not in site.world.engine.merged


async def test_it_looks_by_itself_until_it_is_stopped(site: Site) -> None:
    await site.run(a=0.2)
    site.auto.start()
    await seen(lambda: site.merged == ["a"])
    await site.auto.stop()
