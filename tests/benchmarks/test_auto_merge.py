"""The benchmarks of merging by traffic: mixes as asked, both servers alike, ratios of a round."""

import asyncio
from argparse import Namespace
from collections import Counter
from pathlib import Path

import pytest

from benchmarks.auto_merge import AutoMergeBench, MixRuns, merge_table
from benchmarks.closed_loop import Work
from benchmarks.hot_mix import HotMix, read_mixes
from benchmarks.merged_steps import WAYS, MergedStepsBench, costs_table, steps_table
from benchmarks.workload import Prompts
from tests.benchmarks.recording_server import NUM_TOKENS, recording


def test_the_share_is_kept_and_the_rest_is_base_and_cold_ones_alike() -> None:
    counts = Counter(HotMix(0.5, 4).draw(80, seed=1))
    assert counts == {0: 40, None: 10, 1: 10, 2: 10, 3: 10}
    assert HotMix(0.9, 4).draw(50, 1) == HotMix(0.9, 4).draw(50, 1) != HotMix(0.9, 4).draw(50, 2)
    assert set(HotMix(1.0, 1).draw(9, 0)) == {0}
    assert 0 not in HotMix(0.0, 1).draw(9, 0)


def test_mixes_are_read() -> None:
    assert read_mixes("0,1.0", "1") == (HotMix(0.0, 1), HotMix(1.0, 1))
    for shares, clients in (("1.1", "1"), ("0.5", "0"), ("x", "1")):
        with pytest.raises(ValueError, match="no mix|convert"):
            read_mixes(shares, clients)


async def test_both_servers_get_the_same_work_after_a_while_of_it() -> None:
    mix, work = HotMix(0.5, 2), Work(Prompts(4, seed=0), NUM_TOKENS, requests_per_client=4)
    options = Namespace(repeats=2, settle=0.001, seed=3)
    async with recording() as (off, without), recording() as (on, with_it):
        bench = await asyncio.to_thread(AutoMergeBench, without, with_it, work, options)
        runs = await asyncio.to_thread(bench.run_all, (mix,))
    models = [
        Counter(body["model"] for body in server.bodies if body["max_tokens"] == NUM_TOKENS)
        for server in (off, on)
    ]
    assert models[0] - models[1] == {"nothing": 16}  # the base, measured on one of them
    assert models[1]["bench-000"] == 12
    assert [len(each) for each in (runs[mix].base, runs[mix].without, runs[mix].on)] == [2, 2, 2]


def test_ratios_are_of_single_rounds() -> None:
    runs = MixRuns([100, 10], [50, 8], [60, 8], 0.25)
    assert runs.of_without == [1.2, 1.0]
    cells = [
        cell.strip() for cell in merge_table({HotMix(0.9, 1): runs}).splitlines()[2].split("|")
    ]
    assert cells[1:-1] == [
        "90% hot, 1 client",
        "55.0",
        "29.0",
        "34.0",
        "1.100 (1.000)",
        "0.700",
        "25%",
    ]


async def test_every_way_is_run_and_what_steps_cost_is_printed(tiny_base: Path) -> None:
    mixes = read_mixes("0.5", "2")
    options = Namespace(
        model=tiny_base, dtype="float32", kernels="auto", mixes=mixes, rank=4, repeats=1,
        requests=4, tokens=8, prompt_tokens=8, kv_cache_mib=4,
    )  # fmt: skip
    bench = MergedStepsBench(options)
    runs = await bench.run_all(mixes)
    assert {way: len(rates) for way, rates in runs[mixes[0]].items()} == dict.fromkeys(WAYS, 1)
    assert "50% hot, 2 clients" in steps_table(runs)
    assert bench.costs["fixed"] > 0
    assert "adapted decode" in costs_table(bench.costs)
