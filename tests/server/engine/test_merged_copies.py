"""Merged copies against their adapters unmerged and PEFT, several at once; the base stays.

`QUICKCHANGE_BASE_OPERATIONS=1000 pytest tests/server/engine/test_merged_copies.py` is the long form
of the last test.
"""

import asyncio
import os
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from quickchange_adapters.errors import MergeBudgetExceeded
from quickchange_adapters.weights import AdapterWeights
from quickchange_server.engine.client import EngineClient
from quickchange_server.engine.request import AdapterRef, GenerationRequest, SamplingParams
from quickchange_server.errors import NotFound, Unavailable

from tests.conftest import MakeAdapter
from tests.server.engine.conftest import Recorder, collect, make_engine, peft_weights, run_all
from tests.server.engine.test_engine_peft import (
    ADAPTERS,
    VOCAB,
    Oracle,
    full_logprobs,
    load_all,
    prompt_of,
    request,
)

NUM_OPERATIONS = int(os.environ.get("QUICKCHANGE_BASE_OPERATIONS", "1000"))
NUM_TOKENS = 8


@pytest.fixture(scope="module")
def folders(make_adapter: MakeAdapter) -> list[Path]:
    return [make_adapter(seed=i, **config) for i, config in enumerate(ADAPTERS)]


@pytest.fixture(scope="module")
def oracle(tiny_base: Path, folders: list[Path]) -> Oracle:
    return Oracle(tiny_base, folders)


async def test_merged_logits_equal_unmerged_and_pefts_and_greedy_tokens_too(
    tiny_base: Path, folders: list[Path], oracle: Oracle
) -> None:
    recorder = Recorder()
    engine = make_engine(tiny_base, observer=recorder)
    await engine.start()
    try:
        digests = await load_all(engine, folders)
        for index, digest in enumerate(digests):
            prompt = prompt_of(70 + index, 300 + index)
            asked = request("u", prompt, digest, NUM_TOKENS, VOCAB)
            unmerged = await collect(engine.generate(asked))
            await engine.merge(digest)
            recorder.steps.clear()
            # another scope, else the prompt's KV would be that of the unmerged run
            merged = await collect(engine.generate(_fresh(asked, "merged")))
            assert {step.weights for step in recorder.steps} == {"merged"}
            await engine.unmerge(digest)
            expected = oracle.logprobs(index, [*prompt, *merged.token_ids[:-1]])
            assert merged.token_ids == unmerged.token_ids
            assert merged.token_ids == oracle.generate(index, prompt, NUM_TOKENS)
            close = partial(torch.testing.assert_close, atol=1e-4, rtol=0)
            close(full_logprobs(merged), full_logprobs(unmerged))
            close(full_logprobs(merged), expected[len(prompt) - 1 :])
    finally:
        await engine.stop()


async def test_several_adapters_are_merged_at_once_beside_others_and_mixes(
    tiny_base: Path, folders: list[Path], oracle: Oracle
) -> None:
    recorder = Recorder()
    engine = make_engine(tiny_base, observer=recorder, merged_bytes=8 << 20)
    await engine.start()
    try:
        digests = await load_all(engine, folders)
        copies = [await engine.merge(digests[index]) for index in (0, 2, 6)]
        sizes = [copy.merged_bytes for copy in copies]
        assert engine.snapshot().memory_bytes["merged"] == sum(sizes)
        prompt = prompt_of(30, 4)
        wanted = [oracle.generate(index, prompt, NUM_TOKENS) for index in range(len(folders))]
        for index in (0, 2, 6):
            recorder.steps.clear()
            asked = request(f"alone-{index}", prompt, digests[index], NUM_TOKENS, None)
            assert (await collect(engine.generate(asked))).token_ids == wanted[index]
            assert {step.weights for step in recorder.steps} == {"merged"}
        mix = (AdapterRef(digests[0], 0.5), AdapterRef(digests[2], -0.5))
        asks = [request(f"r{i}", prompt, d, NUM_TOKENS, None) for i, d in enumerate(digests)]
        mixed = GenerationRequest("mix", prompt, mix, SamplingParams(temperature=0), NUM_TOKENS)
        *answers, _ = await run_all(engine, [*asks, mixed])
        assert [answer.token_ids for answer in answers] == wanted
        assert (await engine.unmerge(digests[2])).merged_bytes == sizes[1]
        assert engine.snapshot().memory_bytes["merged"] == sizes[0] + sizes[2]
        assert await engine.base_checksum() == engine.base.digest
    finally:
        await engine.stop()


