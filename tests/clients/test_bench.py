"""`bench` against a real server: figures add up, a failing request is a sentence."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from quickchange_client.cli.bench_command import summary
from quickchange_client.closed_loop import LoadFigures, LoadPlan, RequestTimes, percentile

from tests.clients.real_server import real_server

BASE = "tiny"


@pytest.fixture(scope="module")
def url(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with real_server(tiny_base, tmp_path_factory.mktemp("bench") / "store", BASE) as address:
        yield address


def run(url: str, *words: str) -> "subprocess.CompletedProcess[str]":
    program = "from quickchange_client.cli import app; app()"
    command = [sys.executable, "-c", program, "bench", "--url", url, *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_figures_add_up(url: str) -> None:
    words = ("--clients", "2", "--requests", "2", "--prompt-words", "3", "--tokens", "5", "--json")
    done = run(url, *words)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["models"], found["requests"]) == ([BASE], 4)
    assert found["generated_tokens"] == 4 * 5
    assert found["tokens_per_s"] > 0
    assert 0 < found["ttft_ms"]["p50"] <= found["e2e_ms"]["p50"] <= found["e2e_ms"]["p99"]


def test_a_table_for_people(url: str) -> None:
    done = run(
        url, BASE, "--clients", "1", "--requests", "1", "--prompt-words", "2", "--tokens", "2"
    )
    assert done.returncode == 0, done.stderr
    assert "1 requests by 1 clients" in done.stdout
    assert "TTFT" in done.stdout


def test_a_model_that_is_not_there_is_a_sentence(url: str) -> None:
    done = run(url, "nobody", "--clients", "2", "--requests", "1")
    assert done.returncode == 1
    assert "nobody" in done.stderr
    assert "Traceback" not in done.stderr


def test_times_and_rates() -> None:
    one = RequestTimes(ttft_s=0.1, e2e_s=0.5, gaps_s=[0.1, 0.3], num_prompt_tokens=7, num_tokens=3)
    shown = summary(LoadPlan(("a",), 1, 1), LoadFigures((one,), 1.5))
    assert (shown["tokens_per_s"], shown["tpot_ms"]["p50"]) == (2.0, 200.0)
    assert shown["itl_ms"] == {"p50": 300.0, "p95": 300.0, "p99": 300.0}
    assert percentile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert percentile([], 0.5) == 0.0
