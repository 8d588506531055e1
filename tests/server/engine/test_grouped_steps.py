"""Steps of their own for a merged adapter's rows: the same answers, and nobody waits."""

import itertools
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from quickchange_adapters.weights import AdapterWeights
from quickchange_server.engine.client import EngineClient
from quickchange_server.engine.request import TokenOutput
from quickchange_server.engine.step_costs import StepCosts
from quickchange_server.engine.step_groups import StepGroups

from tests.conftest import MakeAdapter
from tests.server.engine.conftest import Recorder, collect, make_engine, peft_weights, run_all
from tests.server.engine.test_engine import greedy
from tests.server.engine.test_step_groups import costs_of


class FixedCosts(StepCosts):
    """A machine that is known and stays as it is."""

    def __init__(self, known: StepCosts) -> None:
        super().__init__()
        self.__dict__.update(known.__dict__)

    def observe(self, load: Any, seconds: float) -> None:
        """Learn nothing."""


CHEAP_STEPS = costs_of(fixed=0.1e-3, token=0.5e-3, adapted=0.4e-3)


@pytest.fixture
def weights(make_adapter: MakeAdapter) -> list[AdapterWeights]:
    return [peft_weights(make_adapter(seed=i, r=4 + i), name) for i, name in enumerate("abc")]


@asynccontextmanager
async def serving(
    base: Path, weights: list[AdapterWeights], *merged: str, **settings: Any
) -> AsyncIterator[EngineClient]:
    engine = make_engine(base, merged_bytes=8 << 20, **settings)
    if settings.get("group_merged", True):
        copies = engine._engine.residency.merged
        engine._engine.groups = StepGroups(copies, FixedCosts(CHEAP_STEPS), is_on=True)
    await engine.start()
    try:
        for each in weights:
            await engine.load_adapter(each)
        for digest in merged:
            await engine.merge(digest)
        yield engine
    finally:
        await engine.stop()


def asks(num_tokens: int = 12) -> list[Any]:
    names = [None, "a", "b", "c", "a", None, "b"]
    return [greedy(f"r{i}", name, num_tokens) for i, name in enumerate(names)]


async def test_rows_in_steps_of_their_own_get_the_same_answers(
    tiny_base: Path, weights: list[AdapterWeights]
) -> None:
    plain, grouped = Recorder(), Recorder()
    async with serving(tiny_base, weights, "a", "b", observer=plain, group_merged=False) as engine:
        expected = await run_all(engine, asks())
    async with serving(tiny_base, weights, "a", "b", observer=grouped) as engine:
        answers = await run_all(engine, asks())
        assert engine.snapshot().kv_blocks_used == 0
        assert await engine.base_checksum() == engine.base.digest
    assert [each.token_ids for each in answers] == [each.token_ids for each in expected]
    num_merged = [sum(s.weights == "merged" for s in r.steps) for r in (plain, grouped)]
    assert num_merged[0] < 3 < 20 < num_merged[1]
    assert max(step.num_adapters for step in grouped.steps if step.weights == "merged") == 1


async def test_nobody_waits_for_another_turn(
    tiny_base: Path, weights: list[AdapterWeights]
) -> None:
    """Between two tokens of one row no other gets more than two, however hot its adapter is."""
    order: list[str] = []
    async with serving(tiny_base, weights, "a") as engine:
        publish = engine._engine._publish

        def note(outputs: list[TokenOutput]) -> None:
            order.extend(output.request_id for output in outputs)
            publish(outputs)

        engine._engine._publish = note
        hot = [greedy(f"hot{i}", "a", 60) for i in range(6)]
        await run_all(engine, [*hot, greedy("cold", "c", 60), greedy("base", None, 60)])
    assert len(order) == 8 * 60
    for name in ("cold", "base"):
        places = [i for i, each in enumerate(order) if each == name]
        for start, end in itertools.pairwise(places):
            assert max(Counter(order[start + 1 : end]).values(), default=0) <= 2


async def test_preemption_and_small_steps_hold_with_groups(
    tiny_base: Path, weights: list[AdapterWeights]
) -> None:
    async with serving(tiny_base, weights, group_merged=False) as engine:
        expected = await run_all(engine, asks(30))
    recorder = Recorder()
    small: dict[str, Any] = {"kv_cache_bytes": 512 * 16 * 16, "max_step_tokens": 24}
    async with serving(tiny_base, weights, "a", "b", observer=recorder, **small) as engine:
        answers = await run_all(engine, asks(30))
        assert engine.snapshot().kv_blocks_used == 0
    assert [each.token_ids for each in answers] == [each.token_ids for each in expected]
    assert sum(step.num_preempted for step in recorder.steps) > 0
    assert "merged" in {step.weights for step in recorder.steps}


async def test_what_a_copy_would_bring_is_counted_when_it_is_asked_for(
    tiny_base: Path, weights: list[AdapterWeights]
) -> None:
    engine = make_engine(tiny_base, auto_merge=True)
    await engine.start()
    try:
        await engine.load_adapter(weights[0])
        await collect(engine.generate(greedy("one", "a", 10)))
        await collect(engine.generate(greedy("two", None, 10)))
    finally:
        await engine.stop()
    demand = engine.take_demand()
    assert demand.num_tokens == 2 * (40 + 9)
    assert demand.copies["a"].num_tokens == 40 + 9
    assert 0 < demand.copies["a"].saved_s < demand.seconds
    assert engine.take_demand().num_tokens == 0


async def test_nothing_is_counted_or_learned_where_nobody_asks(
    tiny_base: Path, weights: list[AdapterWeights]
) -> None:
    engine = make_engine(tiny_base)
    await engine.start()
    try:
        await engine.load_adapter(weights[0])
        await collect(engine.generate(greedy("one", "a", 10)))
    finally:
        await engine.stop()
    assert engine.take_demand().num_tokens == 0
    assert set(engine._engine.groups.costs.coefficients.values()) == {0.0}
