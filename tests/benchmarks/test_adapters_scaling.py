"""More and more adapters: who is asked for how often, and what is set against the base."""

from argparse import Namespace
from collections import Counter

import pytest

from benchmarks.adapters_scaling import (
    BASE,
    Case,
    Run,
    ScalingBench,
    scaling_results,
    scaling_table,
    share_of_base,
)
from benchmarks.closed_loop import Work
from benchmarks.popularity import Popularity, read_counts, read_kinds
from benchmarks.timing import Figures
from benchmarks.workload import Prompts
from tests.benchmarks.recording_server import NUM_TOKENS, recording


def run_at(rate: float, num_used: int = 0) -> Run:
    return Run(Figures(rate, 0.1, 0.2, 0.01, 0.02, 0.015, 1.0, 2.0, 1.0), num_used)


def test_uniform_asks_for_all_alike_and_zipf_for_the_first_ones_most() -> None:
    uniform = Counter(Popularity("uniform", 8, 1.0, seed=0).draw(8000))
    zipf = Counter(Popularity("zipf", 8, 1.0, seed=0).draw(8000))
    assert max(uniform.values()) < 1.2 * min(uniform.values())
    assert [index for index, _ in zipf.most_common()][:3] == [0, 1, 2]
    assert zipf[0] / zipf[1] == pytest.approx(2, rel=0.15)
    assert set(zipf) == set(range(8))


def test_equal_seeds_draw_alike_and_a_higher_exponent_is_more_uneven() -> None:
    draws = [Popularity("zipf", 64, 1.0, seed=5).draw(100) for _ in range(2)]
    assert draws[0] == draws[1]
    assert draws[0] != Popularity("zipf", 64, 1.0, seed=6).draw(100)
    steep = Popularity("zipf", 64, 2.0, seed=5).draw(100)
    assert len(set(steep)) < len(set(draws[0]))


@pytest.mark.parametrize("text", ["", "0", "1,,2", "-4", "eight"])
def test_what_is_no_count_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="no count"):
        read_counts(text)


def test_counts_and_kinds_are_read() -> None:
    assert read_counts("1,32,256") == (1, 32, 256)
    assert read_kinds("zipf,uniform") == ("zipf", "uniform")
    with pytest.raises(ValueError, match="'pareto' is none of"):
        read_kinds("zipf,pareto")


def test_a_share_is_of_the_base_of_the_same_round() -> None:
    base = [run_at(100), run_at(10)]
    runs = [run_at(50, 7), run_at(9, 9)]
    assert share_of_base(runs, base) == pytest.approx(0.7)
    table = scaling_table({BASE: base, Case(32, "zipf"): runs}).splitlines()
    cells = [cell.strip() for cell in table[3].strip("|").split("|")]
    assert cells[:5] == ["32", "zipf", "8", "29.5 (9.0–50.0)", "0.70"]
    results = scaling_results({BASE: base, Case(32, "zipf"): runs})
    assert [each["share_of_base"] for each in results] == [1.0, pytest.approx(0.7)]


async def test_every_adapter_is_used_before_and_rounds_ask_for_what_was_drawn() -> None:
    import asyncio

    options = Namespace(
        adapters=(2, 6), popularity=("zipf",), exponent=1.0, clients=2, repeats=2, seed=3
    )
    work = Work(Prompts(4, seed=0), NUM_TOKENS, requests_per_client=3)
    async with recording() as (server, target):
        bench = await asyncio.to_thread(ScalingBench, target, work, options)
        runs = await asyncio.to_thread(bench.run_all)
    warmed = {body["model"] for body in server.bodies if body["max_tokens"] != NUM_TOKENS}
    assert warmed == {"nothing", *(f"bench-{index:03d}" for index in range(6))}
    assert {case: len(each) for case, each in runs.items()} == {
        BASE: 2,
        Case(2, "zipf"): 2,
        Case(6, "zipf"): 2,
    }
    measured = [body["model"] for body in server.bodies if body["max_tokens"] == NUM_TOKENS]
    drawn = Popularity("zipf", 6, 1.0, seed=4).draw(6)
    assert sorted(measured[-6:]) == sorted(f"bench-{index:03d}" for index in drawn)
    assert runs[Case(6, "zipf")][1].num_used == len(set(drawn))
