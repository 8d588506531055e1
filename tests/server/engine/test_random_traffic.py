"""Random traffic on the tiny model against answers computed alone: the short form of a soak.

`QUICKCHANGE_SOAK_S=3600 pytest tests/server/engine/test_random_traffic.py` is the long form.
"""

import asyncio
import os
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from quickchange_adapters.errors import MergeBudgetExceeded
from quickchange_adapters.weights import AdapterWeights
from quickchange_server.engine.client import EngineClient
from quickchange_server.engine.request import AdapterRef, GenerationRequest, SamplingParams
from quickchange_server.errors import NotFound, Unavailable

from tests.conftest import LLAMA_LINEARS, MakeAdapter
from tests.server.engine.conftest import collect, make_engine, peft_weights

SOAK_S = float(os.environ.get("QUICKCHANGE_SOAK_S", "8"))
NUM_ADAPTERS, NUM_PROMPTS, MAX_TOKENS = 6, 5, 24
RANKS = (1, 4, 8, 12, 24, 40)
Mix = tuple[tuple[int, float], ...]
MIXES: list[Mix] = [
    (),
    *(((index, 1.0),) for index in range(NUM_ADAPTERS)),
    ((0, 0.5), (2, -0.25)),
    ((1, 1.0), (3, 0.5), (4, 0.25), (5, 2.0)),
]


@dataclass
class Soak:
    """One run: the engine under test, the oracle's answers, and what has happened."""

    engine: EngineClient
    weights: list[AdapterWeights]
    prompts: list[tuple[int, ...]]
    expected: dict[tuple[int, int], list[int]] = field(default_factory=dict)
    rng: random.Random = field(default_factory=lambda: random.Random(7))
    next_id: int = 0
    counts: dict[str, int] = field(default_factory=dict)

    def ask(self, mix: int, prompt: int, num_tokens: int = MAX_TOKENS) -> GenerationRequest:
        self.next_id += 1
        refs = tuple(AdapterRef(self.weights[i].digest, w) for i, w in MIXES[mix])
        return GenerationRequest(
            f"r{self.next_id}",
            self.prompts[prompt],
            refs,
            SamplingParams(temperature=0),
            max_tokens=num_tokens,
            ignore_eos=True,
            cache_scope=self.rng.choice(["", "a", "b"]),
        )

    async def generate(self) -> str:
        mix, prompt = self.rng.randrange(len(MIXES)), self.rng.randrange(NUM_PROMPTS)
        num_tokens = self.rng.randint(1, MAX_TOKENS)
        try:
            for index, _ in MIXES[mix]:
                await self.engine.load_adapter(self.weights[index])
            answer = await collect(self.engine.generate(self.ask(mix, prompt, num_tokens)))
        except Unavailable as error:
            return error.code
        assert answer.token_ids == self.expected[(mix, prompt)][:num_tokens]
        return "answered"

    async def cancel(self) -> str:
        outputs = self.engine.generate(self.ask(0, self.rng.randrange(NUM_PROMPTS), 200))
        for _ in range(self.rng.randint(1, 5)):
            await anext(outputs)
        await outputs.aclose()  # type: ignore[attr-defined]
        return "cancelled"

    async def merge(self) -> str:
        weights = self.rng.choice(self.weights)
        try:
            await self.engine.merge(weights.digest)
        except (NotFound, MergeBudgetExceeded) as error:
            return type(error).__name__
        return "merged"

    async def unmerge(self) -> str:
        await self.engine.unmerge(self.rng.choice(self.weights).digest)
        return "unmerged"

    async def unload(self) -> str:
        await self.engine.unload_adapter(self.rng.choice(self.weights).digest)
        return "unloaded"

    async def worker(self, deadline: float) -> None:
        operations: list[Callable[[], Awaitable[str]]] = [
            *([self.generate] * 16),
            *([self.cancel] * 4),
            self.merge,
            self.unmerge,
            self.unload,
        ]
        while time.monotonic() < deadline:
            outcome = await self.rng.choice(operations)()
            self.counts[outcome] = self.counts.get(outcome, 0) + 1
            snapshot = self.engine.snapshot()
            assert snapshot.kv_blocks_used <= snapshot.kv_blocks_total
            memory = snapshot.memory_bytes
            assert memory["adapter_pool_used"] <= memory["adapter_pool_total"]

    async def check_at_rest(self) -> None:
        snapshot = self.engine.snapshot()
        assert snapshot.num_running == snapshot.num_waiting == snapshot.kv_blocks_used == 0
        assert all(not adapter.num_running for adapter in snapshot.adapters.values())
        assert await self.engine.base_checksum() == self.engine.base.digest
        for weights in self.weights:
            await self.engine.unload_adapter(weights.digest)
        memory = self.engine.snapshot().memory_bytes
        assert memory["adapter_pool_used"] == memory["adapter_host"] == memory["merged"] == 0


async def expected_answers(base: Path, soak: Soak) -> dict[tuple[int, int], list[int]]:
    """Every mix and prompt, each alone in an engine with room for everything."""
    engine = make_engine(base)
    await engine.start()
    for weights in soak.weights:
        await engine.load_adapter(weights)
    answers = {}
    for mix in range(len(MIXES)):
        for prompt in range(NUM_PROMPTS):
            answer = await collect(engine.generate(soak.ask(mix, prompt)))
            answers[(mix, prompt)] = answer.token_ids
    await engine.stop()
    return answers


async def test_random_traffic_gives_the_answers_that_requests_get_alone(
    tiny_base: Path, make_adapter: MakeAdapter
) -> None:
    targets = list(LLAMA_LINEARS)
    weights = [
        peft_weights(make_adapter(seed=i, r=rank, target_modules=targets[i % 3 :]), f"w{i}")
        for i, rank in enumerate(RANKS)
    ]
    rng = random.Random(3)
    prompts = [tuple(rng.randrange(3, 381) for _ in range(length)) for length in (1, 7, 16, 33, 90)]
    # 24 blocks of 16 tokens at 512 bytes a token; a pool of 88 rank rows for 112 of adapters
    engine = make_engine(
        tiny_base,
        kv_cache_bytes=512 * 16 * 25,
        adapter_device_bytes=830_000,
        merged_bytes=700_000,
        max_batch_rows=6,
        max_step_tokens=40,
    )
    soak = Soak(engine, weights, prompts)
    soak.expected = await expected_answers(tiny_base, soak)
    await engine.start()
    process = psutil.Process()
    try:
        deadline = time.monotonic() + SOAK_S
        await soak.worker(min(deadline, time.monotonic() + 1))
        before = process.memory_info().rss
        async with asyncio.timeout(SOAK_S + 60):
            await asyncio.gather(*(soak.worker(deadline) for _ in range(12)))
        await soak.check_at_rest()
        growth = process.memory_info().rss - before
    finally:
        await engine.stop()
    print(f"{soak.counts}, resident memory grew by {growth >> 20} MiB")
    known = {"answered", "cancelled", "merged", "unmerged", "unloaded"}
    refused = {"adapter_not_loaded", "adapter_memory", "NotFound", "MergeBudgetExceeded"}
    assert set(soak.counts) <= known | refused
    assert soak.counts.get("answered", 0) > 20
    assert growth < 200 << 20
