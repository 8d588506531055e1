"""The engine thread: cancel, failures, merge, unload, limits, reproducible answers."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from quickchange_adapters.errors import MergeBudgetExceeded
from quickchange_adapters.host_adapter import HostAdapter, pack_adapter
from quickchange_adapters.merge import MergedCopy
from quickchange_adapters.pool import AdapterPool, Evictable, Slot
from quickchange_adapters.weights import AdapterWeights, LoraPair
from quickchange_server.engine.base_model import load_base
from quickchange_server.engine.client import EngineClient
from quickchange_server.engine.decode_launch import DecodeLaunch
from quickchange_server.engine.engine import Engine
from quickchange_server.engine.inbox import EngineStopped
from quickchange_server.engine.model_runner import ModelRunner
from quickchange_server.engine.observer import NoObserver
from quickchange_server.engine.request import (
    AdapterRef,
    GenerationRequest,
    SamplingParams,
    TokenOutput,
)
from quickchange_server.engine.sampler import Sample
from quickchange_server.engine.scheduler import ScheduledRow
from quickchange_server.engine.sequence import Sequence as EngineSequence
from quickchange_server.engine.settings import EngineSettings
from quickchange_server.errors import Conflict, InvalidRequest, NotFound, QueueFull, Unavailable

from tests.conftest import MakeAdapter
from tests.server.engine.conftest import (
    MIB,
    Answer,
    Recorder,
    collect,
    make_engine,
    peft_weights,
    run_all,
)

PROMPT = tuple(range(5, 45))


def greedy(name: str, adapter: str | None = None, num: int = 8, **fields: Any) -> GenerationRequest:
    adapters = () if adapter is None else (AdapterRef(adapter),)
    values: dict[str, Any] = {"prompt_ids": PROMPT, "ignore_eos": True, "max_tokens": num}
    values.update(fields)
    sampling = values.pop("sampling", SamplingParams(temperature=0))
    return GenerationRequest(name, adapters=adapters, sampling=sampling, **values)


@asynccontextmanager
async def started(folder: Path, **settings: Any) -> AsyncIterator[EngineClient]:
    engine = make_engine(folder, **settings)
    await engine.start()
    try:
        yield engine
    finally:
        await engine.stop()


async def until(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    """Wait for a condition over the snapshot."""
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.005)


@pytest.fixture
def weights(make_adapter: MakeAdapter) -> AdapterWeights:
    return peft_weights(make_adapter(seed=1), "one")


@pytest.fixture
def other_weights(make_adapter: MakeAdapter) -> AdapterWeights:
    return peft_weights(make_adapter(seed=2, r=4), "two")


async def test_leaving_early_frees_blocks_and_slot_within_a_step(
    engine: EngineClient, weights: AdapterWeights
) -> None:
    await engine.load_adapter(weights)
    outputs = engine.generate(greedy("gone", "one", num=400))
    await anext(outputs)
    assert engine.snapshot().kv_blocks_used > 0
    before = engine.snapshot().num_steps
    await outputs.aclose()  # type: ignore[attr-defined]
    await until(lambda: engine.snapshot().kv_blocks_used == 0)
    assert engine.snapshot().num_steps - before <= 2
    assert engine.snapshot().num_running == 0
    assert engine.snapshot().adapters["one"].num_running == 0


async def test_a_cancelled_waiting_request_never_runs(tiny_base: Path) -> None:
    async with started(tiny_base, max_batch_rows=1) as engine:
        first = asyncio.create_task(collect(engine.generate(greedy("a", num=60))))
        second = asyncio.create_task(collect(engine.generate(greedy("b", num=60))))
        await until(lambda: engine.snapshot().num_waiting == 1)
        second.cancel()
        await until(lambda: engine.snapshot().num_waiting == 0)
        assert len((await first).token_ids) == 60
        assert engine.snapshot().kv_blocks_used == 0


async def test_merged_answers_equal_unmerged_ones_and_the_base_never_changes(
    tiny_base: Path, weights: AdapterWeights, other_weights: AdapterWeights
) -> None:
    recorder = Recorder()
    async with started(tiny_base, observer=recorder) as engine:
        checksum = await engine.base_checksum()
        assert checksum == engine.base.digest
        for version in (weights, other_weights):
            await engine.load_adapter(version)
        ask = greedy("q", "one", sampling=SamplingParams(temperature=0, logprobs=20))
        unmerged = await collect(engine.generate(ask))
        result = await engine.merge("one")
        assert result.merged_bytes == engine.snapshot().memory_bytes["merged"] > 0
        recorder.steps.clear()
        fresh = greedy("q", "one", sampling=ask.sampling, cache_scope="fresh")
        merged = await collect(engine.generate(fresh))
        assert {step.weights for step in recorder.steps} == {"merged"}
        assert merged.token_ids == unmerged.token_ids
        for a, b in zip(merged.logprobs, unmerged.logprobs, strict=True):
            assert dict(a.top) == pytest.approx(dict(b.top), abs=1e-4)
        mixed = await run_all(engine, [greedy("x", "one"), greedy("y", "two"), greedy("z")])
        assert mixed[0].token_ids == unmerged.token_ids
        assert await engine.base_checksum() == checksum
        assert (await engine.merge("one")).merged_bytes == result.merged_bytes
        assert (await engine.unmerge("one")).merged_bytes == result.merged_bytes
        assert (await engine.unmerge("one")).merged_bytes == 0
        assert engine.snapshot().memory_bytes["merged"] == 0
        again = await collect(engine.generate(greedy("q", "one", cache_scope="third")))
        assert again.token_ids == unmerged.token_ids
        assert await engine.base_checksum() == checksum


async def test_a_merge_beyond_the_budget_is_refused_with_the_numbers(
    tiny_base: Path, weights: AdapterWeights
) -> None:
    async with started(tiny_base, merged_bytes=1000) as engine:
        await engine.load_adapter(weights)
        with pytest.raises(MergeBudgetExceeded) as caught:
            await engine.merge("one")
        assert caught.value.ceiling_bytes == 1000
        assert caught.value.needed_bytes > 1000
        with pytest.raises(NotFound):
            await engine.merge("unknown")


async def test_unload_waits_for_running_requests_and_gives_bytes_back(
    engine: EngineClient, weights: AdapterWeights
) -> None:
    await engine.load_adapter(weights)
    running = asyncio.create_task(collect(engine.generate(greedy("r", "one", num=300))))
    await until(lambda: engine.snapshot().num_running == 1)
    unloading = asyncio.create_task(engine.unload_adapter("one"))
    await until(lambda: not engine.is_loaded("one"))
    with pytest.raises(Unavailable, match="was unloaded"):
        await collect(engine.generate(greedy("late", "one")))
    with pytest.raises(Unavailable, match="being unloaded"):
        await engine.load_adapter(weights)
    freed = await unloading
    assert freed is not None
    assert freed.host_bytes > 0
    assert freed.device_bytes > 0
    assert len((await running).token_ids) == 300
    memory = engine.snapshot().memory_bytes
    assert memory["adapter_host"] == memory["adapter_pool_used"] == 0
    assert await engine.unload_adapter("one") is None
    await engine.load_adapter(weights)
    assert len((await collect(engine.generate(greedy("r2", "one")))).token_ids) == 8


def failure_code(answer: Answer) -> str | None:
    assert answer.last is not None
    return None if answer.last.failure is None else answer.last.failure.code


def overflowing(weights: AdapterWeights) -> AdapterWeights:
    """An adapter of finite numbers whose product is not."""
    pairs = {m: LoraPair(p.lora_a * 1e20, p.lora_b * 1e18) for m, p in weights.pairs.items()}
    return AdapterWeights("huge", pairs)


async def test_a_non_finite_row_fails_alone_and_twice_is_quarantine(
    engine: EngineClient, weights: AdapterWeights
) -> None:
    await engine.load_adapter(weights)
    await engine.load_adapter(overflowing(weights))
    alone = await collect(engine.generate(greedy("alone", "one", num=20)))
    checksum = await engine.base_checksum()
    for turn in range(2):
        asks = [
            greedy(f"{name}{turn}", adapter, num=20, cache_scope=str(turn))
            for name, adapter in (("bad", "huge"), ("good", "one"), ("base", None))
        ]
        bad, good, base = await run_all(engine, asks)
        assert good.token_ids == alone.token_ids
        assert base.finish_reason == "length"
        assert failure_code(bad) == "non_finite"
    with pytest.raises(Conflict) as caught:
        await collect(engine.generate(greedy("third", "huge")))
    assert caught.value.code == "adapter_quarantined"
    assert engine.snapshot().quarantined == {"huge"}
    assert engine.snapshot().kv_blocks_used == 0
    assert await engine.base_checksum() == checksum
    await engine.unload_adapter("huge")
    assert engine.snapshot().quarantined == {"huge"}


class FaultyRunner(ModelRunner):
    """Runs out of memory above `max_tokens`, and fails outright on token `poison`."""

    max_tokens = 1 << 30
    poison = -1

    def run(
        self, rows: Sequence[ScheduledRow], merged: MergedCopy | None
    ) -> DecodeLaunch | list[Sample | None]:
        if sum(row.num_tokens for row in rows) > self.max_tokens:
            raise MemoryError
        if any(self.poison in row.sequence.token_ids for row in rows):
            raise ValueError("poison")
        return super().run(rows, merged)


def faulty_engine(
    folder: Path, pool_class: type[AdapterPool] = AdapterPool, **changes: Any
) -> tuple[Engine, FaultyRunner, list[TokenOutput]]:
    settings = EngineSettings(
        **{"dtype": "float32", "max_step_tokens": 64, "kv_cache_bytes": MIB, **changes}
    )
    base = load_base(folder, settings)
    pool = pool_class(base.layout, MIB, base.dtype, base.device)
    runner = FaultyRunner(base, pool, settings.kv_cache_bytes, 16)
    outputs: list[TokenOutput] = []
    engine = Engine(runner, settings, frozenset(), NoObserver(), outputs.extend)
    return engine, runner, outputs


def run_to_end(engine: Engine) -> None:
    step_until(engine, lambda: not (engine.scheduler.running or engine.scheduler.waiting))


def has_computed(sequence: EngineSequence, num_tokens: int) -> bool:
    return sequence.num_computed >= num_tokens


def step_until(engine: Engine, condition: Callable[[], bool]) -> None:
    """Step by hand; while nothing runs, adapters are on their way on another thread."""
    deadline_s = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline_s, "requests did not end"
        engine.step()
        if not engine.scheduler.running:
            time.sleep(0.001)


def tokens_of(outputs: list[TokenOutput], name: str) -> list[int]:
    return [token for o in outputs if o.request_id == name for token in o.token_ids]


def test_out_of_memory_shrinks_steps_and_loses_nothing(tiny_base: Path) -> None:
    answers = []
    for max_tokens in (1 << 30, 9, 1):
        engine, runner, outputs = faulty_engine(tiny_base)
        runner.max_tokens = max_tokens
        for index in range(3):
            engine.add(greedy(f"r{index}", prompt_ids=PROMPT[index:]))
        run_to_end(engine)
        assert {o.finish_reason for o in outputs} == {None, "length"}
        answers.append([tokens_of(outputs, f"r{index}") for index in range(3)])
    assert answers[0] == answers[1] == answers[2]


def test_out_of_memory_at_one_token_fails_the_largest_request(tiny_base: Path) -> None:
    engine, runner, outputs = faulty_engine(tiny_base)
    engine.add(greedy("short", num=30, prompt_ids=PROMPT[:5]))
    engine.add(greedy("long", num=30))
    engine.step()
    runner.max_tokens = 0
    for _ in range(10):
        engine.step()
        if any(o.failure for o in outputs):
            break
    failed = [o for o in outputs if o.failure]
    assert [o.request_id for o in failed] == ["long"]
    assert failed[0].failure is not None
    assert failed[0].failure.code == "out_of_memory"
    runner.max_tokens = 1 << 30
    run_to_end(engine)
    assert len(tokens_of(outputs, "short")) == 30
    assert engine.blocks.num_used == 0


def test_a_failed_step_fails_its_rows_and_the_engine_goes_on(tiny_base: Path) -> None:
    engine, runner, outputs = faulty_engine(tiny_base)
    runner.poison = 300
    engine.add(greedy("bad", prompt_ids=(5, 300, 7)))
    run_to_end(engine)
    engine.add(greedy("good"))
    run_to_end(engine)
    assert outputs[0].failure is not None
    assert outputs[0].failure.code == "step_failed"
    assert len(tokens_of(outputs, "good")) == 8
    assert engine.blocks.num_used == 0


@pytest.fixture
def nan_memory() -> Iterator[None]:
    """Fill every uninitialised tensor with NaN, as memory from a former life may be."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("nan_memory")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
