"""What is around the engine: the parts of the resident set, and both sides' first tokens."""

import asyncio
import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.closed_loop import Work
from benchmarks.machine import ROOT
from benchmarks.overhead import (
    MIB,
    Overhead,
    http_ttfts,
    memory_rows,
    overhead_tables,
    results_of,
)
from benchmarks.workload import Prompts
from tests.benchmarks.recording_server import NUM_TOKENS, recording

MEMORY = {"code": 200 * MIB, "base": 256 * MIB, "rest": -16 * MIB, "total": 440 * MIB}


def test_the_parts_of_the_resident_set_are_shown_with_their_shares() -> None:
    assert memory_rows(MEMORY) == [
        ("code", "200", "45.5"),
        ("base", "256", "58.2"),
        ("rest", "-16", "-3.6"),
        ("total", "440", "100.0"),
    ]


def test_the_difference_is_between_medians_of_one_round() -> None:
    found = Overhead(
        engine_ttfts_s=[[0.010, 0.020, 0.030], [0.100, 0.200, 0.300]],
        http_ttfts_s=[[0.012, 0.024, 0.500], [0.202, 0.200, 0.300]],
        starts_s=[4.0, 8.0],
        memory_bytes=MEMORY,
    )
    assert found.http_minus_engine_s() == pytest.approx([0.004, 0.002])
    tables = overhead_tables(found)
    difference = next(line for line in tables.splitlines() if "difference" in line)
    assert "3.0" in difference
    assert "4.0–8.0" in tables
    (stored,) = json.loads(json.dumps(results_of(found)))
    assert stored["memory_bytes"]["base"] == 256 * MIB


async def test_first_tokens_over_http_are_timed_one_request_at_a_time() -> None:
    async with recording() as (server, target):
        ttfts_s = await http_ttfts(target, Work(Prompts(4, seed=0), NUM_TOKENS, 1), 3)
    assert len(ttfts_s) == 3
    assert all(seconds >= 0.001 for seconds in ttfts_s)
    assert server.max_running == 1


async def test_a_bare_engine_gives_a_first_token_for_each_request(tiny_base: Path) -> None:
    script = str(ROOT / "benchmarks/overhead_probe.py")
    command = [sys.executable, script, "engine", str(tiny_base), "--requests", "3"]
    done = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ttfts_s = json.loads(done.stdout)["ttfts_s"]
    assert len(ttfts_s) == 3
    assert all(seconds > 0 for seconds in ttfts_s)
