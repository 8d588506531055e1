"""The probe of an upload: what PEFT would say, in free room only, and never in anybody's way."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from quickchange_adapters.records import VersionRecord
from quickchange_adapters.structure import Structure
from quickchange_adapters.weights import AdapterWeights
from quickchange_server.adapter_loader import AdapterLoader
from quickchange_server.adapter_probe import PROBE_PROMPT, AdapterProber, NotProbed
from quickchange_server.api.app import create_app
from quickchange_server.api.services import AppServices
from quickchange_server.engine.request import GenerationRequest

from tests.conftest import MakeAdapter
from tests.server.conftest import BASE_URL
from tests.server.real_services import real_services
from tests.server.scripted_engine import ScriptedEngine
from tests.server.test_api_adapters import push

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@dataclass
class World:
    services: AppServices
    client: httpx.AsyncClient

    async def report(self, folder: Path, name: str = "ada", **fields: str) -> Any:
        answer = await push(self.client, folder, name, **fields)
        assert answer.status_code == 201, answer.text
        return answer.json()["report"]

    def resident(self) -> set[str]:
        snapshot = self.services.engine.snapshot()
        return {digest for digest, held in snapshot.adapters.items() if held.device_bytes}


@asynccontextmanager
async def world(base: Path, store: Path, **settings: Any) -> AsyncIterator[World]:
    services = real_services(base, store, is_probing=True, **settings)
    app = create_app(services)
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url=BASE_URL) as client,
    ):
        yield World(services, client)


def expected(base: Path, adapter: Path, ids: list[int]) -> tuple[float, float, int]:
    """Mean and largest change of log probability and changed first places, by PEFT."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(str(base), dtype=torch.float32)
    prompt = torch.tensor([ids])
    with torch.inference_mode():
        plain = model(prompt).logits[0, :-1].log_softmax(-1)
        adapted = PeftModel.from_pretrained(model, str(adapter))(prompt).logits[0, :-1]
        adapted = adapted.log_softmax(-1)
    change = (plain - adapted).gather(1, prompt[0, 1:, None]).abs()
    moved = int((plain.argmax(-1) != adapted.argmax(-1)).sum())
    return float(change.mean()), float(change.max()), moved


async def test_the_probe_is_what_peft_says_and_leaves_nothing_in_memory(
    tiny_base: Path, tmp_path: Path, make_adapter: MakeAdapter
) -> None:
    folder = make_adapter(seed=1, std=0.3)
    async with world(tiny_base, tmp_path) as here:
        dry = (await push(here.client, folder, query="?dry_run=true")).json()
        report = await here.report(folder)
        ids = here.services.tokenizer.encode(PROBE_PROMPT)
        snapshot = here.services.engine.snapshot()
        shown = (await here.client.get("/v1/adapters/ada/versions/1")).json()
    mean, largest, moved = expected(tiny_base, folder, list(ids))
    for found in (dry["probe"], report["probe"], shown["report"]["probe"]):
        assert found["num_tokens"] == len(ids) - 1
        assert found["mean_change"] == pytest.approx(mean, abs=1e-4)
        assert found["max_change"] == pytest.approx(largest, abs=1e-4)
        assert found["num_top_changed"] == moved
        assert 0 < found["seconds"] < 60
    assert report["probe_reason"] is None
    assert moved > 0
    assert snapshot.adapters == {}
    assert snapshot.memory_bytes["adapter_host"] == 0
    assert shown["tier"] == "disk"


async def test_an_update_of_zero_moves_nothing(
    tiny_base: Path, tmp_path: Path, make_adapter: MakeAdapter
) -> None:
    async with world(tiny_base, tmp_path) as here:
        report = await here.report(make_adapter(seed=1, std=0.0), allow_noop="true")
    assert (report["probe"]["max_change"], report["probe"]["num_top_changed"]) == (0.0, 0)


async def test_a_refused_upload_is_not_measured(
    tiny_base: Path, tmp_path: Path, make_adapter: MakeAdapter
) -> None:
    async with world(tiny_base, tmp_path) as here:
        zero = make_adapter(seed=1, std=0.0)
        report = (await push(here.client, zero, query="?dry_run=true")).json()
        assert here.services.engine.snapshot().num_steps == 0
    assert (report["ok"], report["probe"]) == (False, None)
    assert "can be served" in report["probe_reason"]


