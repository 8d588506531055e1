"""Slots are filled while others run: kept for who waits, all or none, nobody waits for ever."""

import itertools
from collections.abc import Callable
from concurrent.futures import Executor, Future
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quickchange_adapters.host_adapter import HostAdapter
from quickchange_adapters.pool import AdapterPool, Evictable, Slot
from quickchange_server.engine.slot_loader import MAX_REFUSALS, MAX_ROUNDS, SlotLoader

from tests.adapters.test_pool import adapter_of, assert_rows_equal, only, pool_of


class HeldExecutor(Executor):
    """Runs what it was given when the test says so."""

    def __init__(self) -> None:
        self.jobs: list[Callable[[], None]] = []

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> "Future[Any]":
        self.jobs.append(lambda: fn(*args, **kwargs))
        return Future()

    def run(self, num_jobs: int = 1 << 30) -> None:
        for _ in range(min(num_jobs, len(self.jobs))):
            self.jobs.pop(0)()


class Scene:
    """A loader over a small pool, its other thread held in hand, and who uses what."""

    def __init__(self, num_rows: int, pool: AdapterPool | None = None) -> None:
        self.pool = pool or pool_of(num_rows)
        self.other_thread = HeldExecutor()
        self.users: dict[str, int] = {}
        self.loader = SlotLoader(self.pool, lambda d: self.users.get(d, 0), self.other_thread)

    def finish(self) -> None:
        self.other_thread.run()
        self.loader.publish()
        self.pool.check_integrity()

    def resident(self, *names: str) -> list[Slot]:
        slots = []
        for name in names:
            assert self.loader.take(name, [adapter_of(name, 8)]) is None
            self.finish()
            slots.append(only(self.loader.take(name, [adapter_of(name, 8)])))
        return slots

    def idle(self, *names: str) -> None:
        for slot in self.resident(*names):
            self.pool.release(slot)


def test_a_slot_is_there_once_it_was_filled_and_published() -> None:
    scene, adapter = Scene(16), adapter_of("a", 8)
    assert scene.loader.take("r", [adapter]) is None
    assert scene.pool.get("a") is None
    scene.other_thread.run()
    assert scene.loader.take("r", [adapter]) is None  # the step may be running
    scene.loader.publish()
    slot = only(scene.loader.take("r", [adapter]))
    assert slot.num_references == 1
    assert_rows_equal(scene.pool, slot, adapter)


def test_requests_for_one_version_fill_it_once() -> None:
    scene, adapter = Scene(16), adapter_of("a", 8)
    for name in ("r0", "r1", "r2"):
        assert scene.loader.take(name, [adapter]) is None
    assert len(scene.other_thread.jobs) == 1
    scene.finish()
    slots = [only(scene.loader.take(name, [adapter])) for name in ("r2", "r0", "r1")]
    assert slots[0].num_references == 3


def test_a_filled_slot_is_kept_for_its_request() -> None:
    scene = Scene(8)
    assert scene.loader.take("first", [adapter_of("a", 8)]) is None
    scene.finish()
    assert scene.loader.take("second", [adapter_of("b", 8)]) is None
    scene.finish()
    assert only(scene.loader.take("first", [adapter_of("a", 8)])).digest == "a"


def test_a_kept_slot_that_only_stands_in_the_way_is_given_up() -> None:
    """Its request is behind the one that waits for its room, and is never asked."""
    scene = Scene(8)
    assert scene.loader.take("behind", [adapter_of("a", 8)]) is None
    scene.finish()
    num_steps = 0
    while scene.pool.get("b") is None:
        assert scene.loader.take("ahead", [adapter_of("b", 8)]) is None
        for _ in range(5):  # others ask too: it is steps that count
            assert scene.loader.take("other", [adapter_of("c", 8)]) is None
        scene.finish()
        num_steps += 1
        assert num_steps <= MAX_REFUSALS + 2
    assert num_steps > MAX_REFUSALS
    assert only(scene.loader.take("ahead", [adapter_of("b", 8)])).digest == "b"