async def test_what_memory_held_before_reaches_nobody(
    tiny_base: Path, weights: AdapterWeights, dtype: str
) -> None:
    """Steps of one row are padded; later batches read the scratch block behind short rows."""
    assert torch.empty(3).isnan().all()
    async with started(tiny_base, dtype=dtype) as engine:
        await engine.load_adapter(weights)
        for name in (None, "one"):
            await collect(engine.generate(greedy(f"single-{name}", name, prompt_ids=(5,), num=3)))
        asks = [
            greedy(f"r{i}", [None, "one"][i % 2], prompt_ids=PROMPT[: 1 + 7 * i]) for i in range(5)
        ]
        answers = await run_all(engine, asks)
    assert {answer.finish_reason for answer in answers} == {"length"}


def faulty_bfloat16(folder: Path, weights: AdapterWeights) -> tuple[Engine, list[TokenOutput]]:
    """An engine on padded bfloat16 paths, with an adapter whose products overflow."""
    engine, _, outputs = faulty_engine(
        folder, dtype="bfloat16", max_step_tokens=16, kv_cache_bytes=MIB // 8
    )
    base = engine.runner.base
    engine.residency.add_host(pack_adapter(overflowing(weights), base.layout, base.dtype))
    return engine, outputs


def test_non_finite_kv_of_a_request_that_left_reaches_nobody(
    tiny_base: Path, weights: AdapterWeights
) -> None:
    """Its damage shows only at the end of its prompt; it leaves before, its blocks go on."""
    engine, outputs = faulty_bfloat16(tiny_base, weights)
    prompt = tuple(3 + i % 300 for i in range(400))
    for turn in range(4):
        bad = greedy(f"bad{turn}", "huge", prompt_ids=prompt, cache_scope=str(turn))
        assert engine.residency.claim(bad) is None
        engine.add(bad)
        sequence = engine.scheduler.find(bad.request_id)
        assert sequence is not None
        step_until(engine, partial(has_computed, sequence, 320))
        assert not engine.runner.storage.keys[1].isfinite().all()
        engine.scheduler.remove(sequence)
    for index in range(12):
        ids = PROMPT[: 3 + 3 * index]
        engine.add(greedy(f"base{index}", prompt_ids=ids, num=20, cache_scope="fresh"))
    run_to_end(engine)
    ends = {o.request_id: o.finish_reason for o in outputs if o.finish_reason}
    assert ends == {f"base{index}": "length" for index in range(12)}


