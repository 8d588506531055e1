"""More adapters than host memory and device hold, asked for at once over HTTP, a real engine."""

import asyncio
import hashlib
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
from quickchange_adapters.store import LocalStore
from quickchange_server.api.app import create_app

from tests.conftest import MakeAdapter
from tests.server.conftest import serve_in_process
from tests.server.real_services import real_services
from tests.server.test_api_adapters import WEIGHTS, push, text_of

NAMES = [f"a{index}" for index in range(6)]
NUM_CLIENTS, NUM_ROUNDS = 10, 4
PAIRS = [("a0", "a1"), ("a2", "a3"), ("a1", "a2")]


@asynccontextmanager
async def serving(base: Path, store: Path, **settings: Any) -> AsyncIterator[httpx.AsyncClient]:
    app = create_app(real_services(base, store, max_queue=200, max_batch_rows=4, **settings))
    async for client in serve_in_process(app):
        yield client


async def parts_of(client: httpx.AsyncClient) -> dict[str, int]:
    parts: dict[str, int] = (await client.get("/v1/memory")).json()["bytes"]
    return parts


async def test_all_are_served_and_what_is_broken_or_unknown_hurts_nobody_else(
    tiny_base: Path, tmp_path: Path, make_adapter: MakeAdapter
) -> None:
    folders = {name: make_adapter(seed=seed) for seed, name in enumerate([*NAMES, "broken"])}
    async with serving(tiny_base, tmp_path) as client:
        for name, folder in folders.items():
            assert (await push(client, folder, name)).status_code == 201
        expected = {name: await text_of(client, name) for name in NAMES}
        size = (await parts_of(client))["adapter_host"] // len(NAMES)
    lost = hashlib.sha256((folders["broken"] / WEIGHTS).read_bytes()).hexdigest()
    LocalStore(tmp_path).path(lost).unlink()

    answers: list[tuple[str, httpx.Response]] = []
    held: list[int] = []

    async def ask(client: httpx.AsyncClient, rng: random.Random) -> None:
        for _ in range(NUM_ROUNDS):
            name = rng.choice([*NAMES, *NAMES, "broken", "unknown"])
            body = {"model": name, "prompt": "the quick brown", "temperature": 0, "max_tokens": 12}
            answers.append((name, await client.post("/v1/completions", json=body)))
            held.append((await parts_of(client))["adapter_host"])

    ceilings = {"adapter_host_bytes": 2 * size, "adapter_device_bytes": 3 * size // 2}
    async with serving(tiny_base, tmp_path, **ceilings) as client, asyncio.timeout(120):
        await asyncio.gather(*(ask(client, random.Random(seed)) for seed in range(NUM_CLIENTS)))
    assert len(answers) == NUM_CLIENTS * NUM_ROUNDS
    for name, answer in answers:
        if name == "broken":
            assert answer.status_code == 503
            assert answer.json()["error"]["code"] == "store_unavailable"
        elif name == "unknown":
            assert answer.status_code == 404
        else:
            assert answer.status_code == 200, answer.text
            assert answer.json()["choices"][0]["text"] == expected[name]
    assert {name for name, _ in answers} == {*NAMES, "broken", "unknown"}
    assert max(held) <= 2 * size


def asking(*names: str) -> dict[str, Any]:
    """Ask one adapter, or a mix of several."""
    parts = [{"model": name, "weight": 0.5} for name in names]
    body = {"prompt": "the quick", "temperature": 0, "max_tokens": 8}
    return body | ({"model": "tiny", "adapters": parts} if names[1:] else {"model": names[0]})


async def pushed(base: Path, store: Path, make_adapter: MakeAdapter, names: list[str]) -> int:
    """Upload adapters to a store, and return how many bytes each takes in host memory."""
    async with serving(base, store) as client:
        for seed, name in enumerate(names):
            assert (await push(client, make_adapter(seed=seed), name)).status_code == 201
            await client.post(f"/v1/adapters/{name}/load")
        return (await parts_of(client))["adapter_host"] // len(names)


async def test_mixes_that_want_the_same_room_are_served_in_turn(
    tiny_base: Path, tmp_path: Path, make_adapter: MakeAdapter
) -> None:
    """Room for two adapters: whoever held one of its two while it waited would end in 503."""
    size = await pushed(tiny_base, tmp_path, make_adapter, NAMES[:5])
    held: list[int] = []

    async def ask(client: httpx.AsyncClient, rng: random.Random) -> None:
        for _ in range(NUM_ROUNDS):
            names = rng.choice([*PAIRS, *PAIRS, ("a4",), ("a0",)])
            answer = await client.post("/v1/completions", json=asking(*names))
            assert answer.status_code == 200, answer.text
            held.append((await parts_of(client))["adapter_host"])

    async with serving(tiny_base, tmp_path, adapter_host_bytes=2 * size) as client:
        async with asyncio.timeout(120):
            await asyncio.gather(*(ask(client, random.Random(seed)) for seed in range(8)))
    assert max(held) <= 2 * size


async def test_a_mix_that_never_fits_is_refused_before_anything_is_loaded(
    tiny_base: Path, tmp_path: Path, make_adapter: MakeAdapter
) -> None:
    size = await pushed(tiny_base, tmp_path, make_adapter, NAMES[:3])
    too_small = [{"adapter_host_bytes": 5 * size // 2}, {"adapter_device_bytes": 2 * size}]
    for ceiling in too_small:
        async with serving(tiny_base, tmp_path, **ceiling) as client:
            answer = await client.post("/v1/completions", json=asking(*NAMES[:3]))
            error = answer.json()["error"]
            assert (answer.status_code, error["code"]) == (400, "mix_too_large"), error
            assert error["param"] == "adapters"
            assert "retry-after" not in answer.headers
            assert (await parts_of(client))["adapter_host"] == 0
            assert (await text_of(client, "a0")) is not None


async def test_a_mix_whose_file_is_lost_keeps_no_room(
    tiny_base: Path, tmp_path: Path, make_adapter: MakeAdapter
) -> None:
    size = await pushed(tiny_base, tmp_path, make_adapter, NAMES[:4])
    lost = hashlib.sha256((make_adapter(seed=1) / WEIGHTS).read_bytes()).hexdigest()
    async with serving(tiny_base, tmp_path, adapter_host_bytes=2 * size) as client:
        LocalStore(tmp_path).path(lost).unlink()
        for _ in range(3):
            answer = await client.post("/v1/completions", json=asking("a0", "a1"))
            assert answer.json()["error"]["code"] == "store_unavailable"
        async with asyncio.timeout(60):
            answer = await client.post("/v1/completions", json=asking("a2", "a3"))
        assert answer.status_code == 200