def test_a_mix_holds_nothing_while_it_waits_for_one_of_its_adapters() -> None:
    scene = Scene(24)
    (busy,) = scene.resident("busy")
    scene.idle("a")
    mix = [adapter_of("a", 8), adapter_of("b", 8), adapter_of("c", 8)]
    assert scene.loader.take("mix", mix) is None
    assert scene.other_thread.jobs == []
    assert scene.pool.get("a") is not None
    assert scene.pool.slots[0].num_references + scene.pool.slots[1].num_references == 1
    scene.pool.release(busy)
    assert scene.loader.take("mix", mix) is None
    scene.finish()
    slots = scene.loader.take("mix", mix)
    assert slots is not None
    assert [slot.num_references for slot in slots] == [1, 1, 1]


def test_mixes_that_want_each_other_s_slots_run_in_turn() -> None:
    scene = Scene(16)
    scene.idle("a", "b")
    ab, bc = [[adapter_of(name, 8) for name in names] for names in ("ab", "bc")]
    slots = scene.loader.take("ab", ab)
    assert slots is not None
    assert scene.loader.take("bc", bc) is None
    assert scene.other_thread.jobs == []
    for slot in slots:
        scene.pool.release(slot)
    assert scene.loader.take("bc", bc) is None
    scene.finish()
    assert scene.loader.take("ab", ab) is None
    assert scene.loader.take("bc", bc) is not None


class CountingPool(AdapterPool):
    """Counts how often it was looked through for room."""

    num_looks = 0

    def reserve(
        self, *adapters: HostAdapter, evictable: Evictable | None = None
    ) -> tuple[Slot, ...] | None:
        self.num_looks += 1
        return super().reserve(*adapters, evictable=evictable)


def test_a_full_pool_is_looked_through_once_a_step_however_many_ask() -> None:
    like = pool_of(8)
    pool = CountingPool(like.layout, like.total_bytes, torch.float32, like.device)
    scene = Scene(8, pool)
    (busy,) = scene.resident("busy")
    before = pool.num_looks
    for _ in range(3):
        for index in range(20):
            assert scene.loader.take(f"r{index}", [adapter_of(f"a{index}", 8)]) is None
        scene.loader.publish()
    assert pool.num_looks - before == 3
    pool.release(busy)
    assert scene.loader.take("r7", [adapter_of("a7", 8)]) is None
    scene.finish()
    assert only(scene.loader.take("r7", [adapter_of("a7", 8)])).digest == "a7"


class BrokenPool(AdapterPool):
    """Fails to fill one version."""

    def fill(self, slot: Slot, adapter: HostAdapter) -> None:
        if adapter.digest == "bad":
            raise MemoryError("no room on the card")
        super().fill(slot, adapter)


def broken_pool(num_rows: int) -> AdapterPool:
    like = pool_of(num_rows)
    ceiling = like.total_bytes
    return BrokenPool(like.layout, ceiling, like.arenas["o"].lora_a.dtype, like.device)


def test_a_fill_that_fails_is_told_to_those_who_wait_for_it_and_to_nobody_else() -> None:
    scene = Scene(32, broken_pool(32))
    scene.idle("mate")
    bad, good = adapter_of("bad", 8), adapter_of("good", 8)
    mix = [adapter_of("mate", 8), bad]
    for name, adapters in (("r0", [bad]), ("r1", mix), ("r2", [good])):
        assert scene.loader.take(name, adapters) is None
    hinted = scene.loader.activate(bad)
    scene.finish()
    for name, adapters in (("r0", [bad]), ("r1", mix)):
        with pytest.raises(MemoryError, match="on the card"):
            scene.loader.take(name, adapters)
    with pytest.raises(MemoryError):
        hinted.result(0)
    assert only(scene.loader.take("r2", [good])).num_references == 1
    assert scene.pool.get("bad") is None
    assert all(s.num_references == 0 for s in scene.pool.slots if s.digest == "mate")
    assert scene.loader.take("again", [bad]) is None  # it may work the next time


def test_a_request_that_ends_while_its_slot_is_filled_leaves_it_idle() -> None:
    scene = Scene(16)
    assert scene.loader.take("gone", [adapter_of("a", 8)]) is None
    scene.loader.leave("gone")
    scene.finish()
    slot = scene.pool.get("a")
    assert slot is not None
    assert slot.num_references == 0


