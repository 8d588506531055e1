"""Pinned versions under pressure: they stay, and what is not pinned is still served."""

from pathlib import Path

import pytest
from quickchange_adapters.errors import PinBudgetExceeded
from quickchange_adapters.weights import AdapterWeights
from quickchange_server.engine.client import EngineClient
from quickchange_server.errors import InvalidRequest, NotFound, Unavailable

from tests.conftest import MakeAdapter
from tests.server.engine.conftest import collect, make_engine, peft_weights
from tests.server.engine.test_engine import greedy, started, until

NUM_OTHERS = 16


@pytest.fixture
def weights(make_adapter: MakeAdapter) -> AdapterWeights:
    return peft_weights(make_adapter(seed=1), "pinned")


def renamed(weights: AdapterWeights, digest: str) -> AdapterWeights:
    return AdapterWeights(digest, weights.pairs)


async def host_bytes_of(tiny_base: Path, weights: AdapterWeights) -> int:
    """Return what one of these takes in host memory."""
    async with started(tiny_base) as engine:
        await engine.load_adapter(weights)
        return engine.snapshot().adapters[weights.digest].host_bytes


async def serve(engine: EngineClient, weights: AdapterWeights) -> list[int]:
    await engine.load_adapter(weights)
    return (await collect(engine.generate(greedy(weights.digest, weights.digest)))).token_ids


async def test_a_pinned_version_survives_others_in_host_memory_and_on_the_device(
    tiny_base: Path, weights: AdapterWeights
) -> None:
    size = await host_bytes_of(tiny_base, weights)
    ceilings = {"adapter_host_bytes": 8 * size, "adapter_device_bytes": 4 * size}
    async with started(tiny_base, **ceilings) as engine:
        await engine.load_adapter(weights)
        await engine.pin("pinned")
        assert await engine.activate("pinned")
        evicted_before = engine._engine.runner.pool.num_evictions
        for index in range(NUM_OTHERS):
            assert await serve(engine, renamed(weights, f"d{index}"))
            held = engine.snapshot().adapters
            assert held["pinned"].is_pinned
            assert held["pinned"].device_bytes > 0
            assert sum(each.host_bytes for each in held.values()) <= 8 * size
        assert engine._engine.runner.pool.num_evictions > evicted_before
        assert await serve(engine, weights)  # what was never used yet would be kept for a while
        await engine.unpin("pinned")
        for index in range(NUM_OTHERS):
            await serve(engine, renamed(weights, f"e{index}"))
        assert not engine.is_loaded("pinned")


async def test_pins_leave_room_for_what_is_not_pinned(
    tiny_base: Path, weights: AdapterWeights
) -> None:
    size = await host_bytes_of(tiny_base, weights)
    async with started(tiny_base, adapter_host_bytes=4 * size) as engine:
        for index in range(4):
            await engine.load_adapter(renamed(weights, f"p{index}"))
        for index in range(3):
            await engine.pin(f"p{index}")
        with pytest.raises(PinBudgetExceeded, match="unpin another") as refused:
            await engine.pin("p3")
        assert (refused.value.needed_bytes, refused.value.used_bytes) == (size, 3 * size)
        await engine.pin("p0")  # a repeat takes nothing more
        assert await serve(engine, renamed(weights, "another"))
        assert not engine.is_loaded("p3")
        with pytest.raises(NotFound):
            await engine.pin("p3")


async def test_a_load_that_pins_leave_no_room_for_says_how_much_they_hold(
    tiny_base: Path, weights: AdapterWeights, make_adapter: MakeAdapter
) -> None:
    size = await host_bytes_of(tiny_base, weights)
    async with started(tiny_base, adapter_host_bytes=2 * size) as engine:
        await engine.load_adapter(weights)
        await engine.pin("pinned")
        large = peft_weights(make_adapter(seed=2, r=16), "large")
        with pytest.raises(Unavailable, match=f"{size} are of adapters that are pinned"):
            await engine.load_adapter(large)


async def test_pins_that_fill_the_device_give_way_to_a_request(
    tiny_base: Path, weights: AdapterWeights
) -> None:
    async with started(tiny_base) as probe:
        await probe.load_adapter(weights)
        await probe.activate("pinned")
        await until(lambda: probe.snapshot().adapters["pinned"].device_bytes > 0)
        size = probe.snapshot().adapters["pinned"].device_bytes
    async with started(tiny_base, adapter_device_bytes=2 * size) as engine:
        assert engine._engine.runner.pool.num_rows < 16  # one of rank 8 at a time
        await engine.load_adapter(weights)
        await engine.pin("pinned")
        await engine.activate("pinned")
        alone = await serve(engine, renamed(weights, "other"))
        assert engine.snapshot().adapters["pinned"].device_bytes == 0
        assert await serve(engine, weights) == alone


async def test_an_unload_ends_a_pin(tiny_base: Path, weights: AdapterWeights) -> None:
    engine = make_engine(tiny_base)
    await engine.start()
    await engine.load_adapter(weights)
    await engine.pin("pinned")
    assert await engine.unload_adapter("pinned")
    await engine.load_adapter(weights)
    assert not engine.snapshot().adapters["pinned"].is_pinned
    await engine.stop()


async def test_a_mix_that_host_memory_never_holds_is_refused_by_its_sizes_alone(
    tiny_base: Path, weights: AdapterWeights
) -> None:
    async with started(tiny_base) as engine:
        await engine.load_adapter(weights)
        size = engine.size_of(weights.digest)
        assert size is not None
    async with started(tiny_base, adapter_host_bytes=size.num_bytes * 3 // 2) as engine:
        with pytest.raises(InvalidRequest, match=f"need {2 * size.num_bytes} bytes") as refused:
            await engine.book_room("mix", {"a": size, "b": size})
        assert refused.value.code == "mix_too_large"
        await engine.book_room("one", {"a": size})
        engine.end_booking("one")
        await engine.book_room("other", {"b": size})
