"""The fair queue by itself: whose request is next, and what that costs."""

from collections import Counter

from quickchange_server.engine.fair_accounts import AGE_CREDIT
from quickchange_server.engine.fair_queue import MAX_RETRIES, FairQueue
from quickchange_server.engine.sequence import Sequence

from tests.server.engine.scheduler_run import calls_of, scheduler_of, sequence_of


def queue_of(*sequences: Sequence) -> FairQueue:
    queue = FairQueue()
    queue.start_step()
    for sequence in sequences:
        queue.add(sequence)
    return queue


def serve(queue: FairQueue, num_tokens: int) -> Sequence:
    """Take out who is next, charge it, and end it."""
    sequence = queue.next()
    assert sequence is not None
    queue.admit(sequence)
    queue.charge(sequence, num_tokens)
    queue.remove(sequence)
    return sequence


def test_tenants_take_turns_whatever_each_has_waiting() -> None:
    loud = [sequence_of(1, tenant="loud") for _ in range(20)]
    quiet = [sequence_of(1, tenant="quiet") for _ in range(3)]
    queue = queue_of(*loud, *quiet)
    order = [serve(queue, 100) for _ in range(6)]
    assert order == [loud[0], quiet[0], loud[1], quiet[1], loud[2], quiet[2]]


def test_many_adapters_do_not_give_a_tenant_more() -> None:
    many = [sequence_of(1, (f"a{index}",), tenant="many") for index in range(20)]
    one = [sequence_of(1, ("a0",), tenant="one") for _ in range(20)]
    queue = queue_of(*many, *one)
    served = Counter(serve(queue, 10).request.tenant for _ in range(20))
    assert served == {"many": 10, "one": 10}


def test_who_gets_little_each_time_comes_more_often() -> None:
    big = [sequence_of(1, tenant="big") for _ in range(40)]
    small = [sequence_of(1, tenant="small") for _ in range(40)]
    queue = queue_of(*big, *small)
    served: Counter[str] = Counter()
    for _ in range(33):
        following = queue.next()
        assert following is not None
        tenant = following.request.tenant
        num_tokens = 1000 if tenant == "big" else 100
        served[tenant] += num_tokens
        serve(queue, num_tokens)
    assert abs(served["big"] - served["small"]) <= 1000


def test_idleness_earns_nothing() -> None:
    busy = [sequence_of(1, tenant="busy") for _ in range(40)]
    queue = queue_of(sequence_of(1, tenant="idle"), *busy)
    for _ in range(20):
        serve(queue, 1000)
    for _ in range(20):
        queue.add(sequence_of(1, tenant="idle"))
    served = Counter(serve(queue, 1000).request.tenant for _ in range(10))
    assert served == {"idle": 5, "busy": 5}


def test_a_short_absence_forgives_nothing() -> None:
    modest = [sequence_of(1, tenant="modest") for _ in range(12)]
    queue = queue_of(sequence_of(1, tenant="greedy"), *modest)
    assert serve(queue, 9000).request.tenant == "greedy"
    queue.add(sequence_of(1, tenant="greedy"))
    served = [serve(queue, 1000).request.tenant for _ in range(10)]
    assert served == ["modest"] * 9 + ["greedy"]


def test_newcomers_cannot_keep_out_one_that_was_given_a_little_more() -> None:
    queue = queue_of(sequence_of(1, ("hot",)), sequence_of(1, ("n",)))
    serve(queue, 400)
    hot = sequence_of(1, ("hot",))
    queue.add(hot)
    for index in range(400 // AGE_CREDIT + 2):
        queue.start_step()
        queue.add(sequence_of(1, (f"n{index}",)))
        if serve(queue, 5) is hot:
            return
    raise AssertionError("the adapter that had been used was never served again")


def test_preempted_requests_keep_their_place_before_those_that_never_ran() -> None:
    first, second, third = (sequence_of(1, (name,)) for name in "abc")
    queue = queue_of(first, second, third)
    for sequence in (first, second):
        queue.admit(sequence)
        queue.charge(sequence, 5000)
    queue.add(sequence_of(1, ("d",)))
    queue.put_back(second)
    queue.put_back(first)
    assert [serve(queue, 0) for _ in range(3)] == [first, second, third]


def test_accounts_that_no_longer_matter_are_forgotten() -> None:
    queue = queue_of()
    for index in range(500):
        queue.add(sequence_of(1, (f"a{index}",), tenant=f"t{index}"))
        serve(queue, 100)
    assert len(queue._tenants) <= 2


def calls_of_a_step(num_waiting: int, num_tenants: int = 50, num_slots: int = 2) -> int:
    """Count Python's calls in one step with so many waiting, each for an adapter of its own."""
    scheduler, _ = scheduler_of(num_slots=num_slots, max_rows=4, max_step_tokens=64)
    for index in range(num_waiting):
        adapter, tenant = f"a{index}", f"t{index % num_tenants}"
        scheduler.add(sequence_of(2, (adapter,), max_tokens=200, tenant=tenant))
    for _ in range(10):
        for row in scheduler.schedule().rows:
            scheduler.note_computed(row)
            row.sequence.token_ids.append(1)
    return calls_of(scheduler.schedule)


def test_a_step_costs_about_the_same_with_thousands_waiting() -> None:
    few, many = calls_of_a_step(2 * MAX_RETRIES), calls_of_a_step(100 * MAX_RETRIES)
    assert many < 3 * few


def test_a_step_costs_about_the_same_with_thousands_of_tenants_waiting() -> None:
    few, many = (calls_of_a_step(n, num_tenants=n, num_slots=n) for n in (20, 2000))
    assert many < 3 * few


def test_what_is_upcoming_is_of_every_tenant_and_adapter_whoever_came_first() -> None:
    flood = [sequence_of(1, (f"f{index % 3}",), tenant="flood") for index in range(30)]
    quiet = [sequence_of(1, (name,), tenant="quiet") for name in "ab"]
    queue = queue_of(*flood, *quiet)
    assert {*queue.upcoming(4)} == {*flood[:2], *quiet}
    assert {*queue.upcoming(16)} == {*flood[:3], *quiet}
    assert queue_of().upcoming(16) == []
    for sequence in (*flood, *quiet):
        assert queue.next() in queue.upcoming(2)
        queue.remove(sequence)