async def test_a_merge_that_overflows_is_refused(tiny_base: Path, weights: AdapterWeights) -> None:
    async with started(tiny_base, dtype="bfloat16") as engine:
        pairs = {m: LoraPair(p.lora_a * 1e20, p.lora_b * 1e20) for m, p in weights.pairs.items()}
        await engine.load_adapter(AdapterWeights("huge", pairs))
        with pytest.raises(Conflict, match="not finite"):
            await engine.merge("huge")
        memory = engine.snapshot().memory_bytes
        assert memory["merged"] == 0


async def test_a_cancelled_call_does_not_hurt_the_engine(engine: EngineClient) -> None:
    running = asyncio.create_task(collect(engine.generate(greedy("r", num=100))))
    await until(lambda: engine.snapshot().num_running == 1)
    for _ in range(5):
        call = asyncio.create_task(engine.base_checksum())
        await asyncio.sleep(0)
        call.cancel()
    assert len((await running).token_ids) == 100
    assert await engine.base_checksum() == engine.base.digest


async def test_after_the_stop_nobody_waits(tiny_base: Path, weights: AdapterWeights) -> None:
    engine = make_engine(tiny_base)
    await engine.start()
    await engine.load_adapter(weights)
    await engine.stop()
    with pytest.raises(Unavailable):
        await collect(engine.generate(greedy("late")))
    async with asyncio.timeout(5):
        for call in (engine.unmerge("one"), engine.base_checksum(), engine.unload_adapter("one")):
            with pytest.raises(EngineStopped):
                await call


