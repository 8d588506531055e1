"""When a merged adapter's rows run by themselves: by what steps cost, and at nobody's expense."""

import itertools
import random

import pytest
from quickchange_adapters.merge import MergedCopy
from quickchange_server.engine.copy_demand import ASSUMED_SAVING, CopyDemand
from quickchange_server.engine.request import AdapterRef, GenerationRequest
from quickchange_server.engine.scheduler import ScheduledRow
from quickchange_server.engine.sequence import Sequence
from quickchange_server.engine.step_costs import StepCosts, StepLoad
from quickchange_server.engine.step_groups import StepGroups, load_of

from tests.server.engine.scheduler_run import calls_of

IDS = itertools.count()
COPIES = {"hot": MergedCopy("hot"), "warm": MergedCopy("warm")}


def row_of(*adapters: str, num_tokens: int = 1, weight: float = 1.0) -> ScheduledRow:
    refs = tuple(AdapterRef(digest, weight) for digest in adapters)
    request = GenerationRequest(f"r{next(IDS)}", tuple(range(num_tokens)), refs)
    return ScheduledRow(Sequence.from_request(request, 0, frozenset()), 0, num_tokens)


def costs_of(fixed: float, token: float, adapted: float) -> StepCosts:
    """A machine on which every kind of token costs alike."""
    rng, costs = random.Random(1), StepCosts()
    for _ in range(400):
        decode, prompt, share = rng.randint(1, 16), rng.choice([0, 64, 200]), rng.random() < 0.5
        load = StepLoad(decode, prompt, decode * share, prompt * share)
        num_adapted = load.num_adapted_decode + load.num_adapted_prompt
        costs.observe(load, fixed + token * (decode + prompt) + adapted * num_adapted)
    return costs


DEAR_STEPS = costs_of(fixed=8e-3, token=0.5e-3, adapted=0.1e-3)


def groups_of(costs: StepCosts, rows: list[ScheduledRow]) -> list[tuple[str | None, int]]:
    """Split, and say on which copy how many rows run in each step; nobody is left out."""
    split = StepGroups(COPIES, costs, is_on=True).split(rows)
    assert sorted(id(r) for group in split for r in group.rows) == sorted(map(id, rows))
    return [(None if g.copy is None else g.copy.digest, len(g.rows)) for g in split]


def test_rows_of_one_merged_adapter_run_on_its_copy_whatever_is_known() -> None:
    rows = [row_of("hot"), row_of("hot", num_tokens=9)]
    assert groups_of(StepCosts(), rows) == [("hot", 2)]
    assert groups_of(DEAR_STEPS, rows) == [("hot", 2)]


@pytest.mark.parametrize(
    "other", [row_of(), row_of("cold"), row_of("hot", weight=0.5), row_of("hot", "warm")]
)
def test_a_few_decode_rows_stay_with_everybody_where_reading_the_weights_costs_most(
    other: ScheduledRow,
) -> None:
    assert groups_of(DEAR_STEPS, [*(row_of("hot") for _ in range(15)), other]) == [(None, 16)]


def test_a_long_chunk_runs_on_its_copy_and_decode_rows_come_first() -> None:
    rows = [row_of("cold"), row_of(), row_of("hot", num_tokens=240)]
    assert groups_of(DEAR_STEPS, rows) == [(None, 2), ("hot", 1)]


def test_what_is_split_is_expected_to_take_less_time_together() -> None:
    rng, num_split = random.Random(5), 0
    for _ in range(300):
        names = [(), ("hot",), ("warm",), ("cold",)]
        rows = [
            row_of(*rng.choice(names), num_tokens=rng.choice([1, 1, 1, 40, 150]))
            for _ in range(rng.randint(1, 12))
        ]
        split = StepGroups(COPIES, DEAR_STEPS, is_on=True).split(rows)
        loads = [load_of(group.rows) for group in split]
        apart = sum(
            DEAR_STEPS.predict(load.without_deltas() if group.copy else load)
            for load, group in zip(loads, split, strict=True)
        )
        num_split += len(split) > 1
        assert len(split) == 1 or apart < DEAR_STEPS.predict(load_of(rows))
    assert 0 < num_split < 300


def test_where_steps_are_cheap_every_merged_adapter_has_its_own() -> None:
    cheap = costs_of(fixed=0.1e-3, token=0.5e-3, adapted=0.4e-3)
    rows = [row_of("hot"), row_of("warm"), row_of("hot"), row_of("warm"), row_of("hot"), row_of()]
    found = groups_of(cheap, rows)
    assert sorted(found, key=str) == [("hot", 3), ("warm", 2), (None, 1)]


def test_nothing_is_split_where_it_is_off_or_nothing_is_known() -> None:
    rows = [row_of(), row_of("hot", num_tokens=240)]
    assert len(StepGroups(COPIES, DEAR_STEPS, is_on=False).split(rows)) == 1
    assert groups_of(StepCosts(), rows) == [(None, 2)]


def test_demand_is_what_a_copy_would_serve_and_save() -> None:
    groups = StepGroups({}, DEAR_STEPS, is_on=True)
    demand = CopyDemand(groups)
    demand.note([row_of("hot")] * 4, 0.01)  # alone: all of it
    demand.note([row_of("hot", num_tokens=200), row_of()], 0.2)  # split: its part
    demand.note([row_of("hot"), row_of("cold")], 0.01)  # with everybody: nothing
    taken = demand.take()
    assert taken.seconds == pytest.approx(0.22)
    assert taken.num_tokens == 4 + 201 + 2
    assert taken.copies["hot"].num_tokens == 4 + 200
    alone = DEAR_STEPS.predict(StepLoad(4, 0, 4, 0)) - DEAR_STEPS.predict(StepLoad(4))
    split = groups.saving(load_of([row_of("hot", num_tokens=200)]), load_of([row_of()]))
    assert taken.copies["hot"].saved_s == pytest.approx(alone + split)
    assert taken.copies["cold"].num_tokens == 0
    assert demand.take().num_tokens == 0


def test_before_anything_is_known_a_copy_is_assumed_to_be_worth_a_try() -> None:
    demand = CopyDemand(StepGroups({}, StepCosts(), is_on=True))
    demand.note([row_of("hot")], 0.01)
    assert demand.take().copies["hot"].saved_s == pytest.approx(ASSUMED_SAVING * 0.01)


def test_counting_demand_costs_a_row_the_same_however_many_adapters_a_step_mixes() -> None:
    def num_calls(num_rows: int) -> int:
        demand = CopyDemand(StepGroups({}, DEAR_STEPS, is_on=True))
        rows = [row_of(f"a{index}") for index in range(num_rows)]
        return calls_of(lambda: demand.note(rows, 1.0))

    assert num_calls(128) < 5 * num_calls(32)
