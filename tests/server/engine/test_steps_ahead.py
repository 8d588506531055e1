"""Steps that are launched before the last one's tokens are known: the same answers, nothing lost.

Decode steps are replayed from plain graphs, which on a CPU compute at once; what is certain of a
step is decided as on a GPU.
"""

import asyncio
import random
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from quickchange_adapters.host_adapter import pack_adapter
from quickchange_adapters.merge import merge_adapter
from quickchange_adapters.pool import AdapterPool
from quickchange_adapters.weights import AdapterWeights
from quickchange_server.engine.base_model import load_base
from quickchange_server.engine.batch_sampler import choose_together
from quickchange_server.engine.client import EngineClient
from quickchange_server.engine.decode_launch import DecodeLaunch
from quickchange_server.engine.engine import Engine
from quickchange_server.engine.model_runner import ModelRunner
from quickchange_server.engine.request import (
    AdapterRef,
    GenerationRequest,
    SamplingParams,
    TokenOutput,
)
from quickchange_server.engine.sampler import draw_of, sample
from quickchange_server.engine.scheduler import ScheduledRow
from quickchange_server.engine.settings import EngineSettings

from tests.conftest import LLAMA_LINEARS, MakeAdapter
from tests.server.engine.conftest import MIB, Recorder, collect, make_engine, peft_weights
from tests.server.engine.plain_graphs import use_plain_graphs
from tests.server.engine.scheduler_run import scheduler_of
from tests.server.engine.scheduler_run import sequence_of as waiting_sequence
from tests.server.engine.test_engine import PROMPT, greedy, overflowing, tokens_of
from tests.server.engine.test_sampler import sequence_of

VOCABULARY = 381
RANKS = (1, 4, 8, 12, 24)


class FaultyRunner(ModelRunner):
    """Raises `error` when a step is launched ahead for the `fails_at`th time."""

    error: Exception | None = None
    fails_at = 3
    num_calls = 0

    def run_after(self, launch: DecodeLaunch, rows: Sequence[ScheduledRow]) -> DecodeLaunch | None:
        self.num_calls += 1
        if self.error is not None and self.num_calls == self.fails_at:
            raise self.error
        return super().run_after(launch, rows)


@dataclass
class Bench:
    """An engine that is stepped by hand, with all that it said."""

    engine: Engine
    runner: FaultyRunner
    outputs: list[TokenOutput] = field(default_factory=list)
    recorder: Recorder = field(default_factory=Recorder)

    @classmethod
    def of(cls, folder: Path, *, is_ahead: bool = True, **changes: Any) -> "Bench":
        values = {"dtype": "float32", "max_step_tokens": 256, "kv_cache_bytes": MIB, **changes}
        settings = EngineSettings(**values)
        base = load_base(folder, settings)
        pool = AdapterPool(base.layout, settings.adapter_device_bytes, base.dtype, base.device)
        runner = FaultyRunner(base, pool, settings.kv_cache_bytes, 16)
        use_plain_graphs(runner, settings.max_batch_rows, is_ahead=is_ahead)
        outputs: list[TokenOutput] = []
        recorder = Recorder()
        engine = Engine(runner, settings, frozenset(), recorder, outputs.extend)
        return cls(engine, runner, outputs, recorder)

    def hold(self, *weights: AdapterWeights) -> None:
        base = self.runner.base
        for each in weights:
            self.engine.residency.add_host(pack_adapter(each, base.layout, base.dtype))

    def add(self, *requests: GenerationRequest) -> None:
        for request in requests:
            assert self.engine.residency.claim(request) is None
            self.engine.add(request)

    def step(self) -> None:
        """Do what the engine's thread does in one round."""
        self.engine._inbox.run_waiting()
        self.engine.step()
        self.engine.scheduler.check_integrity()
        self.runner.pool.check_integrity()
        if not self.engine.scheduler.running:
            time.sleep(0.0005)

    def run_to_end(self) -> None:
        deadline_s = time.monotonic() + 120
        while not self.engine.is_idle:
            assert time.monotonic() < deadline_s, "requests did not end"
            self.step()

    def tokens(self, name: str) -> list[int]:
        return tokens_of(self.outputs, name)

    def ends(self) -> dict[str, str]:
        return {o.request_id: o.finish_reason for o in self.outputs if o.finish_reason}

    @property
    def num_ahead(self) -> int:
        return self.engine.ahead.num_launched


