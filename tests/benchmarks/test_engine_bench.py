"""The engine's benchmark on a tiny base: its figures are finite, its floor is exact."""

import math
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from quickchange_adapters.base_spec import BaseSpec, ModuleSpec

from benchmarks.engine_runs import EngineBench, engine_table, random_weights
from benchmarks.failure import BenchmarkFailure
from benchmarks.workload import Scenario, parse_scenarios

SCENARIOS = parse_scenarios("base:1,2:3,merged:2")

MakeBench = Callable[..., EngineBench]


@pytest.fixture
def make_bench(tiny_base: Path) -> MakeBench:
    def make(**changes: object) -> EngineBench:
        options = Namespace(
            model=tiny_base,
            device="cpu",
            dtype="float32",
            kernels="auto",
            quantize=None,
            scenarios=SCENARIOS,
            prompt_tokens=8,
            tokens=16,
            prefill_tokens=40,
            max_step_tokens=64,
            rank=4,
            repeats=2,
            kv_cache_mib=4,
            adapter_device_mib=8,
            profile=None,
            profile_steps=3,
        )
        vars(options).update(changes)
        return EngineBench(options)

    return make


async def test_every_scenario_is_run_as_often_as_asked(make_bench: MakeBench) -> None:
    bench = make_bench()
    runs = await bench.run_all(SCENARIOS, num_adapters=2)
    assert {scenario.label: len(figures) for scenario, figures in runs.items()} == {
        "base:1": 2,
        "2:3": 2,
        "merged:2": 2,
    }
    for figures in (run for each in runs.values() for run in each):
        numbers = [value for value in figures.as_json().values() if isinstance(value, float)]
        assert all(math.isfinite(number) and number > 0 for number in numbers)
    table = engine_table(runs, bench.floor, bandwidth=1e9)
    assert "2 adapters, 3 rows" in table


async def test_answers_too_short_to_see_their_steps_are_refused(make_bench: MakeBench) -> None:
    with pytest.raises(BenchmarkFailure, match="base:1: only 0 decode steps.*raise --tokens"):
        await make_bench(tokens=4).run_all(SCENARIOS[:1], num_adapters=0)


def test_the_floor_is_base_head_adapters_and_kv(make_bench: MakeBench) -> None:
    bench = make_bench()
    hidden, inner, layers, kv_width, vocabulary = 64, 128, 2, 2 * 16, 381
    block = 2 * hidden * hidden + 2 * hidden * kv_width + 3 * hidden * inner
    base = 4 * (layers * block + vocabulary * hidden)
    kv_per_row = 4 * layers * 2 * kv_width * (8 + 16 / 2)
    ins_and_outs = 4 * hidden + 2 * (hidden + kv_width) + 3 * (hidden + inner)
    one_adapter = 4 * layers * 4 * ins_and_outs
    assert bench.floor(Scenario(0, 1)) == base + kv_per_row
    assert bench.floor(Scenario(2, 3)) == base + 3 * kv_per_row + 2 * one_adapter
    assert bench.floor(Scenario(32, 3)) == base + 3 * kv_per_row + 3 * one_adapter
    assert bench.floor(Scenario(1, 3, is_merged=True)) == base + 3 * kv_per_row


def test_adapters_without_files_differ_are_not_zero_and_leave_the_embedding_alone() -> None:
    modules = {"q_proj": ModuleSpec("linear", 64, 32), "embed": ModuleSpec("embedding", 99, 64)}
    spec = BaseSpec("tiny", "0" * 64, "llama", 1, modules)
    one, other = (random_weights(spec, 4, torch.bfloat16, seed) for seed in (0, 1))
    assert one.digest != other.digest
    assert list(one.pairs) == ["q_proj"]
    pair = one.pairs["q_proj"]
    assert (pair.lora_a.shape, pair.lora_b.shape) == ((4, 64), (32, 4))
    assert pair.lora_b.abs().max() > 0
    assert not torch.equal(pair.lora_a, other.pairs["q_proj"].lora_a)


@pytest.mark.parametrize(("kind", "expected"), [("torch", "aten::"), ("python", "function calls")])
async def test_a_profile_shows_what_the_engine_thread_did(
    make_bench: MakeBench, capsys: pytest.CaptureFixture[str], kind: str, expected: str
) -> None:
    await make_bench(profile=kind).profile(parse_scenarios("1:2"), num_adapters=1)
    printed = capsys.readouterr().out
    assert "1 adapter, 2 clients" in printed
    assert expected in printed
