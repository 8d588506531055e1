"""Several tenants and adapters on one scheduler: who waits for how many steps, who gets what."""

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from quickchange_server.engine.row_shares import GRACE_STEPS
from quickchange_server.engine.scheduler import Scheduler
from quickchange_server.engine.sequence import Sequence

from tests.server.engine.scheduler_run import advance, scheduler_of, sequence_of

MAX_ROWS, STEP_TOKENS = 8, 32
FULL_STEPS = 2


@dataclass
class Run:
    """Steps of one scheduler; when each request arrived, was admitted, and got its first token."""

    scheduler: Scheduler
    num_steps: int = 0
    arrived: dict[Sequence, int] = field(default_factory=dict)
    admitted: dict[Sequence, int] = field(default_factory=dict)
    first_token: dict[Sequence, int] = field(default_factory=dict)
    preempted: list[Sequence] = field(default_factory=list)
    num_rows: list[int] = field(default_factory=list)

    def add(self, sequence: Sequence) -> Sequence:
        self.arrived[sequence] = self.num_steps
        self.scheduler.add(sequence)
        return sequence

    def step(self) -> None:
        self.num_steps += 1
        before = set(self.scheduler.running)
        advance(self.scheduler)
        self.preempted += [each for each in before if each in self.scheduler.waiting]
        for sequence in self.arrived.keys() - self.first_token.keys():
            if sequence.scheduled_s is not None:
                self.admitted.setdefault(sequence, self.num_steps)
            if sequence.num_generated:
                self.first_token[sequence] = self.num_steps
        self.num_rows.append(len(self.scheduler.running))

    def ttft(self, sequence: Sequence) -> int:
        return self.first_token[sequence] - self.arrived[sequence]

    def wait(self, sequence: Sequence) -> int:
        return self.admitted[sequence] - self.arrived[sequence]


def run_of(num_blocks: int = 2000, num_slots: int = 100, max_rows: int = MAX_ROWS) -> Run:
    return Run(scheduler_of(num_blocks, max_rows, STEP_TOKENS, num_slots)[0])


def p95(values: list[int]) -> int:
    return sorted(values)[int(0.95 * len(values))]


def never() -> None:
    """Add nothing."""


def quiet_ttfts(run: Run, seed: int, flood: Callable[[], None]) -> list[int]:
    """Send a quiet tenant's requests, one now and then, beside a flood; TTFT of each in steps."""
    rng = random.Random(seed)
    sent: list[Sequence] = []
    for _ in range(60):
        for _ in range(rng.randint(5, 30)):
            flood()
            run.step()
        request = sequence_of(
            rng.randint(1, 2 * STEP_TOKENS), ("q",), 6, first=10_000, tenant="quiet"
        )
        sent.append(run.add(request))
    for _ in range(60):
        flood()
        run.step()
    return [run.ttft(sequence) for sequence in sent]


def flood_of(run: Run, rng: random.Random, num_adapters: int = 3) -> Callable[[], None]:
    """Keep a hundred requests of one tenant waiting, some with prompts of many chunks."""

    def flood() -> None:
        while len(run.scheduler.waiting) < 100:
            length = rng.choice([1, 10, 40, 400])
            adapter = f"a{rng.randrange(num_adapters)}"
            request = sequence_of(length, (adapter,), rng.randint(1, 120), first=rng.randrange(999))
            run.add(request)

    return flood


@pytest.mark.parametrize("seed", range(3))
def test_a_quiet_tenant_waits_two_steps_more_beside_a_flood(seed: int) -> None:
    alone = quiet_ttfts(run_of(), seed, never)
    run = run_of()
    beside = quiet_ttfts(run, seed, flood_of(run, random.Random(seed)))
    assert p95(beside) <= p95(alone) + FULL_STEPS
    waits = [run.wait(each) for each in run.admitted if each.request.tenant == "quiet"]
    assert max(waits) <= FULL_STEPS
    assert sum(run.num_rows[100:]) / len(run.num_rows[100:]) > MAX_ROWS - 1.5  # rows are used


def test_a_tenant_that_comes_often_keeps_a_row_instead_of_taking_one_each_time() -> None:
    run = run_of()
    for _ in range(30):
        run.add(sequence_of(4, max_tokens=500))
    for _ in range(20):
        for _ in range(12):
            run.step()
        run.add(sequence_of(4, tenant="quiet", max_tokens=4))
    assert len(run.preempted) == 1