@pytest.fixture(scope="module")
def adapters(make_adapter: MakeAdapter) -> list[AdapterWeights]:
    targets = list(LLAMA_LINEARS)
    folders = [
        make_adapter(seed=i, r=rank, target_modules=targets[i % 3 :])
        for i, rank in enumerate(RANKS)
    ]
    return [peft_weights(folder, f"w{i}") for i, folder in enumerate(folders)]


def random_request(rng: random.Random, index: int) -> GenerationRequest:
    mixes: list[tuple[tuple[str, float], ...]] = [
        (),
        *(((f"w{i}", 1.0),) for i in range(len(RANKS))),
        (("w0", 0.5), ("w2", -0.25)),
    ]
    plain = [
        SamplingParams(temperature=0),
        SamplingParams(temperature=1.0, seed=index),
        SamplingParams(temperature=0.8, seed=index, top_k=20, top_p=0.9),
    ]
    rare = [
        SamplingParams(temperature=0, logprobs=1),
        SamplingParams(temperature=1.0, seed=index, repetition_penalty=1.2),
    ]
    return GenerationRequest(
        f"r{index}",
        tuple(rng.randrange(3, VOCABULARY) for _ in range(rng.choice((1, 5, 17, 40)))),
        tuple(AdapterRef(digest, weight) for digest, weight in rng.choice(mixes)),
        rng.choice(rare if rng.random() < 0.08 else plain),
        max_tokens=rng.randint(1, 60),
        stop_token_ids=frozenset(rng.sample(range(VOCABULARY), 6)),
        min_tokens=rng.choice((0, 0, 0, 0, 4)),
        tenant=rng.choice(("t", "t", "t", "u")),
    )


def random_run(bench: Bench, adapters: list[AdapterWeights], seed: int) -> set[str]:
    """Ask, abort and step at random; return who was aborted."""
    rng = random.Random(seed)
    bench.hold(*adapters)
    waves = [[random_request(rng, 10 * wave + i) for i in range(5)] for wave in range(8)]
    gone: set[str] = set()
    for wave in waves:
        bench.add(*wave)
        for _ in range(rng.randint(4, 60)):
            bench.step()
        victim = rng.choice(wave).request_id
        if bench.engine.scheduler.find(victim) is not None:
            bench.engine.abort(victim)
            gone.add(victim)
    bench.run_to_end()
    return gone


@pytest.mark.parametrize("seed", [1, 2])
def test_random_traffic_has_the_answers_of_steps_in_turn(
    tiny_base: Path, adapters: list[AdapterWeights], seed: int
) -> None:
    """Adapters and mixes, ends at any token, aborts, too few blocks, a pool that is too small."""
    settings: dict[str, Any] = {
        "kv_cache_bytes": 512 * 16 * 17,
        "adapter_device_bytes": 500_000,
        "max_batch_rows": 6,
        "max_step_tokens": 40,
    }
    ahead = Bench.of(tiny_base, **settings)
    in_turn = Bench.of(tiny_base, is_ahead=False, **settings)
    gone = random_run(ahead, adapters, seed) | random_run(in_turn, adapters, seed)
    assert ahead.num_ahead > 20
    assert in_turn.num_ahead == 0
    assert ahead.runner.pool.num_evictions > 0
    assert sum(stats.num_preempted for stats in ahead.recorder.steps) > 0
    for name in {f"r{10 * wave + i}" for wave in range(8) for i in range(5)} - gone:
        assert ahead.tokens(name) == in_turn.tokens(name), name
        assert ahead.ends()[name] == in_turn.ends()[name] != "error"
    for bench in (ahead, in_turn):
        assert bench.engine.blocks.num_used == 0
        assert not any(slot.num_references for slot in bench.runner.pool.slots)


def sampled(name: str, num: int = 12, **params: Any) -> GenerationRequest:
    return greedy(name, num=num, sampling=SamplingParams(**{"seed": 5, **params}))


