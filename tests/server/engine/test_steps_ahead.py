"""Steps that are launched before the last one's tokens are known: the same answers, nothing lost.

Decode steps are replayed from plain graphs, which on a CPU compute at once; what is certain of a
step is decided as on a GPU.
"""

import asyncio
import random
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from quickchange_adapters.host_adapter import pack_adapter
from quickchange_adapters.merge import merge_adapter
from quickchange_adapters.weights import AdapterWeights
from quickchange_server.engine.client import EngineClient
from quickchange_server.engine.request import (
    AdapterRef,
    GenerationRequest,
    SamplingParams,
)

from tests.conftest import LLAMA_LINEARS, MakeAdapter
from tests.server.engine.conftest import collect, make_engine, peft_weights
from tests.server.engine.host_reads import HostReads
from tests.server.engine.plain_graphs import use_plain_graphs
from tests.server.engine.steps_ahead_bench import Bench, sampled
from tests.server.engine.test_engine import PROMPT, greedy

VOCABULARY = 381
RANKS = (1, 4, 8, 12, 24)


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


def test_a_copy_is_used_as_soon_as_it_is_there(
    tiny_base: Path, adapters: list[AdapterWeights]
) -> None:
    """Steps on copies are not captured, so none of them is launched ahead."""
    bench = Bench.of(tiny_base)
    bench.hold(adapters[0])
    bench.add(greedy("a", "w0", num=40))
    while not (before := bench.num_ahead):
        bench.step()
    base = bench.runner.base
    copy = merge_adapter(pack_adapter(adapters[0], base.layout, base.dtype), base.layout, base)
    bench.engine.residency.reserve_merge("w0", copy.num_bytes)
    bench.engine.residency.add_merged(copy)
    num_before = len(bench.recorder.steps)
    bench.run_to_end()
    assert bench.num_ahead == before
    weights = [stats.weights for stats in bench.recorder.steps[num_before:]]
    assert weights == ["unmerged"] + ["merged"] * (len(weights) - 1)


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


def test_nothing_waits_for_the_device_where_a_step_is_launched_behind_another(
    tiny_base: Path,
) -> None:
    """Greedy rows and drawn ones, with filters and without; one of the rows has ended."""
    bench = Bench.of(tiny_base)
    bench.add(greedy("ends", num=3), greedy("a"), sampled("b"), sampled("c", top_k=5, min_p=0.1))
    for _ in range(2):
        bench.step()
    running = bench.engine.ahead.take()
    assert running is not None
    with torch.inference_mode(), HostReads() as reads:
        bench.engine.ahead.launch_after(running)
    assert reads.names == []
    assert bench.num_ahead == 2
    with HostReads() as reads:
        running.samples()
    launched = bench.engine.ahead.take()
    assert launched is not None
    assert len(launched.step.rows) == 3


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
