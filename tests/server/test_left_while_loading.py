"""A client that leaves while its adapter is loaded, or waits for room, keeps no place."""

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import httpx
import pytest
from quickchange_server.adapter_views import ResolvedModel
from quickchange_server.api.app import AppServices, create_app

from tests.server.conftest import DIGEST_A, DIGEST_B
from tests.server.scripted_adapters import ScriptedAdapters
from tests.server.socket_server import serve_on_socket
from tests.server.test_start_given_up import OftenUnloaded, counted

ONE = {"model": "ada", "prompt": "a"}
MIX = {"model": "tiny", "prompt": "a", "adapters": [{"model": "ada"}, {"model": "bob"}]}
PATIENCE_S = 30


class NeverLoaded(ScriptedAdapters):
    """Loads for ever."""

    def __init__(self) -> None:
        super().__init__({"ada": DIGEST_A, "bob": DIGEST_B})
        self.num_waiting = 0
        self.parted: list[str] = []
        self.part = lambda owner: self.parted.append(owner)

    async def acquire(self, resolved: ResolvedModel, *, is_repeat: bool = False) -> None:
        self.num_waiting += 1
        try:
            await asyncio.Event().wait()
        finally:
            self.num_waiting -= 1

    async def acquire_mix(
        self, owner: str, parts: Sequence[ResolvedModel], *, is_repeat: bool = False
    ) -> None:
        await self.acquire(parts[0])


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", ONE),
        ("/v1/completions", ONE | {"stream": True}),
        ("/v1/completions", MIX),
        ("/generate", {"inputs": "a", "parameters": {"adapter_id": "ada"}}),
    ],
)
async def test_its_place_is_free_again(
    services: AppServices, path: str, body: dict[str, Any]
) -> None:
    adapters = NeverLoaded()
    services = replace(services, adapters=adapters)
    counted = services.metrics.registry.get_sample_value

    def cancelled() -> float:
        return counted("quickchange_requests_total", {"outcome": "cancelled"}) or 0.0

    async with serve_on_socket(create_app(services)) as client, asyncio.timeout(PATIENCE_S):
        asking = asyncio.create_task(client.post(path, json=body))
        while not adapters.num_waiting:
            await asyncio.sleep(0.01)
        assert services.requests._in_flight.total == 1
        asking.cancel()
        while services.requests._in_flight.total or adapters.num_waiting or not cancelled():
            await asyncio.sleep(0.01)
        assert len(adapters.parted) == 1
        status = {"route": path, "method": "POST", "status": "499"}
        while not counted("quickchange_http_requests_total", status):
            await asyncio.sleep(0.01)
        assert cancelled() == 1
        assert counted("quickchange_requests_total", {"outcome": "rejected"}) in (None, 0.0)
        with pytest.raises(httpx.ReadTimeout):  # others go on waiting
            await client.post(path, json=body, timeout=0.2)


class LoadedOnce(NeverLoaded):
    """Is loaded at the first try, and not at the second."""

    num_tries = 0

    async def acquire(self, resolved: ResolvedModel, *, is_repeat: bool = False) -> None:
        self.num_tries += 1
        if self.num_tries > 1:
            await super().acquire(resolved)


async def test_a_client_that_leaves_while_it_is_loaded_again_is_counted_as_that(
    services: AppServices,
) -> None:
    adapters = LoadedOnce()
    services = replace(services, adapters=adapters, engine=OftenUnloaded())
    async with serve_on_socket(create_app(services)) as client, asyncio.timeout(PATIENCE_S):
        asking = asyncio.create_task(client.post("/v1/completions", json=ONE))
        while not adapters.num_waiting:
            await asyncio.sleep(0.01)
        asking.cancel()
        while not counted(services):
            await asyncio.sleep(0.01)
    assert counted(services) == {"cancelled": 1, "ada cancelled": 1}
