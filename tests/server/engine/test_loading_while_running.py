"""Adapters come to the device while steps run: nobody else waits, and nobody sees them half."""

import asyncio
import random
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from quickchange_adapters.host_adapter import HostAdapter, pack_adapter
from quickchange_adapters.pool import AdapterPool, Slot
from quickchange_adapters.weights import AdapterWeights
from quickchange_server.engine.client import EngineClient
from quickchange_server.engine.engine import Engine
from quickchange_server.engine.request import AdapterRef, GenerationRequest
from quickchange_server.errors import Unavailable

from tests.conftest import MakeAdapter
from tests.server.engine.conftest import Answer, collect, peft_weights
from tests.server.engine.test_engine import (
    PROMPT,
    faulty_engine,
    greedy,
    run_to_end,
    started,
    step_until,
    tokens_of,
    until,
)

NUM_TOKENS = 40


class SlowPool(AdapterPool):
    """Writes half of what is to be written, as large as numbers are, and goes on when it may."""

    may_go_on = threading.Event()

    def fill(self, slot: Slot, adapter: HostAdapter) -> None:
        for kind, rows in slot.ranges.items():
            arena = self.arenas[kind]
            half = slice(rows.start, rows.start + rows.num_rows // 2)
            for tensor in (arena.lora_a, arena.lora_b):
                tensor[:, half] = torch.finfo(tensor.dtype).max
        assert self.may_go_on.wait(60)
        super().fill(slot, adapter)


def engine_with_a_hole(folder: Path, names: dict[str, AdapterWeights], dtype: str) -> Engine:
    """Two adapters on the device and room for a third between them."""
    engine, _, outputs = faulty_engine(folder, SlowPool, dtype=dtype)
    base, pool = engine.runner.base, engine.runner.pool
    for name in ("left", "cold", "right"):
        adapter = pack_adapter(names[name], base.layout, base.dtype)
        engine.residency.add_host(adapter)
        (slot,) = pool.reserve(adapter) or ()
        AdapterPool.fill(pool, slot, adapter)
        pool.publish(slot)
        pool.release(slot)
    pool.evict("cold")
    engine.outputs = outputs  # type: ignore[attr-defined]
    return engine


def submit(engine: Engine, *requests: GenerationRequest) -> None:
    for request in requests:
        assert engine.residency.claim(request) is None
        engine.add(request)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_streams_go_on_and_say_the_same_while_an_adapter_is_half_copied(
    tiny_base: Path, make_adapter: MakeAdapter, dtype: str
) -> None:
    names = {
        name: peft_weights(make_adapter(seed=seed), name)
        for seed, name in enumerate(("left", "cold", "right"))
    }
    streams = [greedy(name, name, num=NUM_TOKENS) for name in ("left", "right")]
    streams.append(greedy("base", num=NUM_TOKENS))
    SlowPool.may_go_on.set()
    alone = engine_with_a_hole(tiny_base, names, dtype)
    submit(alone, *streams)
    run_to_end(alone)
    submit(alone, greedy("cold", "cold"))
    run_to_end(alone)

    SlowPool.may_go_on.clear()
    engine = engine_with_a_hole(tiny_base, names, dtype)
    outputs = engine.outputs  # type: ignore[attr-defined]
    submit(engine, greedy("cold", "cold"), *streams)
    step_until(engine, lambda: len(tokens_of(outputs, "base")) == NUM_TOKENS)
    taken = engine.runner.pool._slots["cold"].ranges
    for kind, rows in taken.items():  # it lies inside of the window that the others read
        assert 0 < rows.start < engine.runner.pool.arenas[kind].num_active_rows - rows.num_rows
    assert tokens_of(outputs, "cold") == []
    SlowPool.may_go_on.set()
    run_to_end(engine)
    for name in ("left", "right", "base", "cold"):
        assert tokens_of(outputs, name)
        assert tokens_of(outputs, name) == tokens_of(alone.outputs, name)  # type: ignore[attr-defined]


ADAPTERS = tuple(f"a{index}" for index in range(6))
MIXES = [("a0", "a1"), ("a2", "a3", "a4"), ("a5", "a0"), ("a1", "a2"), *((a,) for a in ADAPTERS)]


def asked(name: str, mix: tuple[str, ...], num_tokens: int) -> GenerationRequest:
    refs = tuple(AdapterRef(digest, 1.0 if len(mix) == 1 else 0.5) for digest in mix)
    return GenerationRequest(
        name, PROMPT, refs, max_tokens=num_tokens, ignore_eos=True, sampling=greedy("").sampling
    )


async def load_all(engine: EngineClient, make_adapter: MakeAdapter) -> None:
    for index, name in enumerate(ADAPTERS):
        rank = 8 * (1 + index % 2)
        await engine.load_adapter(peft_weights(make_adapter(seed=index, r=rank), name))


async def test_all_get_their_answers_when_every_slot_is_wanted(
    tiny_base: Path, make_adapter: MakeAdapter
) -> None:
    """Rows for three or four of six adapters, and mixes of up to three that hold all or nothing."""
    async with started(tiny_base) as engine:
        await load_all(engine, make_adapter)
        alone = {mix: await collect(engine.generate(asked("x", mix, 12))) for mix in MIXES}
        device_bytes = engine.snapshot().memory_bytes["adapter_pool_used"]
    rng, names = random.Random(6), iter(range(1000))

    async with started(
        tiny_base, adapter_device_bytes=device_bytes * 2 // 3, max_batch_rows=5
    ) as engine:
        await load_all(engine, make_adapter)

        async def ask(num_rounds: int) -> None:
            for _ in range(num_rounds):
                mix, num_tokens = rng.choice(MIXES), rng.randint(1, 12)
                request = asked(f"r{next(names)}", mix, num_tokens)
                answer = await collect(engine.generate(request))
                assert answer.token_ids == alone[mix].token_ids[:num_tokens]

        async def leave_early() -> None:
            for _ in range(8):
                request = asked(f"r{next(names)}", rng.choice(MIXES), 200)
                leaving = asyncio.create_task(collect(engine.generate(request)))
                await asyncio.wait([leaving], timeout=0.05)
                leaving.cancel()

        async with asyncio.timeout(120):
            await asyncio.gather(*(ask(6) for _ in range(16)), leave_early())
        pool = engine._engine.runner.pool
        pool.check_integrity()
        assert pool.num_evictions > 5
        assert all(slot.num_references == 0 for slot in pool.slots)


async def test_a_waiting_request_s_adapter_is_brought_to_the_device_before_its_turn(
    tiny_base: Path, make_adapter: MakeAdapter
) -> None:
    async with started(tiny_base, max_batch_rows=1) as engine:
        for index, name in enumerate(("running", "next")):
            await engine.load_adapter(peft_weights(make_adapter(seed=index), name))
        first = asyncio.create_task(collect(engine.generate(greedy("r0", "running", num=400))))
        await until(lambda: engine.snapshot().num_running == 1)
        second = asyncio.create_task(collect(engine.generate(greedy("r1", "next"))))
        await until(lambda: engine.snapshot().adapters["next"].device_bytes > 0)
        assert not first.done()
        assert engine.snapshot().num_waiting == 1
        first.cancel()
        answer: Answer = await second
        assert answer.finish_reason == "length"


async def test_a_hint_for_which_the_device_has_no_memory_is_told_to_try_again(
    tiny_base: Path, make_adapter: MakeAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(pool: AdapterPool, slot: Slot, adapter: HostAdapter) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    async with started(tiny_base) as engine:
        await engine.load_adapter(peft_weights(make_adapter(), "large"))
        monkeypatch.setattr(AdapterPool, "fill", fail)
        with pytest.raises(Unavailable) as refused:
            await engine.activate("large")
        assert refused.value.code == "adapter_memory"
        monkeypatch.undo()
        assert await engine.activate("large")


@pytest.mark.parametrize("is_unseen", [False, True])
def test_an_engine_that_dies_in_disorder_still_answers_everybody(
    tiny_base: Path, is_unseen: bool
) -> None:
    engine, _, outputs = faulty_engine(tiny_base)
    ended = threading.Event()
    engine._on_exit = ended.set
    submit(engine, GenerationRequest("r", PROMPT, max_tokens=4))
    engine.snapshot = replace(engine.snapshot, is_alive=True)
    engine.scheduler.remove = engine.scheduler.schedule = broken  # type: ignore[method-assign]
    if is_unseen:  # not even a snapshot can be made any more
        engine.residency.describe_all = broken  # type: ignore[method-assign]
    with pytest.raises(KeyError):
        engine._run()
    assert [(each.request_id, each.finish_reason) for each in outputs] == [("r", "abort")]
    assert ended.is_set()
    assert not engine.snapshot.is_alive
    with pytest.raises(Unavailable, match="the engine has stopped"):
        engine.call(lambda: None).result(0)


def broken(*args: object, **kwargs: object) -> Any:
    raise KeyError("a mistake of ours")
