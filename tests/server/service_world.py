"""An adapter service over a scripted engine, a real store and a real catalog."""

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from quickchange_adapters.catalog import Catalog, sqlite_url
from quickchange_adapters.errors import MergeBudgetExceeded
from quickchange_adapters.limits import AdapterLimits
from quickchange_adapters.store import LocalStore, Store
from quickchange_adapters.weights import AdapterWeights
from quickchange_server.adapter_service import AdapterService, UploadForm
from quickchange_server.engine.interface import EngineSnapshot, MergeResult
from quickchange_server.engine.request import AdapterRef, GenerationRequest
from quickchange_server.errors import NotFound

from tests.adapters.adapter_files import config_values, q_pairs, small_spec, weights_bytes
from tests.server.scripted_engine import ScriptedEngine

SPEC = small_spec()
SEEN_S = 10.0
LIMITS = AdapterLimits(max_weights_bytes=1 << 20)


@dataclass
class SlowEngine(ScriptedEngine):
    """Loads take a while and are counted; merged copies have a ceiling."""

    load_s: float = 0.0
    num_loads: int = 0
    merge_ceiling_bytes: int = 1 << 30
    num_unloads: int = 0
    damaged: frozenset[str] = frozenset()

    def snapshot(self) -> EngineSnapshot:
        return replace(super().snapshot(), quarantined=self.damaged)

    async def load_adapter(self, weights: AdapterWeights) -> None:
        self.num_loads += 1
        await asyncio.sleep(self.load_s)
        await super().load_adapter(weights)

    async def unload_adapter(self, digest: str, timeout_s: float = 30.0) -> Any:
        self.num_unloads += 1
        return await super().unload_adapter(digest, timeout_s)

    async def merge(self, digest: str) -> MergeResult:
        if self.merge_ceiling_bytes < 64 * 64 * 4:
            raise MergeBudgetExceeded(64 * 64 * 4, 0, self.merge_ceiling_bytes)
        return await super().merge(digest)


@dataclass
class World:
    """A service and what stands behind it; `restart` opens the same disk anew."""

    root: Path
    engine: SlowEngine = field(default_factory=lambda: SlowEngine(base=SPEC))
    open_catalog: Callable[[str], Catalog] = Catalog
    open_store: Callable[[Path], Store] = LocalStore
    poll_s: float = 0.02
    catalog_url: str = ""

    def __post_init__(self) -> None:
        self.root.mkdir(parents=True, exist_ok=True)
        self.store = self.open_store(self.root)
        self.catalog = self.open_catalog(self.catalog_url or sqlite_url(self.root / "catalog.db"))
        self.service = AdapterService(
            self.engine, self.store, self.catalog, LIMITS, torch.float32, poll_s=self.poll_s
        )

    async def start(self) -> None:
        await self.engine.start()
        await self.service.start()

    async def restart(self) -> "World":
        await self.service.stop()
        world = World(
            self.root,
            open_catalog=self.open_catalog,
            open_store=self.open_store,
            catalog_url=self.catalog_url,
        )
        await world.engine.start()
        await world.service.start()
        return world

    async def form(self, name: str, seed: int = 0, **changes: Any) -> UploadForm:
        tensors = {n: a + seed for n, a in q_pairs(SPEC).items()}
        return await self.form_of(name, weights_bytes(tensors), **changes)

    async def form_of(
        self, name: str, weights: bytes, config: Mapping[str, Any] | None = None, **changes: Any
    ) -> UploadForm:
        text = json.dumps(config_values() if config is None else config).encode()
        return UploadForm(
            name=name,
            adapter_config=await self.service.stage("adapter_config.json", chunks(text)),
            adapter_model=await self.service.stage("adapter_model.safetensors", chunks(weights)),
            **changes,
        )

    async def upload(self, name: str, seed: int = 0, **changes: Any) -> int:
        result = await self.service.upload(await self.form(name, seed, **changes))
        return result.version.version

    def blobs(self) -> set[str]:
        return {blob.sha256 for blob in self.store.list()}

    def incoming(self) -> list[Path]:
        return list((self.root / "incoming").iterdir())

    @contextlib.asynccontextmanager
    async def running(self, model: str) -> AsyncIterator["asyncio.Task[list[int]]"]:
        """Run a request on a model until the block ends."""
        resolved = self.service.resolve(model)
        await self.service.acquire(resolved)
        self.engine.pause_after = 1
        request = GenerationRequest("r", (5, 6, 7), (AdapterRef(resolved.digest),), max_tokens=9)

        async def collect() -> list[int]:
            return [t async for out in self.engine.generate(request) for t in out.token_ids]

        task = asyncio.create_task(collect())
        while "r" not in self.engine.live:
            await asyncio.sleep(0.001)
        yield task
        self.engine.resume.set()
        await task


async def chunks(data: bytes, size: int = 1000) -> AsyncIterator[bytes]:
    for start in range(0, len(data), size):
        yield data[start : start + size]


def meaning(world: World, model: str) -> int | None:
    """Return the version number that a model string means to a server."""
    try:
        return world.service.resolve(model).version
    except NotFound:
        return None


async def seen(is_true: Callable[[], bool]) -> float:
    """Wait for what another server, or the background, is to do; return how long it took."""
    started = time.monotonic()
    async with asyncio.timeout(SEEN_S):
        while not is_true():
            await asyncio.sleep(0.01)
    return time.monotonic() - started