class FullPool(AdapterPool):
    """Cannot make a slot for one adapter."""

    def reserve(
        self, *adapters: HostAdapter, evictable: Evictable | None = None
    ) -> tuple[Slot, ...] | None:
        if any(adapter.digest == "one" for adapter in adapters):
            raise MemoryError
        return super().reserve(*adapters, evictable=evictable)


class FailingPool(AdapterPool):
    """Cannot fill one adapter's slot."""

    def fill(self, slot: Slot, adapter: HostAdapter) -> None:
        if slot.digest == "one":
            raise MemoryError
        super().fill(slot, adapter)


@pytest.mark.parametrize("pool_class", [FullPool, FailingPool])
def test_slots_that_cannot_be_made_fail_their_request_alone(
    tiny_base: Path, weights: AdapterWeights, pool_class: type[AdapterPool]
) -> None:
    engine, _, outputs = faulty_engine(tiny_base, pool_class=pool_class)
    base = engine.runner.base
    engine.residency.add_host(pack_adapter(weights, base.layout, base.dtype))
    engine.residency.claim(greedy("bad", "one"))
    engine.add(greedy("bad", "one"))
    engine.add(greedy("good"))
    run_to_end(engine)
    ends = {o.request_id: o.failure and o.failure.code for o in outputs if o.finish_reason}
    assert ends == {"bad": "out_of_memory", "good": None}
    assert engine.blocks.num_used == 0