@pytest.mark.parametrize(
    "request_",
    [
        greedy("r", sampling=SamplingParams(temperature=0, logprobs=0)),
        greedy("r", prompt_logprobs=0),
        sampled("r", repetition_penalty=1.1),
        sampled("r", logit_bias=((3, 1.0),)),
        greedy("r", min_tokens=8),
    ],
    ids=["logprobs", "prompt logprobs", "penalty", "bias", "min_tokens"],
)
def test_what_the_host_does_with_logits_is_done_in_turn(
    tiny_base: Path, request_: GenerationRequest
) -> None:
    bench = Bench.of(tiny_base)
    bench.add(request_, replace(greedy("plain"), max_tokens=8))
    bench.run_to_end()
    assert bench.num_ahead == 0
    assert set(bench.ends().values()) == {"length"}


def test_plain_rows_run_ahead_to_their_ends(tiny_base: Path) -> None:
    """Rows that end by their length are left out of what is launched; the others go on."""
    bench = Bench.of(tiny_base)
    bench.add(greedy("a", num=4), sampled("b"), sampled("c", top_k=5), greedy("d", num=6))
    bench.run_to_end()
    # of 12 steps the first is of prompts, the second is in its turn, and none is after the last
    assert bench.num_ahead == sum(stats.is_ahead for stats in bench.recorder.steps) == 10
    assert [stats.num_rows for stats in bench.recorder.steps] == [4] * 4 + [3] * 2 + [2] * 6
    assert len(bench.tokens("b")) == len(bench.tokens("c")) == 12


def test_steps_on_a_copy_are_not_launched_ahead(
    tiny_base: Path, adapters: list[AdapterWeights]
) -> None:
    bench = Bench.of(tiny_base)
    bench.hold(adapters[0])
    base = bench.runner.base
    packed = pack_adapter(adapters[0], base.layout, base.dtype)
    copy = merge_adapter(packed, base.layout, base)
    bench.engine.residency.reserve_merge("w0", copy.num_bytes)
    bench.engine.residency.add_merged(copy)
    bench.add(greedy("a", "w0"))
    bench.run_to_end()
    assert bench.num_ahead == 0
    assert {stats.weights for stats in bench.recorder.steps} == {"merged"}


def test_a_newcomer_is_admitted_behind_the_step_that_was_launched(tiny_base: Path) -> None:
    bench = Bench.of(tiny_base)
    bench.add(greedy("old", num=30))
    for _ in range(6):
        bench.step()
    before = bench.num_ahead
    assert before
    bench.add(greedy("new", num=4, prompt_ids=(7, 8, 9)))
    bench.step()
    assert bench.num_ahead == before
    bench.step()
    assert len(bench.tokens("new")) == 1


def test_a_call_in_the_inbox_goes_first(tiny_base: Path) -> None:
    bench = Bench.of(tiny_base)
    bench.add(greedy("a", num=30))
    for _ in range(4):
        bench.step()
    before = bench.num_ahead
    bench.engine.call(lambda: None)
    bench.engine.step()
    bench.engine.step()
    assert bench.num_ahead == before
    bench.run_to_end()
    assert bench.num_ahead > before


def test_those_who_wait_for_a_row_do_not_hold_up_a_full_batch(tiny_base: Path) -> None:
    bench = Bench.of(tiny_base, max_batch_rows=2)
    bench.add(*(greedy(name, num=10) for name in "abc"))
    bench.run_to_end()
    assert [len(bench.tokens(name)) for name in "abc"] == [10] * 3
    assert bench.num_ahead > 12


def test_tenants_that_wait_have_their_rows_as_ever(tiny_base: Path) -> None:
    bench = Bench.of(tiny_base, max_batch_rows=2)
    bench.add(*(greedy(name, num=30) for name in "ab"))
    for _ in range(4):
        bench.step()
    bench.add(greedy("other", num=2, tenant="other"))
    for _ in range(4):
        bench.step()
    assert bench.ends() == {"other": "length"}


def test_a_launch_that_fails_fails_its_own_step(tiny_base: Path) -> None:
    """What ran before it is handed out first."""
    bench = Bench.of(tiny_base)
    bench.runner.error = RuntimeError("no launch")
    bench.add(greedy("a", num=20), greedy("b", num=4))
    bench.run_to_end()
    bench.add(greedy("c"))
    bench.run_to_end()
    assert bench.ends() == {"a": "error", "b": "length", "c": "length"}
    failed = next(o for o in bench.outputs if o.failure)
    assert failed.failure is not None
    assert failed.failure.code == "step_failed"
    # the prompt's step, one in turn and two ahead are good; the third of them is not
    assert len(bench.tokens("a")) == 4
    assert bench.engine.blocks.num_used == 0