def test_a_burst_up_to_half_an_equal_share_starts_at_once() -> None:
    run = run_of()
    for _ in range(30):
        run.add(sequence_of(4, max_tokens=500))
    for _ in range(10):
        run.step()
    burst = [run.add(sequence_of(4, tenant="quiet", max_tokens=50)) for _ in range(4)]
    for _ in range(3):
        run.step()
    running = Counter(each.request.tenant for each in run.scheduler.running)
    assert running == {"t": MAX_ROWS - 2, "quiet": 2}
    assert [run.wait(each) for each in burst if each in run.admitted] == [1, 1]


def test_a_quiet_tenant_gets_blocks_from_a_flood_that_holds_all() -> None:
    run = run_of(num_blocks=100)
    for index in range(4):
        run.add(sequence_of(80, max_tokens=400, first=1000 * index))
    while run.scheduler.blocks.num_free > 4:
        run.step()
    quiet = run.add(sequence_of(60, tenant="quiet", first=9000))
    for _ in range(4):
        run.step()
    assert run.wait(quiet) <= FULL_STEPS
    assert quiet in run.first_token


def test_the_oldest_request_is_never_set_back() -> None:
    run = run_of(num_blocks=60)
    oldest = run.add(sequence_of(60, max_tokens=150))
    for _ in range(3):
        run.step()
    rng = random.Random(2)
    while oldest in run.scheduler.running:
        assert run.num_steps < 200
        tenant = rng.choice(["b", "c"])
        run.add(sequence_of(rng.randint(1, 60), tenant=tenant, first=rng.randrange(9999)))
        run.step()
    assert oldest.num_generated == 150


def test_when_blocks_run_out_the_tenant_that_was_given_most_gives_way() -> None:
    run = run_of(num_blocks=40)
    greedy = [run.add(sequence_of(30, max_tokens=60, first=500 * i)) for i in range(2)]
    run.step()
    run.step()
    modest = run.add(sequence_of(20, max_tokens=60, tenant="modest", first=5000))
    while not run.preempted:
        run.step()
    assert run.preempted == [greedy[1]]
    assert modest.arrival_s > greedy[1].arrival_s


@pytest.mark.parametrize("level", ["tenant", "adapter"])
def test_those_who_always_wait_get_equal_parts(level: str) -> None:
    run = run_of()
    rng = random.Random(5)
    sent: dict[str, list[Sequence]] = {"x": [], "y": []}
    for _ in range(1500):
        for name in ("x", "x", "x", "y"):
            if len(sent[name]) - sum(each in run.admitted for each in sent[name]) > 20:
                continue
            tenant = name if level == "tenant" else "t"
            adapter = name if level == "adapter" else "a"
            length = 40 if name == "x" else 5
            max_tokens = rng.randint(1, 60)
            request = sequence_of(
                length, (adapter,), max_tokens, first=len(sent[name]), tenant=tenant
            )
            sent[name].append(run.add(request))
        run.step()
    given = {
        name: sum(2 * s.num_generated + s.num_prompt for s in each if s in run.admitted)
        for name, each in sent.items()
    }
    assert 0.8 < given["x"] / given["y"] < 1.25


def test_fifty_cold_adapters_start_beside_a_hot_one_within_the_stated_bound() -> None:
    """Every waiting adapter's first request comes before a second one of any."""
    answer = 20
    run = run_of(num_slots=MAX_ROWS)
    for _ in range(40):
        run.add(sequence_of(3, ("hot",), answer))
        run.step()
    cold = [run.add(sequence_of(3, (f"c{index}",), answer)) for index in range(50)]
    hot = []
    while any(each not in run.admitted for each in cold):
        hot.append(run.add(sequence_of(3, ("hot",), answer)))
        run.step()
        assert run.num_steps < 2000
    bound = -(-(len(cold) + 1) // MAX_ROWS) * answer
    assert max(run.wait(each) for each in cold) <= bound
    last = max(run.admitted[each] for each in cold)
    assert sum(run.admitted.get(each, last + 1) <= last for each in hot) <= 2


def test_a_tenant_beyond_its_due_loses_what_is_guaranteed() -> None:
    run = run_of()
    greedy = [sequence_of(STEP_TOKENS, tenant="greedy", first=100 * i) for i in range(200)]
    for sequence in greedy:
        run.add(sequence)
    for index in range(60):
        run.add(sequence_of(3, first=index, max_tokens=100))
    for _ in range(400):
        run.step()
    given: Counter[str] = Counter()
    for sequence in run.admitted:
        given[sequence.request.tenant] += 2 * sequence.num_generated + sequence.num_prompt
    assert given["greedy"] <= given["t"] + 2 * GRACE_STEPS * STEP_TOKENS