async def test_a_load_beyond_the_host_ceiling_drops_nothing(
    tiny_base: Path, weights: AdapterWeights, make_adapter: MakeAdapter
) -> None:
    async with started(tiny_base, adapter_host_bytes=100_000) as engine:
        await engine.load_adapter(weights)
        large = peft_weights(make_adapter(seed=3, r=32), "large")
        with pytest.raises(Unavailable, match="host memory"):
            await engine.load_adapter(large)
        assert engine.is_loaded("one")


async def test_ids_beyond_the_vocabulary_are_refused_wherever_they_stand(
    engine: EngineClient,
) -> None:
    biased = SamplingParams(temperature=0, logit_bias=((-1, 5.0),))
    for fields in (
        {"stop_token_ids": frozenset({-1_000_000}), "min_tokens": 4},
        {"stop_token_ids": frozenset({99_999})},
        {"sampling": biased},
    ):
        with pytest.raises(InvalidRequest, match="token ids") as caught:
            await collect(engine.generate(greedy("ids", **fields)))
        assert caught.value.code == "invalid_token_id"


def test_a_row_that_cannot_be_sampled_fails_alone(tiny_base: Path) -> None:
    engine, _, outputs = faulty_engine(tiny_base)
    broken = SamplingParams(temperature=0, logit_bias=((10**6, 1.0),))
    engine.add(greedy("bad", sampling=broken))
    engine.add(greedy("good"))
    run_to_end(engine)
    ends = {o.request_id: o.failure and o.failure.code for o in outputs if o.finish_reason}
    assert ends == {"bad": "sampling_failed", "good": None}


