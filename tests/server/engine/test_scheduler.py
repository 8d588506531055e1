"""The scheduler and its blocks, driven by hand and by random traffic, without a model."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from quickchange_server.engine.kv_cache import kv_root_key
from quickchange_server.engine.request import AdapterRef
from quickchange_server.engine.scheduler import Scheduler
from quickchange_server.engine.sequence import Sequence

from tests.server.engine.scheduler_run import advance, scheduler_of, sequence_of


def test_long_prompts_are_chunked_beside_decodes() -> None:
    scheduler, _ = scheduler_of()
    short, long = sequence_of(3, max_tokens=9), sequence_of(40, first=100)
    scheduler.add(short)
    advance(scheduler)
    scheduler.add(long)
    sizes = []
    for _ in range(3):
        sizes.append([row.num_tokens for row in scheduler.schedule().rows])
        for row in scheduler.schedule().rows:
            scheduler.note_computed(row)
            if row.needs_logits:
                row.sequence.token_ids.append(1)
    assert sizes == [[1, 15], [1, 15], [1, 10]]


def test_blocks_of_equal_prefixes_are_shared_and_only_within_their_key() -> None:
    scheduler, _ = scheduler_of(num_slots=9)
    scheduler.add(sequence_of(16, ("a",), max_tokens=50))
    advance(scheduler)
    same = sequence_of(16, ("a",))
    others = [
        sequence_of(16),
        sequence_of(16, ("b",)),
        sequence_of(16, ("a", "b")),
        sequence_of(16, ("a",), scope="tenant"),
        sequence_of(16, ("a",), first=1),
    ]
    for sequence in (same, *others):
        scheduler.add(sequence)
    for _ in range(9):
        advance(scheduler)
    assert same.num_cached == 12  # the last block holds the token whose logits are wanted
    assert [sequence.num_cached for sequence in others] == [0] * 5


def test_weights_and_order_of_a_mix_are_part_of_the_key() -> None:
    a, b = AdapterRef("a", 0.5), AdapterRef("b", 0.5)
    mixes = [(a, b), (b, a), (replace(a, weight=0.25), b), (a,), ()]
    assert len({kv_root_key("base", mix, "") for mix in mixes}) == len(mixes)
    assert kv_root_key("base", (), "x") != kv_root_key("base", (), "y")
    assert kv_root_key("base", (), "") != kv_root_key("other", (), "")


def test_damaged_blocks_are_not_shared() -> None:
    scheduler, _ = scheduler_of()
    damaged = sequence_of(16)
    scheduler.add(damaged)
    step = scheduler.schedule()
    scheduler.note_computed(step.rows[0])
    freed = scheduler.remove(damaged, forget=True)
    assert len(freed) == 4
    again = sequence_of(16)
    scheduler.add(again)
    advance(scheduler)
    assert again.num_cached == 0


def test_the_youngest_gives_way_when_blocks_run_out_and_finishes_later() -> None:
    scheduler, _ = scheduler_of(num_blocks=6)
    old, young = sequence_of(8, max_tokens=12), sequence_of(8, max_tokens=8, first=50)
    for sequence in (old, young):
        scheduler.add(sequence)
    order, preempted = [], False
    for _ in range(60):
        order += advance(scheduler)
        preempted |= young in scheduler.waiting and young.num_generated > 0
    assert preempted
    assert order == [old.request_id, young.request_id]
    assert scheduler.blocks.num_used == 0


def test_one_that_waits_for_a_slot_lets_others_pass_but_not_for_ever() -> None:
    scheduler, _ = scheduler_of(num_slots=1, max_rows=3, max_step_tokens=16)
    scheduler.add(sequence_of(2, ("hot",), max_tokens=10))
    advance(scheduler)
    cold = sequence_of(2, ("cold",))
    scheduler.add(cold)
    base = sequence_of(2, max_tokens=2)
    scheduler.add(base)
    ended: list[str] = advance(scheduler)
    assert base in scheduler.running
    for _ in range(400):
        scheduler.add(sequence_of(2, ("hot",), max_tokens=3))
        ended += advance(scheduler)
    assert cold.request_id in ended


@pytest.mark.parametrize("index", range(2))
def test_cancel_frees_everything_whether_waiting_or_running(index: int) -> None:
    scheduler, slots = scheduler_of(max_rows=1)
    pair = [sequence_of(9, ("a",)), sequence_of(9, ("b",))]
    for sequence in pair:
        scheduler.add(sequence)
    advance(scheduler)
    scheduler.remove(pair[index])
    scheduler.check_integrity()
    for _ in range(20):
        advance(scheduler)
    assert scheduler.blocks.num_used == 0
    assert not any(slots.counts.values())


ARRIVALS = st.lists(
    st.tuples(
        st.integers(1, 30),  # prompt length
        st.integers(1, 12),  # max_tokens
        st.sampled_from([(), ("a",), ("b",), ("c",), ("a", "b")]),
        st.integers(0, 3),  # steps before the next arrival
        st.one_of(st.none(), st.integers(0, 25)),  # cancelled after so many steps
        st.sampled_from([0, 100]),  # shared prefix or not
        st.sampled_from(["x", "x", "y", "z"]),  # whose it is
    ),
    max_size=25,
)


@settings(max_examples=150, deadline=None)
@given(
    ARRIVALS,
    st.integers(11, 24),
    st.integers(1, 6),
    st.sampled_from([1, 3, 8, 64]),
    st.integers(2, 3),
)
def test_every_request_ends_and_nothing_leaks(
    arrivals: list[tuple[int, int, tuple[str, ...], int, int | None, int, str]],
    num_blocks: int,
    max_rows: int,
    max_step_tokens: int,
    num_slots: int,
) -> None:
    scheduler, slots = scheduler_of(num_blocks, max_rows, max_step_tokens, num_slots)
    live: dict[str, tuple[Sequence, int | None]] = {}
    for length, max_tokens, adapters, pause, cancel_after, first, tenant in arrivals:
        sequence = sequence_of(length, adapters, max_tokens, first=first, tenant=tenant)
        scheduler.add(sequence)
        live[sequence.request_id] = (sequence, cancel_after)
        _run_steps(scheduler, live, pause)
    _run_steps(scheduler, live, 3000)
    assert not live
    assert scheduler.blocks.num_used == 0
    assert not any(slots.counts.values())


def _run_steps(
    scheduler: Scheduler, live: dict[str, tuple[Sequence, int | None]], num_steps: int
) -> None:
    for _ in range(num_steps):
        if not live:
            return
        for request_id, (sequence, cancel_after) in list(live.items()):
            if cancel_after == 0:
                scheduler.remove(sequence)
                del live[request_id]
            elif cancel_after is not None:
                live[request_id] = (sequence, cancel_after - 1)
        for request_id in advance(scheduler):
            del live[request_id]