def test_prefetching_takes_no_room_that_somebody_needs() -> None:
    scene = Scene(24)
    scene.resident("running")
    scene.idle("awaited", "unused")
    scene.users = {"running": 1, "awaited": 1, "next": 1, "later": 1}
    scene.loader.prefetch([adapter_of("next", 8)])
    scene.finish()
    assert scene.pool.get("unused") is None
    assert scene.pool.get("next") is not None
    scene.loader.prefetch([adapter_of("later", 8)])
    assert scene.other_thread.jobs == []
    assert scene.pool.get("awaited") is not None


def test_a_request_takes_what_nobody_waits_for_first_and_what_is_pinned_last() -> None:
    scene = Scene(24)
    scene.idle("pinned", "awaited", "unused")
    scene.pool.pinned.add("pinned")
    scene.users = {"awaited": 1}
    left = []
    for name in ("r0", "r1", "r2"):
        scene.resident(name)
        left.append({slot.digest for slot in scene.pool.slots} & {"pinned", "awaited", "unused"})
    assert left == [{"pinned", "awaited"}, {"pinned"}, set()]


def test_a_hint_waits_for_what_is_being_filled_but_not_for_what_runs() -> None:
    scene = Scene(8)
    first = scene.loader.activate(adapter_of("a", 8))
    second = scene.loader.activate(adapter_of("b", 8))
    assert not first.done()
    assert not second.done()
    scene.finish()
    assert first.result(0) is True
    scene.finish()
    assert second.result(0) is True
    scene.users = {"b": 1}
    third = scene.loader.activate(adapter_of("c", 8))
    scene.finish()
    assert third.result(0) is False


def test_a_hint_does_not_wait_for_ever_while_others_fill_in_turn() -> None:
    """A deletion of the same version would wait as long."""
    scene = Scene(16)
    scene.users = dict.fromkeys("abcd", 1)
    names = itertools.cycle("abcd")
    for owner in ("r0", "r1"):
        assert scene.loader.take(owner, [adapter_of(next(names), 8)]) is None
    hinted = scene.loader.activate(adapter_of("hinted", 8))
    for index in range(MAX_ROUNDS - 1):
        scene.other_thread.run(1)
        scene.loader.publish()
        assert not hinted.done()
        owner = f"r{index % 2}"
        scene.loader.leave(owner)
        assert scene.loader.take(owner, [adapter_of(next(names), 8)]) is None
    scene.other_thread.run(1)
    scene.loader.publish()
    assert hinted.result(0) is False
    assert not scene.loader.is_busy("hinted")


def test_what_cannot_be_filled_is_not_prefetched_again_and_again() -> None:
    scene = Scene(32, broken_pool(32))
    for _ in range(3):
        assert scene.loader.prefetch([adapter_of("bad", 8)])
        num_jobs = len(scene.other_thread.jobs)
        scene.finish()
    assert num_jobs == 0
    assert scene.loader.take("r", [adapter_of("bad", 8)]) is None  # in its turn it is tried
    assert len(scene.other_thread.jobs) == 1


def test_a_stop_answers_hints_whatever_was_not_told_yet() -> None:
    scene = Scene(16)
    scene.idle("there")
    there, coming = (scene.loader.activate(adapter_of(name, 8)) for name in ("there", "coming"))
    scene.loader.stop(RuntimeError("stopped"))
    assert there.result(0) is True
    with pytest.raises(RuntimeError, match="stopped"):
        coming.result(0)


def test_rows_that_are_being_filled_or_emptied_are_not_moved_and_not_given_to_anybody() -> None:
    scene = Scene(40)
    scene.idle("a", "b", "c")
    told: list[str] = []
    scene.loader.retire("a", None, lambda: told.append("a is gone"))
    assert scene.loader.take("r", [adapter_of("d", 16)]) is None
    filling = scene.pool._slots["d"].ranges["qkv"]
    scene.pool.tidy()
    assert scene.pool._slots["d"].ranges["qkv"] == filling
    assert filling.start == 24
    assert told == []
    scene.finish()
    assert told == ["a is gone"]
    scene.pool.tidy()
    assert scene.pool.arenas["qkv"].num_active_rows == 40  # d fits into no hole below
    assert_rows_equal(scene.pool, only(scene.loader.take("r", [adapter_of("d", 16)])), d16())