async def test_the_base_is_the_same_after_random_merges_unmerges_loads_and_mixes_under_traffic(
    tiny_base: Path, folders: list[Path]
) -> None:
    engine = make_engine(tiny_base, merged_bytes=1_000_000, max_batch_rows=8)
    await engine.start()
    try:
        digests = await load_all(engine, folders)
        checksum = await engine.base_checksum()
        changes = _Changes(engine, folders, digests)
        traffic = [asyncio.create_task(changes.ask_for_ever(worker)) for worker in range(3)]
        for number in range(NUM_OPERATIONS):
            await changes.do_one()
            if number % 40 == 0:
                assert await engine.base_checksum() == checksum
        for task in traffic:
            task.cancel()
        ended = await asyncio.gather(*traffic, return_exceptions=True)
        assert all(isinstance(each, asyncio.CancelledError) for each in ended), ended
        assert await engine.base_checksum() == checksum == engine.base.digest
    finally:
        await engine.stop()
    print(dict(changes.counts))
    assert min(changes.counts[kind] for kind in ("merge", "unmerge", "load", "mix")) > 0
    assert changes.num_answers > 0


class _Changes:
    """Random operations on one engine, and requests beside them."""

    def __init__(self, engine: EngineClient, folders: Sequence[Path], digests: list[str]) -> None:
        self._engine = engine
        self._weights = [peft_weights(f, d) for f, d in zip(folders, digests, strict=True)]
        self._random = random.Random(11)
        self.counts: Counter[str] = Counter()
        self.num_answers = 0
        self._next_id = 0

    async def do_one(self) -> None:
        kind = self._random.choice(["merge", "merge", "unmerge", "load", "unload", "mix"])
        weights = self._random.choice(self._weights)
        try:
            if kind == "load":
                await self._engine.load_adapter(weights)
            elif kind == "mix":
                await self._ask(self._random.sample(self._weights, 3))
            elif kind == "unload":
                await self._engine.unload_adapter(weights.digest)
            else:
                await getattr(self._engine, kind)(weights.digest)
        except (NotFound, Unavailable, MergeBudgetExceeded) as error:
            kind = type(error).__name__
        self.counts[kind] += 1

    async def ask_for_ever(self, worker: int) -> None:
        while True:
            try:
                await self._ask(self._random.choices(self._weights, k=worker % 2))
            except Unavailable:  # unloaded in between
                await asyncio.sleep(0)

    async def _ask(self, parts: list[AdapterWeights]) -> None:
        self._next_id += 1
        number = self._next_id  # others ask while this one loads
        refs = []
        for part in parts:
            await self._engine.load_adapter(part)
            refs.append(AdapterRef(part.digest, self._random.uniform(-2, 2)))
        prompt = prompt_of(self._random.randint(1, 60), number)
        sampling = SamplingParams(temperature=0)
        asked = GenerationRequest(f"c{number}", prompt, tuple(refs), sampling, 4)
        answer = await collect(self._engine.generate(asked))
        assert answer.finish_reason in ("length", "stop"), answer.last
        self.num_answers += 1


def _fresh(asked: GenerationRequest, scope: str) -> GenerationRequest:
    return replace(asked, request_id=f"{asked.request_id}-{scope}", cache_scope=scope)