def test_a_small_budget_goes_round(tiny_base: Path) -> None:
    engine, runner, outputs = faulty_engine(tiny_base)
    for index in range(4):
        engine.add(greedy(f"r{index}", prompt_ids=(5 + index,), num=40))
    engine.step()
    runner.max_tokens = 1
    for _ in range(40):
        engine.step()
    counts = [len(tokens_of(outputs, f"r{index}")) for index in range(4)]
    assert max(counts) - min(counts) <= 2


async def test_same_seed_same_text_whatever_the_batch(
    engine: EngineClient, weights: AdapterWeights
) -> None:
    await engine.load_adapter(weights)
    sampling = SamplingParams(temperature=1.0, seed=11, top_p=0.95)

    def ask(name: str, choice: int = 0) -> GenerationRequest:
        return greedy(name, "one", num=24, sampling=sampling, choice=choice)

    alone = await collect(engine.generate(ask("alone")))
    mates = [greedy(f"m{i}", num=30, prompt_ids=PROMPT[i:]) for i in range(5)]
    first, second, *_ = await run_all(engine, [ask("a"), ask("b", choice=1), *mates])
    assert first.token_ids == alone.token_ids
    assert second.token_ids != alone.token_ids


async def test_prefix_reuse_and_preemption_leave_the_answer_as_it_is(
    tiny_base: Path, weights: AdapterWeights
) -> None:
    async with started(tiny_base) as engine:
        await engine.load_adapter(weights)
        cold = await collect(engine.generate(greedy("cold", "one", num=60)))
        warm = await collect(engine.generate(greedy("warm", "one", num=60)))
        assert cold.num_cached == 0
        assert warm.num_cached == 32
        assert warm.token_ids == cold.token_ids
    recorder = Recorder()
    # 2 layers x 2 x 2 heads x 16 wide x 4 bytes = 512 bytes a token: 12 blocks of 16 tokens
    small = {"kv_cache_bytes": 512 * 16 * 13, "observer": recorder}
    async with started(tiny_base, **small) as engine:
        await engine.load_adapter(weights)
        requests = [greedy(f"r{i}", "one", num=60, cache_scope=str(i)) for i in range(4)]
        answers = await run_all(engine, requests)
        assert all(answer.token_ids == cold.token_ids for answer in answers)
    assert sum(step.num_preempted for step in recorder.steps) > 0


async def test_more_adapters_than_the_pool_holds_are_served_in_turn(
    tiny_base: Path, make_adapter: MakeAdapter
) -> None:
    async with started(tiny_base, adapter_device_bytes=200_000) as engine:
        digests = [f"d{i}" for i in range(6)]
        for index, digest in enumerate(digests):
            await engine.load_adapter(peft_weights(make_adapter(seed=index, r=16), digest))
        alone = [await collect(engine.generate(greedy(d, d))) for d in digests]
        requests = [greedy(f"{d}-{i}", d) for i in range(4) for d in digests]
        answers = await run_all(engine, requests)
        for index, answer in enumerate(answers):
            assert answer.token_ids == alone[index % 6].token_ids
        memory = engine.snapshot().memory_bytes
        assert memory["adapter_pool_used"] <= memory["adapter_pool_total"] <= 200_000