def d16() -> HostAdapter:
    return adapter_of("d", 16)


def test_scattered_room_is_brought_together_a_little_at_a_time() -> None:
    scene = Scene(48)
    busy = scene.resident("a", "b", "c", "d", "e", "f")
    for slot in busy[1::2]:
        scene.pool.release(slot)
        scene.pool.evict(slot.digest)
    assert scene.loader.take("r", [d16()]) is None
    num_steps = 0
    while not scene.pool.has_slot("d"):
        before = [dict(slot.ranges) for slot in busy[::2]]
        scene.loader.publish()
        scene.pool.tidy(1)
        moved = [a != dict(slot.ranges) for a, slot in zip(before, busy[::2], strict=True)]
        assert sum(moved) <= 1
        assert scene.loader.take("r", [d16()]) is None
        num_steps += 1
        assert num_steps < 10
    scene.finish()
    assert_rows_equal(scene.pool, only(scene.loader.take("r", [d16()])), d16())
    for slot in busy[::2]:
        assert_rows_equal(scene.pool, slot, adapter_of(slot.digest, 8))


NAMES = "abcdefg"
RANKS = {name: 8 * (1 + index % 3) for index, name in enumerate(NAMES)}


@cache
def packed(name: str) -> HostAdapter:
    return adapter_of(name, RANKS[name])


OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from(["ask", "ask", "ask", "end", "copy", "step", "hint", "ahead", "unload"]),
        st.integers(0, 5),
        st.sets(st.sampled_from(NAMES), min_size=1, max_size=3),
    ),
    max_size=80,
)


@settings(max_examples=80, deadline=None)
@given(OPERATIONS)
def test_any_order_of_requests_and_copies_conserves_rows_and_references(
    operations: list[tuple[str, int, set[str]]],
) -> None:
    scene = Scene(48)
    wanted: dict[str, list[HostAdapter]] = {}
    held: dict[str, tuple[Slot, ...]] = {}

    def count() -> None:
        scene.users = {n: sum(n in {a.digest for a in w} for w in wanted.values()) for n in NAMES}

    def ask(owner: str) -> None:
        slots = scene.loader.take(owner, wanted[owner]) if owner not in held else None
        if slots is not None:
            held[owner] = slots

    for operation, index, names in operations:
        owner, adapters = f"r{index}", [packed(n) for n in sorted(names)]
        if not scene.pool.can_ever_hold(*(each.size for each in adapters)):
            continue  # a mix that is refused before it gets here
        if operation == "ask":
            wanted.setdefault(owner, adapters)
            count()
            ask(owner)
        elif operation == "end" and owner in wanted:
            for slot in held.pop(owner, ()):
                scene.pool.release(slot)
            scene.loader.leave(owner)
            del wanted[owner]
            count()
        elif operation == "copy":
            scene.other_thread.run(index)
        elif operation == "step":
            scene.loader.publish()
            scene.pool.tidy(1)
        elif operation == "hint":
            scene.loader.activate(adapters[0])
        elif operation == "ahead":
            scene.loader.prefetch(adapters)
        elif operation == "unload":
            name = adapters[0].digest
            if not scene.users.get(name) and not scene.loader.is_busy(name):
                scene.loader.retire(name, None, lambda: None)
        scene.pool.check_integrity()
        for slots in held.values():
            for slot in slots:
                assert_rows_equal(scene.pool, slot, packed(slot.digest))
    for _ in range(200):  # and everybody who asked has an end
        scene.finish()
        scene.pool.tidy()
        for owner in sorted(wanted):
            ask(owner)
            for slot in held.pop(owner, ()):
                scene.pool.release(slot)
                wanted.pop(owner, None)
        count()
        if not wanted:
            break
    assert not wanted
    scene.finish()
    assert all(slot.num_references == 0 for slot in scene.pool.slots)
