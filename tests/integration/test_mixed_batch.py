"""Sixteen clients over the base and eight adapters share their steps, and the metric shows it."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest_asyncio
from prometheus_client.parser import text_string_to_metric_families
from quickchange_server.api.app import create_app

from tests.conftest import MakeAdapter
from tests.server.conftest import serve_in_process
from tests.server.real_services import real_services

NUM_CLIENTS, NUM_ADAPTERS = 16, 8


@pytest_asyncio.fixture
async def client(tiny_base: Path, tmp_path: Path) -> AsyncIterator[httpx.AsyncClient]:
    async for each in serve_in_process(create_app(real_services(tiny_base, tmp_path))):
        yield each


async def upload(client: httpx.AsyncClient, name: str, folder: Path) -> None:
    files = {
        "adapter_config": (folder / "adapter_config.json").read_bytes(),
        "adapter_model": (folder / "adapter_model.safetensors").read_bytes(),
    }
    answer = await client.post("/v1/adapters", data={"name": name}, files=files)
    assert answer.status_code == 201, answer.text


async def complete(client: httpx.AsyncClient, model: str) -> str:
    body = {"model": model, "prompt": "the quick brown fox", "max_tokens": 40, "temperature": 0}
    answer = await client.post("/v1/completions", json={**body, "ignore_eos": True})
    assert answer.status_code == 200, answer.text
    text: str = answer.json()["choices"][0]["text"]
    return text


async def num_steps(client: httpx.AsyncClient) -> tuple[float, float]:
    """All steps so far, and those with at most two distinct adapters, from the histogram."""
    await asyncio.sleep(0.3)  # /metrics is rendered at most four times a second
    text = (await client.get("/metrics")).text
    counts = {
        float(sample.labels["le"]): sample.value
        for family in text_string_to_metric_families(text)
        if family.name == "quickchange_batch_adapters"
        for sample in family.samples
        if sample.name.endswith("_bucket")
    }
    return counts[float("inf")], counts[2.0]


async def test_most_steps_hold_three_adapters_or_more(
    client: httpx.AsyncClient, make_adapter: MakeAdapter
) -> None:
    names = [f"task-{index}" for index in range(NUM_ADAPTERS)]
    for index, name in enumerate(names):
        await upload(client, name, make_adapter(seed=index, r=4))
    models = ["tiny", *names]
    alone = {model: await complete(client, model) for model in models}
    all_before, few_before = await num_steps(client)
    asked = [models[index % len(models)] for index in range(NUM_CLIENTS)]
    for _ in range(3):
        answers = await asyncio.gather(*(complete(client, model) for model in asked))
        assert answers == [alone[model] for model in asked]
    all_after, few_after = await num_steps(client)
    assert few_after - few_before < 0.5 * (all_after - all_before)
    assert len(set(alone.values())) == len(models)
