"""Streams and leaving clients over a real socket, with a scripted and with a real engine."""

import asyncio
import time
from collections.abc import Callable
from pathlib import Path

import httpx
from quickchange_server.api.app import AppServices, create_app
from quickchange_server.engine.interface import GenerationEngine

from tests.conftest import MakeAdapter
from tests.server.real_services import real_services
from tests.server.scripted_engine import ScriptedEngine
from tests.server.socket_server import serve_on_socket
from tests.server.sse import chunks_of

Say = Callable[[str], None]
BODY = {"model": "tiny", "prompt": "the", "max_tokens": 400, "ignore_eos": True}


async def wait_until(condition: Callable[[], bool], seconds: float = 5.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        await asyncio.sleep(0.005)


async def test_tokens_arrive_one_by_one(
    services: AppServices, scripted_engine: ScriptedEngine, say: Say
) -> None:
    say("the quick brown fox jumps")
    scripted_engine.step_s = 0.05
    arrivals = []
    async with (
        serve_on_socket(create_app(services)) as client,
        client.stream("POST", "/v1/completions", json={**BODY, "stream": True}) as answer,
    ):
        async for line in answer.aiter_lines():
            if line:
                arrivals.append(time.monotonic())
    assert len(arrivals) >= 6
    assert arrivals[-2] - arrivals[0] > 0.15


async def test_leaving_a_stream_aborts_every_choice(
    services: AppServices, scripted_engine: ScriptedEngine
) -> None:
    scripted_engine.pause_after = 1
    async with serve_on_socket(create_app(services)) as client:
        body = {**BODY, "prompt": "the lazy dog", "stream": True, "n": 3}
        async with client.stream("POST", "/v1/completions", json=body) as answer:
            await anext(answer.aiter_lines())
            assert len(scripted_engine.live) == 3
        await wait_until(lambda: not scripted_engine.live)
        text = (await client.get("/metrics")).text
    assert len(scripted_engine.aborted) == 3
    assert 'quickchange_requests_total{outcome="cancelled"} 1.0' in text


async def test_leaving_a_whole_answer_aborts_it(
    services: AppServices, scripted_engine: ScriptedEngine
) -> None:
    scripted_engine.pause_after = 0
    async with serve_on_socket(create_app(services)) as client:
        asking = asyncio.create_task(client.post("/v1/completions", json=BODY))
        await wait_until(lambda: bool(scripted_engine.live))
        asking.cancel()
        await wait_until(lambda: not scripted_engine.live)
    assert len(scripted_engine.aborted) == 1


async def test_leaving_frees_the_real_engine_s_blocks(tiny_base: Path, tmp_path: Path) -> None:
    services = real_services(tiny_base, tmp_path)
    async with serve_on_socket(create_app(services)) as client:
        blocks_before = services.engine.snapshot().kv_blocks_used
        body = {**BODY, "stream": True, "n": 4}
        async with client.stream("POST", "/v1/completions", json=body) as answer:
            await anext(answer.aiter_lines())
            assert services.engine.snapshot().num_running > 0
        await wait_until(lambda: is_idle(services.engine))
        assert services.engine.snapshot().kv_blocks_used == blocks_before
        other = await client.post("/v1/completions", json={**BODY, "max_tokens": 4})
    assert other.status_code == 200


def is_idle(engine: GenerationEngine) -> bool:
    state = engine.snapshot()
    return state.num_running == 0 and state.num_waiting == 0


async def test_streams_of_base_and_adapters_equal_their_whole_answers(
    tiny_base: Path, tmp_path: Path, make_adapter: MakeAdapter
) -> None:
    services = real_services(tiny_base, tmp_path)
    async with serve_on_socket(create_app(services)) as client:
        for seed, name in enumerate(("ada", "bob"), start=1):
            await services.adapters.add_static(name, make_adapter(seed=seed))
        models = ["tiny", "ada", "bob"] * 2
        streamed = await asyncio.gather(*(stream_text(client, model) for model in models))
        whole = await asyncio.gather(*(whole_text(client, model) for model in models))
    assert streamed == whole
    assert streamed[:3] == streamed[3:]
    assert len(set(streamed)) == 3


async def stream_text(client: httpx.AsyncClient, model: str) -> str:
    body = {"model": model, "prompt": "the quick", "temperature": 0, "max_tokens": 24}
    answer = await client.post("/v1/completions", json={**body, "stream": True})
    return "".join(chunk["choices"][0]["text"] for chunk in chunks_of(answer.text))


async def whole_text(client: httpx.AsyncClient, model: str) -> str:
    body = {"model": model, "prompt": "the quick", "temperature": 0, "max_tokens": 24}
    text: str = (await client.post("/v1/completions", json=body)).json()["choices"][0]["text"]
    return text


async def test_long_prompts_do_not_hold_up_other_requests(services: AppServices) -> None:
    prompt = "the quick brown fox " * 40_000
    async with serve_on_socket(create_app(services)) as client:
        waits = []
        asking = asyncio.create_task(
            client.post("/v1/completions", json={"model": "tiny", "prompt": prompt})
        )
        while not asking.done():
            started = time.monotonic()
            await client.get("/livez")
            waits.append(time.monotonic() - started)
    assert (await asking).json()["error"]["code"] == "context_length_exceeded"
    assert max(waits) < 0.5
