"""A name is moved back and forth while requests run: every answer is wholly of one version.

Also while its versions are merged and unmerged: no copy ever serves another version's requests."""

import asyncio
import itertools
import json
import random
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio
from quickchange_server.api.app import create_app

from tests.conftest import MakeAdapter
from tests.server.real_services import real_services
from tests.server.socket_server import serve_on_socket
from tests.server.test_api_adapters import push

SHARED = "the quick brown fox jumps over the lazy dog. a base stays resident while "
PROMPTS = tuple(SHARED + ending for ending in ("adapters are", "the fox", "reviews are"))
NUM_TOKENS = 12
NUM_WORKERS, NUM_REQUESTS = 5, 14
DIGEST = "x-quickchange-adapter-digest"

Tokens = tuple[str, ...]
Expected = dict[tuple[str, str], Tokens]
"""By digest and prompt, the tokens that a request alone gets."""


@pytest_asyncio.fixture
async def client(
    tiny_base: Path, tmp_path: Path, make_adapter: MakeAdapter
) -> AsyncIterator[httpx.AsyncClient]:
    """Return a client of a server on a socket, with two versions of `ada`."""
    services = real_services(tiny_base, tmp_path)
    async with serve_on_socket(create_app(services)) as client:
        for seed in (1, 2):
            assert (await push(client, make_adapter(seed=seed))).status_code == 201
        yield client


def body_of(model: str, prompt: str, **fields: Any) -> dict[str, Any]:
    settings = {"temperature": 0, "max_tokens": NUM_TOKENS, "ignore_eos": True, "logprobs": 1}
    return {"model": model, "prompt": prompt, **settings, **fields}


async def plain(
    client: httpx.AsyncClient, model: str, prompt: str, **fields: Any
) -> tuple[str, Tokens]:
    answer = await client.post("/v1/completions", json=body_of(model, prompt, **fields))
    assert answer.status_code == 200, answer.text
    return answer.headers[DIGEST], tokens_of(answer.json())


async def streamed(client: httpx.AsyncClient, model: str, prompt: str) -> tuple[str, Tokens]:
    body = body_of(model, prompt, stream=True)
    async with client.stream("POST", "/v1/completions", json=body) as answer:
        assert answer.status_code == 200
        lines = [line async for line in answer.aiter_lines() if line.startswith("data: ")]
    assert lines.pop() == "data: [DONE]"
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines]
    return answer.headers[DIGEST], tuple(token for chunk in chunks for token in tokens_of(chunk))


def tokens_of(body: Any) -> Tokens:
    logprobs = body["choices"][0]["logprobs"]
    return () if logprobs is None else tuple(logprobs["tokens"])


async def answers_alone(client: httpx.AsyncClient) -> Expected:
    """Ask for each version by its number, one request at a time, none sharing KV with another."""
    expected: Expected = {}
    for number in (1, 2):
        for index, prompt in enumerate(PROMPTS):
            salt = f"alone-{number}-{index}"
            digest, tokens = await plain(client, f"ada:{number}", prompt, cache_salt=salt)
            assert len(tokens) == NUM_TOKENS
            expected[digest, prompt] = tokens
    return expected


async def move_back_and_forth(client: httpx.AsyncClient, moves: Counter[int]) -> None:
    version = 1
    while True:
        version = 3 - version
        answer = await client.put("/v1/adapters/ada/aliases/default", json={"version": version})
        assert answer.status_code == 200, answer.text
        moves[version] += 1
        await asyncio.sleep(0.005)


async def merge_and_unmerge(client: httpx.AsyncClient, merges: Counter[str]) -> None:
    """Merge a version and take it back, then the other one, again and again."""
    for step in itertools.count():
        verb, version = ("merge", "unmerge")[step % 2], step // 2 % 2 + 1
        answer = await client.post(f"/v1/adapters/ada/{verb}", json={"version": version})
        assert answer.status_code == 200, answer.text
        merges[verb] += 1
        await asyncio.sleep(0.02)


@pytest.mark.parametrize("is_merging", [False, True], ids=["unmerged", "merged"])
async def test_every_answer_is_wholly_of_the_version_that_its_header_names(
    client: httpx.AsyncClient, is_merging: bool
) -> None:
    expected = await answers_alone(client)
    digests = {digest for digest, _ in expected}
    assert len(digests) == 2
    assert len(set(expected.values())) == len(expected)  # else a mix-up would not show
    answered: Counter[str] = Counter()
    moves: Counter[int] = Counter()
    merges: Counter[str] = Counter()

    async def work(worker: int) -> None:
        chosen = random.Random(worker)
        for index in range(NUM_REQUESTS):
            prompt = chosen.choice(PROMPTS)
            ask = plain if (worker + index) % 2 else streamed
            digest, tokens = await ask(client, "ada", prompt)
            assert tokens == expected[digest, prompt], (ask.__name__, digest)
            answered[digest] += 1

    changing = [asyncio.create_task(move_back_and_forth(client, moves))]
    if is_merging:
        changing.append(asyncio.create_task(merge_and_unmerge(client, merges)))
    try:
        async with asyncio.TaskGroup() as workers:
            for worker in range(NUM_WORKERS):
                workers.create_task(work(worker))
    finally:
        for task in changing:
            task.cancel()
        ended = await asyncio.gather(*changing, return_exceptions=True)
        assert all(isinstance(each, asyncio.CancelledError) for each in ended), ended
    assert answered.keys() == digests
    assert sum(answered.values()) == NUM_WORKERS * NUM_REQUESTS
    assert min(moves.values()) > 5
    metrics = (await client.get("/metrics")).text
    assert (merges["unmerge"] > 0) == is_merging
    assert ('steps_total{weights="merged"} 0.0' not in metrics) == is_merging
    hits = metrics.partition("\nquickchange_prefix_cache_hits_total ")[2].partition("\n")[0]
    assert float(hits) > 0  # KV was shared, within a version
    print(f"{dict(answered)} over {sum(moves.values())} moves; {hits} prompt tokens reused")
