"""More adapters than fit: who is asked for, what ceilings mean, and what is set against what."""

import asyncio
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from quickchange_adapters.pool import AdapterPool
from quickchange_server.engine.base_model import load_base
from quickchange_server.engine.settings import EngineSettings

from benchmarks.closed_loop import Work
from benchmarks.oversubscription import (
    Case,
    OversubscriptionBench,
    Run,
    adapter_bytes,
    ceilings,
    oversubscription_results,
    oversubscription_table,
    read_orders,
)
from benchmarks.timing import Figures
from benchmarks.workload import Prompts
from tests.benchmarks.recording_server import NUM_TOKENS, recording


def run_at(rate: float, ttft_s: float) -> Run:
    return Run(Figures(rate, ttft_s, 2 * ttft_s, 0.01, 0.02, 0.015, 1.0, 2.0, 1.0), 4, 0.5)


@pytest.mark.parametrize("rank", [4, 16])
def test_the_ceiling_holds_as_many_adapters_as_was_said_and_no_more(
    tiny_base: Path, rank: int
) -> None:
    base = load_base(tiny_base, EngineSettings(dtype="bfloat16"))
    device, host = ceilings(adapter_bytes(tiny_base, rank, 2), 3, 5)
    pool = AdapterPool(base.layout, device, torch.bfloat16, base.device)
    rows = max(8, rank)
    assert pool.num_rows // rows == 3
    assert host == 5 * rows * pool.row_bytes


async def test_each_order_asks_for_what_it_says() -> None:
    options = Namespace(slots=2, order=("turn", "zipf"), exponent=1.0, clients=2, repeats=1, seed=3)
    work = Work(Prompts(4, seed=0), NUM_TOKENS, requests_per_client=4)
    async with recording() as (server, target):
        bench = await asyncio.to_thread(OversubscriptionBench, target, work, options)
        runs = await asyncio.to_thread(bench.run_all)
    warmed = {body["model"] for body in server.bodies if body["max_tokens"] != NUM_TOKENS}
    assert warmed == {f"bench-{index:03d}" for index in range(8)}
    measured = [body["model"] for body in server.bodies if body["max_tokens"] == NUM_TOKENS]
    assert measured[:8] == ["bench-000"] * 8  # half of two is one
    assert sorted(measured[24:32]) == sorted(f"bench-{index:03d}" for index in range(8))
    assert [each[0].num_used for each in runs.values()][:4] == [1, 2, 4, 8]
    assert len(runs) == 8


def test_figures_are_set_against_half_as_many_in_the_same_round() -> None:
    half, twice = [run_at(100, 0.1), run_at(10, 0.2)], [run_at(80, 0.15), run_at(9, 0.2)]
    runs = {Case(0.5, "uniform"): half, Case(2.0, "uniform"): twice}
    row = oversubscription_table(runs).splitlines()[3]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells == [
        "2×", "uniform", "4", "0.50", "44.5 (9.0–80.0)", "0.85", "175 / 350", "1.25",
    ]  # fmt: skip
    results = oversubscription_results(runs)
    assert results[1]["ttft_p50_of_half"] == pytest.approx(1.25)


def test_orders_are_read() -> None:
    assert read_orders("zipf,turn") == ("zipf", "turn")
    with pytest.raises(ValueError, match="'pareto' is none of"):
        read_orders("pareto")
