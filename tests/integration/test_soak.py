"""A soak: three tenants do everything at once, for as long as told, and every answer is checked.

`QUICKCHANGE_LIFE_SOAK_S=1200 pytest tests/integration/test_soak.py -s` is the long form;
`QUICKCHANGE_LIFE_SOAK_SEED` repeats the choices of a run that failed, though not its timing.
"""

import asyncio
import gc
import os
import random
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from statistics import median

import httpx
import psutil
from quickchange_adapters.api_keys import token_hash
from quickchange_server.api.app import AppServices, create_app
from quickchange_server.engine.client import EngineClient
from quickchange_server.engine.engine import Engine
from quickchange_server.keyring import Keyring
from quickchange_server.request_quotas import RequestQuotas
from quickchange_server.tokenizer import Tokenizer

from tests.conftest import LLAMA_LINEARS, MakeAdapter
from tests.integration.soak_oracle import ask_ahead
from tests.integration.soak_world import NAMES, TENANTS, World
from tests.server.real_services import real_services
from tests.server.socket_server import serve_on_socket

SOAK_S = float(os.environ.get("QUICKCHANGE_LIFE_SOAK_S", "5"))
SEED = int(os.environ.get("QUICKCHANGE_LIFE_SOAK_SEED", "0")) or random.SystemRandom().getrandbits(
    32
)
ROUND_S = min(20.0, SOAK_S / 2)
NUM_WORKERS = 10
REST_S = 60.0
OPS = "o" * 40
RANKS = (1, 4, 8, 12, 24, 40)
LENGTHS = (1, 7, 33, 90)
MAX_GROWTH_BYTES = 48 << 20
SCOPES = ["generate", "adapters:read", "adapters:write", "admin"]


def services_of(base: Path, store: Path) -> AppServices:
    """A server whose pool, host memory, KV and rows are all too small for what is asked of it."""
    services = real_services(
        base,
        store,
        keyring=Keyring(token_hash(OPS)),
        kv_cache_bytes=512 * 16 * 40,
        adapter_device_bytes=830_000,  # 88 rank rows for 89 of the adapters
        adapter_host_bytes=700_000,
        merged_bytes=700_000,
        max_batch_rows=6,
        max_step_tokens=40,
        max_queue=12,
    )
    return replace(services, requests=RequestQuotas(max_requests=12))


@asynccontextmanager
async def world_of(services: AppServices, base: Path, folders: list[Path]) -> AsyncIterator[World]:
    rng = random.Random(SEED)
    prompts = tuple(tuple(rng.randrange(3, 381) for _ in range(length)) for length in LENGTHS)
    oracle = ask_ahead(base, folders, prompts, texts_of(services.tokenizer))
    # a connection that is used again may just be closed by the other side
    limits = httpx.Limits(max_keepalive_connections=0)
    async with (
        serve_on_socket(create_app(services)) as found,
        httpx.AsyncClient(base_url=found.base_url, timeout=REST_S, limits=limits) as client,
    ):
        keys = {tenant: await key_of(client, tenant) for tenant in TENANTS}
        world = World(client, keys, folders, oracle, rng)
        await asyncio.gather(*(world.upload(t, name) for t in TENANTS for name in NAMES))
        yield world


async def key_of(client: httpx.AsyncClient, tenant: str) -> str:
    headers = {"authorization": f"Bearer {OPS}"}
    body = {"tenant": tenant, "scopes": SCOPES}
    answer = await client.post("/v1/keys", json=body, headers=headers)
    secret: str = answer.json()["secret"]
    return secret


def texts_of(tokenizer: Tokenizer) -> list[str]:
    """What a completion's log probabilities call each token; none ends in half a character."""
    return [text_of(tokenizer.token_bytes(token)) for token in range(tokenizer.vocab_size)]


def text_of(token: bytes) -> str:
    try:
        return token.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token)


async def watch(services: AppServices) -> None:
    """Look all along at what must hold at any moment, between two steps."""
    engine, base_digest = engine_of(services), services.engine.base.digest
    for index in range(1_000_000):
        await asyncio.wrap_future(engine.call(lambda: check_now(engine)))
        if index % 20 == 0:
            assert await client_of(services).base_checksum() == base_digest
        await asyncio.sleep(0.05)


def check_now(engine: Engine) -> None:
    """Blocks, lines, rank rows, references and bytes add up; on the engine thread."""
    scheduler, residency, pool = engine.scheduler, engine.residency, engine.runner.pool
    scheduler.check_integrity()
    pool.check_integrity()
    live = Counter(
        adapter.digest
        for sequence in (*scheduler.running, *scheduler.waiting)
        for adapter in sequence.request.adapters
    )
    assert all(residency.num_users(digest) >= count for digest, count in live.items())
    held = Counter(slot.digest for sequence in scheduler.running for slot in sequence.slots)
    assert all(slot.num_references >= held[slot.digest] for slot in pool.slots)
    assert pool.used_bytes <= pool.total_bytes
    assert residency.host_bytes <= engine.settings.adapter_host_bytes
    assert residency.merged_bytes <= residency.merged_ceiling_bytes