async def test_what_cannot_run_is_refused_with_the_limit(
    tiny_base: Path, weights: AdapterWeights
) -> None:
    async with started(
        tiny_base, max_batch_rows=1, max_queue=1, adapter_device_bytes=20_000
    ) as engine:

        async def refused(ask: GenerationRequest) -> str:
            with pytest.raises(InvalidRequest) as caught:
                await collect(engine.generate(ask))
            return caught.value.code

        assert await refused(greedy("long", num=600)) == "context_length_exceeded"
        assert await refused(greedy("empty", prompt_ids=())) == "context_length_exceeded"
        assert await refused(greedy("id", prompt_ids=(5, 99_999))) == "invalid_token_id"
        with pytest.raises(InvalidRequest, match="adapter-device-bytes"):
            await engine.load_adapter(weights)
        tasks = [
            asyncio.create_task(collect(engine.generate(greedy(f"t{i}", num=200))))
            for i in range(2)
        ]
        await until(lambda: engine.snapshot().num_running == 1)
        with pytest.raises(QueueFull, match="max-queue"):
            await collect(engine.generate(greedy("third")))
        await asyncio.gather(*tasks)


async def test_a_mix_that_can_never_be_resident_is_refused(
    tiny_base: Path, make_adapter: MakeAdapter
) -> None:
    async with started(tiny_base, adapter_device_bytes=500_000) as engine:
        for index in range(2):
            await engine.load_adapter(peft_weights(make_adapter(seed=index, r=32), f"m{index}"))
        both = (AdapterRef("m0"), AdapterRef("m1"))
        with pytest.raises(InvalidRequest, match="adapter-device-bytes") as caught:
            await collect(engine.generate(GenerationRequest("mix", PROMPT, both)))
        assert caught.value.code == "mix_too_large"
        assert len((await collect(engine.generate(greedy("one", "m0")))).token_ids) == 8


async def test_stop_tokens_end_an_answer_and_min_tokens_delays_them(engine: EngineClient) -> None:
    free = await collect(engine.generate(greedy("free", num=30)))
    stop = free.token_ids[4]
    first = free.token_ids.index(stop)
    answer = await collect(
        engine.generate(greedy("stop", num=30, stop_token_ids=frozenset({stop})))
    )
    assert answer.token_ids == free.token_ids[: first + 1]
    assert answer.finish_reason == "stop"
    assert answer.last is not None
    assert answer.last.stop_token_id == stop
    delayed = await collect(
        engine.generate(greedy("min", num=30, stop_token_ids=frozenset({stop}), min_tokens=20))
    )
    assert len(delayed.token_ids) > 20
    assert stop not in delayed.token_ids[:20]


async def test_stopping_the_engine_ends_every_request(tiny_base: Path) -> None:
    engine = make_engine(tiny_base, max_batch_rows=1)
    await engine.start()
    tasks: list[Awaitable[Any]] = [
        asyncio.create_task(collect(engine.generate(greedy(f"t{i}", num=400)))) for i in range(3)
    ]
    await until(lambda: engine.snapshot().num_running == 1)
    await engine.stop()
    answers = await asyncio.wait_for(asyncio.gather(*tasks), 5)
    assert {answer.finish_reason for answer in answers} == {"abort"}
    assert not engine.snapshot().is_alive


async def test_steps_mix_distinct_adapters(
    tiny_base: Path, weights: AdapterWeights, other_weights: AdapterWeights
) -> None:
    recorder = Recorder()
    async with started(tiny_base, observer=recorder, kv_cache_bytes=8 * MIB) as engine:
        for version in (weights, other_weights):
            await engine.load_adapter(version)
        asks = [greedy(f"r{i}", [None, "one", "two"][i % 3], num=100) for i in range(9)]
        await run_all(engine, asks)
    assert max(step.num_adapters for step in recorder.steps) == 2
    assert max(step.num_rows for step in recorder.steps) == 9
    assert {"prefill", "decode"} <= {step.kind for step in recorder.steps}
    assert torch.is_tensor(weights.pairs["model.layers.0.self_attn.q_proj"].lora_a)
