"""The closed loop against a server with ready-made answers."""

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from benchmarks.closed_loop import ClosedLoop, Work
from benchmarks.failure import BenchmarkFailure
from benchmarks.machine import ROOT
from benchmarks.server_process import Target
from benchmarks.workload import Prompts, Scenario
from tests.benchmarks.recording_server import NUM_TOKENS, RecordingServer, recording


@pytest.fixture
async def server() -> AsyncIterator[tuple[RecordingServer, Target]]:
    async with recording() as both:
        yield both


async def loop_of(target: Target, num_tokens: int = NUM_TOKENS) -> ClosedLoop:
    work = Work(Prompts(4, seed=0), num_tokens, requests_per_client=2)
    return await asyncio.to_thread(ClosedLoop, target, work)


async def test_clients_use_the_adapters_in_turn(server: tuple[RecordingServer, Target]) -> None:
    recording, target = server
    figures = await (await loop_of(target)).measure(Scenario(3, 6))
    models = sorted(str(body["model"]) for body in recording.bodies)
    assert models == ["bench-000"] * 4 + ["bench-001"] * 4 + ["bench-002"] * 4
    assert recording.max_running == 6
    assert figures.tokens_per_piece == 1
    assert figures.tokens_per_s > 0
    assert 0 < figures.ttft_p50_s <= figures.e2e_p50_s


async def test_every_request_asks_for_a_new_prompt_and_a_full_greedy_answer(
    server: tuple[RecordingServer, Target],
) -> None:
    recording, target = server
    await (await loop_of(target)).measure(Scenario(0, 2))
    assert len({body["prompt"] for body in recording.bodies}) == 4
    assert {body["model"] for body in recording.bodies} == {"nothing"}
    first = recording.bodies[0]
    assert (first["max_tokens"], first["temperature"], first["ignore_eos"]) == (NUM_TOKENS, 0, True)


async def test_the_warm_up_reaches_every_adapter(server: tuple[RecordingServer, Target]) -> None:
    recording, target = server
    await (await loop_of(target)).warm_up(Scenario(5, 2))
    assert len({body["model"] for body in recording.bodies}) == 5


async def test_answers_that_end_early_are_not_measured(
    server: tuple[RecordingServer, Target],
) -> None:
    loop = await loop_of(server[1], num_tokens=NUM_TOKENS + 1)
    with pytest.raises(BenchmarkFailure, match="2 of 2 answers did not have 6 tokens"):
        await loop.measure(Scenario(0, 1))


@pytest.mark.parametrize("script", ["throughput", "client_limit"])
def test_a_script_runs_as_a_file_from_anywhere(script: str, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / f"benchmarks/{script}.py"), "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "usage" in done.stdout
