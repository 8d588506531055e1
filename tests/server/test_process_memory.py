from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from quickchange_adapters.zero_memory import lazy_zeros, resident_bytes
from quickchange_server.api.app import create_app
from quickchange_server.engine.base_model import load_base
from quickchange_server.engine.settings import EngineSettings
from quickchange_server.process_memory import ProcessMemory

from tests.server.conftest import serve_in_process
from tests.server.real_services import MIB, real_services
from tests.server.test_api_adapters import text_of

KV_BYTES = 64 * MIB


@pytest.fixture
async def real_client(tiny_base: Path, tmp_path: Path) -> AsyncIterator[httpx.AsyncClient]:
    memory = ProcessMemory()
    services = real_services(tiny_base, tmp_path, kv_cache_bytes=KV_BYTES)
    async for each in serve_in_process(create_app(replace(services, memory=memory))):
        yield each


async def parts_of(client: httpx.AsyncClient) -> dict[str, int]:
    parts: dict[str, int] = (await client.get("/v1/memory")).json()["process"]
    return parts


async def test_parts_add_up_to_the_resident_size(real_client: httpx.AsyncClient) -> None:
    before = await parts_of(real_client)
    await text_of(real_client, "tiny")
    after = await parts_of(real_client)
    for parts in (before, after):
        named = sum(size for part, size in parts.items() if part not in ("rest", "total"))
        assert named + parts["rest"] == parts["total"]
        assert abs(parts["rest"]) <= 0.05 * parts["total"]
        assert parts["runtime"] > 100 * MIB
    assert before["kv"] <= after["kv"] <= KV_BYTES
    assert after["kv"] > 0


async def test_the_same_parts_are_metrics(real_client: httpx.AsyncClient) -> None:
    parts = await parts_of(real_client)
    lines = (await real_client.get("/metrics")).text.splitlines()
    prefix = "quickchange_process_memory_bytes{"
    shown = {line.split('"')[1] for line in lines if line.startswith(prefix)}
    assert shown == parts.keys() - {"total"}


def test_what_was_never_written_is_not_resident() -> None:
    zeros = lazy_zeros((64, MIB // 4), torch.float32, torch.device("cpu"))
    assert resident_bytes(zeros) == 0
    zeros[3] = 1
    assert zeros[3].nbytes <= resident_bytes(zeros) <= zeros.nbytes
    zeros.fill_(1)
    assert resident_bytes(zeros) == zeros.nbytes


def test_who_asks_often_gets_what_was_measured_last() -> None:
    calls: list[int] = []

    def engine_bytes() -> dict[str, int]:
        calls.append(1)
        return {"base": 7}

    memory = ProcessMemory()
    assert memory.recent(engine_bytes) == memory.recent(engine_bytes)
    assert len(calls) == 1
    assert memory.parts(engine_bytes)["base"] == 7
    assert len(calls) == 2


def test_the_base_s_file_is_left_when_it_has_been_read(tiny_base: Path) -> None:
    """A single view of a mapped file would keep all of it resident."""
    base = load_base(tiny_base, EngineSettings(dtype="auto"))
    mapped = [
        line for line in Path("/proc/self/maps").read_text().splitlines() if str(tiny_base) in line
    ]
    ranges = [tuple(int(end, 16) for end in line.split()[0].split("-")) for line in mapped]
    held: list[Any] = [
        name
        for name, tensor in base.model.state_dict().items()
        if any(start <= tensor.data_ptr() < end for start, end in ranges)
    ]
    assert held == []