@pytest.mark.parametrize("ceiling", ["adapter_host_bytes", "adapter_device_bytes"])
async def test_a_probe_takes_no_adapter_s_place(
    tiny_base: Path, tmp_path: Path, make_adapter: MakeAdapter, ceiling: str
) -> None:
    room_for_one = 100_000  # bytes; an adapter of the tests has 65,536
    async with world(tiny_base, tmp_path, **{ceiling: room_for_one}) as here:
        first = await here.report(make_adapter(seed=1), "first")
        assert first["probe"] is not None, first["probe_reason"]
        body = {"model": "first", "prompt": "the", "max_tokens": 1}
        assert (await here.client.post("/v1/completions", json=body)).status_code == 200
        before = here.resident()
        assert len(before) == 1
        second = await here.report(make_adapter(seed=2), "second")
        assert second["probe"] is None
        assert "the place of an adapter" in second["probe_reason"]
        assert here.resident() == before


async def test_while_requests_run_nothing_is_measured(
    tiny_base: Path, tmp_path: Path, make_adapter: MakeAdapter
) -> None:
    async with world(tiny_base, tmp_path) as here:
        engine = here.services.engine
        request = GenerationRequest("r", (1, 2, 3), max_tokens=400, ignore_eos=True)
        running = engine.generate(request)
        await anext(running)
        report = await here.report(make_adapter(seed=1))
        assert report["probe"] is None
        assert "requests were running" in report["probe_reason"]
        assert report["ok"]


@pytest.fixture
async def engine() -> AsyncIterator[ScriptedEngine]:
    engine = ScriptedEngine()
    await engine.start()
    yield engine
    await engine.stop()


def loader_of(engine: ScriptedEngine) -> AdapterLoader:
    async def read_again(version: Any) -> None:
        raise AssertionError("nothing is read again here")

    return AdapterLoader(engine, NoFiles(), lambda digest: True, read_again)


class NoFiles:
    """All files are here, and there is nothing in them."""

    def is_on_disk(self, version: VersionRecord) -> bool:
        return True

    def fetch(self, version: VersionRecord) -> None:
        raise AssertionError("nothing is fetched here")

    def measure(self, version: VersionRecord) -> Structure:
        return Structure()

    def read_weights(self, version: VersionRecord) -> AdapterWeights:
        return no_weights()


def no_weights() -> AdapterWeights:
    return AdapterWeights("d1", {})


async def until(is_true: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not is_true():
            await asyncio.sleep(0.005)


async def test_what_takes_too_long_is_left_behind_and_goes_by_itself(
    engine: ScriptedEngine,
) -> None:
    prober = AdapterProber(engine, loader_of(engine), [5, 6, 7], budget_s=0.1)
    engine.pause_after = 0
    with pytest.raises(NotProbed, match="more than 0.1 s"):
        await prober.measure("d1", 0, no_weights)
    assert engine.is_loaded("d1")
    with pytest.raises(NotProbed, match="another version"):
        await prober.measure("d2", 0, no_weights)
    engine.resume.set()
    await until(lambda: not engine.is_loaded("d1"))
    await prober.stop()


async def test_what_goes_wrong_is_a_reason_and_no_refusal(engine: ScriptedEngine) -> None:
    def fail() -> AdapterWeights:
        raise ValueError("a value has no place")

    prober = AdapterProber(engine, loader_of(engine), [5, 6, 7])
    with pytest.raises(NotProbed, match="log"):
        await prober.measure("d1", 0, fail)
    with pytest.raises(NotProbed, match="no prompt"):
        await AdapterProber(engine, loader_of(engine), []).measure("d1", 0, no_weights)
    with pytest.raises(NotProbed, match="more than 64 MiB"):
        await prober.measure("d1", 1 << 30, fail)
    probe = await prober.measure("d1", 0, no_weights)
    assert (probe.num_tokens, probe.max_change) == (2, 0.0)
    assert not engine.is_loaded("d1")