def test_a_launch_without_memory_is_tried_again_in_turn(tiny_base: Path) -> None:
    in_turn = Bench.of(tiny_base, is_ahead=False)
    bench = Bench.of(tiny_base)
    bench.runner.error = MemoryError()
    for each in (in_turn, bench):
        each.add(sampled("a", num=160), sampled("b", num=160, seed=6))
        each.run_to_end()
    assert bench.num_ahead > 80  # after as many steps of one row the budget has grown again
    assert bench.ends() == {"a": "length", "b": "length"}
    assert [bench.tokens(name) for name in "ab"] == [in_turn.tokens(name) for name in "ab"]


def test_an_error_while_tokens_are_awaited_fails_that_step_and_drops_the_next(
    tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench.of(tiny_base)
    bench.add(greedy("a", num=20))
    for _ in range(5):
        bench.step()

    def fail(self: DecodeLaunch) -> None:
        raise RuntimeError("an illegal address")

    with monkeypatch.context() as patch:
        patch.setattr(DecodeLaunch, "samples", fail)
        bench.step()
    assert bench.ends() == {"a": "error"}
    assert len(bench.tokens("a")) == 5
    bench.add(greedy("b"))
    bench.run_to_end()
    assert bench.ends()["b"] == "length"
    assert bench.engine.blocks.num_used == 0


def test_who_shares_a_prompt_with_a_row_that_was_computed_in_vain_reads_nothing_of_it(
    tiny_base: Path,
) -> None:
    alone, bench = Bench.of(tiny_base, is_ahead=False), Bench.of(tiny_base)
    alone.add(sampled("first", num=40))
    alone.run_to_end()
    stop = alone.tokens("first")[20]
    ask = replace(sampled("ends", num=40), stop_token_ids=frozenset({stop}))
    bench.add(ask, sampled("stays", num=60, seed=6))
    while "ends" not in bench.ends():
        bench.step()
    assert bench.ends()["ends"] == "stop"
    longer = (*PROMPT, *bench.tokens("ends"), 11, 12)
    for each in (alone, bench):
        each.add(replace(sampled("next", num=20), prompt_ids=longer))
        each.run_to_end()
    assert bench.tokens("next") == alone.tokens("next")
    assert len(bench.tokens("stays")) == 60


def test_a_row_that_is_not_finite_fails_alone_and_is_cleared(
    tiny_base: Path, make_adapter: MakeAdapter
) -> None:
    bench = Bench.of(tiny_base)
    bench.hold(overflowing(peft_weights(make_adapter(seed=1), "huge")))
    bench.add(greedy("bad", "huge", prompt_ids=(5,)), greedy("good", num=12, prompt_ids=(6,)))
    bench.run_to_end()
    assert bench.ends() == {"bad": "error", "good": "length"}
    failed = next(o.failure for o in bench.outputs if o.failure)
    assert failed.code == "non_finite"
    assert all(each[1:].isfinite().all() for each in bench.runner.storage.keys)


def test_who_leaves_meanwhile_has_no_more_tokens(tiny_base: Path) -> None:
    bench = Bench.of(tiny_base)
    bench.add(greedy("stays", num=20), greedy("leaves", num=20))
    for _ in range(5):
        bench.step()
    bench.engine.abort("leaves")
    bench.run_to_end()
    assert bench.ends() == {"leaves": "abort", "stays": "length"}
    assert len(bench.tokens("leaves")) == 5
    assert len(bench.tokens("stays")) == 20


def test_a_step_that_nobody_waits_for_is_forgotten(tiny_base: Path) -> None:
    bench = Bench.of(tiny_base)
    bench.add(greedy("a", num=20))
    for _ in range(5):
        bench.step()
    bench.engine.abort("a")
    num_steps = len(bench.recorder.steps)
    bench.step()
    assert bench.engine.is_idle
    assert len(bench.recorder.steps) == num_steps


def test_the_seconds_of_steps_add_up(tiny_base: Path) -> None:
    bench = Bench.of(tiny_base, auto_merge=True)
    bench.add(greedy("a", num=25), sampled("b", num=15))
    started = time.monotonic()
    bench.run_to_end()
    wall_s = time.monotonic() - started
    steps = bench.recorder.steps
    assert bench.engine.snapshot.num_steps == len(steps) == 25
    assert [stats.num_tokens for stats in steps[1:]] == [2] * 14 + [1] * 10
    assert bench.engine.demand is not None
    demand = bench.engine.demand.take()
    total_s = sum(stats.seconds for stats in steps)
    assert total_s <= wall_s
    assert demand.seconds == pytest.approx(total_s)
    ahead = steps[2:]
    assert all(stats.seconds > 0 for stats in ahead)


def test_nothing_is_taken_where_blocks_are_too_few() -> None:
    scheduler, _ = scheduler_of(num_blocks=3)
    one, other = waiting_sequence(4, max_tokens=9), waiting_sequence(3, max_tokens=9, first=50)
    for sequence in (one, other):
        scheduler.add(sequence)
    rows = scheduler.schedule().rows
    assert [row.num_tokens for row in rows] == [4, 3]
    for row in rows:
        scheduler.note_computed(row)
        row.sequence.token_ids.append(1)
    rows = scheduler.schedule().rows
    assert scheduler.blocks.num_free == 0
    assert scheduler.schedule_after(rows) is None
    scheduler.check_integrity()


def test_a_step_ahead_counts_as_one_in_turn_does() -> None:
    scheduler, _ = scheduler_of()
    one, other = waiting_sequence(4, max_tokens=3), waiting_sequence(3, max_tokens=9, first=50)
    for sequence in (one, other):
        scheduler.add(sequence)
    for row in scheduler.schedule().rows:
        scheduler.note_computed(row)
        row.sequence.token_ids.append(1)
    rows = scheduler.schedule().rows
    step = scheduler.schedule_after(rows)
    assert step is not None
    assert [(row.sequence, row.start, row.num_tokens) for row in step.rows] == [
        (one, 5, 1),
        (other, 4, 1),
    ]
    assert one.last_step == other.last_step == 3
    assert scheduler.schedule_after(step.rows) is not None


def test_tokens_chosen_together_are_those_of_each_alone() -> None:
    torch.manual_seed(0)
    logits = torch.randn(7, 50)
    logits[2, 3], logits[5, 1] = float("nan"), float("inf")
    params: list[dict[str, Any]] = [
        {"temperature": 0},
        {"temperature": 0.7},
        {"temperature": 0},
        {"temperature": 1.3, "top_k": 4},
        {"temperature": 1.0, "top_p": 0.6, "min_p": 0.01},
        {"temperature": 1.0},
        {"temperature": 0.1},
    ]
    sequences = [sequence_of(index, (4, 5), **each) for index, each in enumerate(params)]
    draws = [draw_of(sequence, len(sequence.token_ids)) for sequence in sequences]
    chosen, checked = choose_together(logits, draws)
    alone = [result.token_id for result in sample(logits, sequences)]
    assert [None if token < 0 else token for token in checked.tolist()] == alone
    assert alone.count(None) == 2
    assert all(0 <= token < 50 for token in chosen.tolist())


@asynccontextmanager
async def started(folder: Path, **settings: Any) -> AsyncIterator[EngineClient]:
    client = make_engine(folder, **settings)
    use_plain_graphs(client._engine.runner, client._engine.settings.max_batch_rows, is_ahead=True)
    await client.start()
    try:
        yield client
    finally:
        await client.stop()


async def test_on_its_thread_the_engine_serves_leaves_and_stops(tiny_base: Path) -> None:
    async with started(tiny_base) as client:
        alone = await collect(client.generate(greedy("alone", num=30)))
        outputs = client.generate(greedy("leaves", num=400))
        for _ in range(3):
            await anext(outputs)
        again = asyncio.create_task(collect(client.generate(greedy("again", num=30))))
        await outputs.aclose()  # type: ignore[attr-defined]
        assert (await again).token_ids == alone.token_ids
        assert client._engine.ahead.num_launched > 40
        left = asyncio.create_task(collect(client.generate(greedy("left", num=400))))
        while not client.snapshot().num_running:
            await asyncio.sleep(0.001)
    assert (await left).finish_reason == "abort"