async def check_at_rest(services: AppServices, store: Path) -> None:
    """With nobody asking, nothing is held: no block, slot, reference, place or file."""
    engine = engine_of(services)
    async with asyncio.timeout(REST_S):
        while services.engine.snapshot().num_running or services.engine.snapshot().num_waiting:
            await asyncio.sleep(0.01)
        while services.requests._in_flight.total:
            await asyncio.sleep(0.01)
    await asyncio.wrap_future(engine.call(lambda: check_now(engine)))
    snapshot = services.engine.snapshot()
    assert snapshot.kv_blocks_used == 0
    assert not [each for each in snapshot.adapters.values() if each.num_running]
    assert not [slot for slot in engine.runner.pool.slots if slot.num_references]
    assert not list((store / "incoming").iterdir())
    assert await client_of(services).base_checksum() == services.engine.base.digest


async def check_all_gone(world: World, services: AppServices, store: Path) -> None:
    """When every adapter is deleted, no byte of any is left on device, host or disk."""
    for tenant in TENANTS:
        for name in NAMES:
            answer = await world.call(tenant, "DELETE", f"/v1/adapters/{name}")
            assert answer.status_code in (200, 404), answer.text
    await check_at_rest(services, store)
    memory = services.engine.snapshot().memory_bytes
    assert (memory["adapter_pool_used"], memory["adapter_host"], memory["merged"]) == (0, 0, 0)
    blobs = [file for file in (store / "blobs").rglob("*") if file.is_file()]
    assert not blobs


def client_of(services: AppServices) -> EngineClient:
    assert isinstance(services.engine, EngineClient)
    return services.engine


def engine_of(services: AppServices) -> Engine:
    return client_of(services)._engine


async def one_round(world: World, services: AppServices, until_s: float) -> None:
    """Let all workers work for a while beside the watcher; whoever fails ends it."""
    watching = asyncio.create_task(watch(services))
    working = [asyncio.create_task(world.work(until_s)) for _ in range(NUM_WORKERS)]
    try:
        async with asyncio.timeout(until_s - time.monotonic() + REST_S):
            everything = asyncio.gather(*working)
            await asyncio.wait((watching, everything), return_when=asyncio.FIRST_COMPLETED)
            if watching.done():
                watching.result()
            await everything
    finally:
        for task in (watching, *working):
            task.cancel()
        await asyncio.gather(watching, *working, return_exceptions=True)


async def run(world: World, services: AppServices, store: Path) -> list[int]:
    """Run rounds until the time is over; return resident memory at the end of each."""
    deadline_s = time.monotonic() + SOAK_S
    resident = []
    while (now := time.monotonic()) < deadline_s:
        await one_round(world, services, min(now + ROUND_S, deadline_s))
        await check_at_rest(services, store)
        gc.collect()
        resident.append(psutil.Process().memory_info().rss)
    await check_all_gone(world, services, store)
    return resident


def check_flat(resident: list[int]) -> str:
    """Assert that memory does not grow from the second quarter of a long run to its last."""
    quarter = len(resident) // 4
    if quarter < 3:
        return "too short to say whether memory grows"
    early, late = median(resident[quarter : 2 * quarter]), median(resident[-quarter:])
    assert late - early < MAX_GROWTH_BYTES, [each >> 20 for each in resident]
    return f"resident memory {early / 2**20:.0f} MiB, then {late / 2**20:.0f} MiB"


async def test_three_tenants_do_everything_at_once_and_every_answer_is_the_oracles(
    tiny_base: Path, tmp_path: Path, make_adapter: MakeAdapter
) -> None:
    folders = [
        make_adapter(seed=40 + index, r=rank, target_modules=list(LLAMA_LINEARS)[index % 3 :])
        for index, rank in enumerate(RANKS)
    ]
    services = services_of(tiny_base, tmp_path)
    async with world_of(services, tiny_base, folders) as world:
        try:
            memory = check_flat(await run(world, services, tmp_path))
        except BaseException as error:
            error.add_note(f"QUICKCHANGE_LIFE_SOAK_SEED={SEED}; the last actions:")
            for action in world.log:
                error.add_note(action)
            raise
    print(
        f"seed {SEED}, {world.counts.total()} actions, {memory}: "
        f"{dict(sorted(world.counts.items()))}"
    )
    assert world.counts["ask 200"] > 5
    assert world.counts["leave left"] > 0
