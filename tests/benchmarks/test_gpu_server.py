"""The run against a server on a GPU: that its checks notice, and that it works where there is none.

A slip in a line that only a lent GPU reaches would cost the whole lease.
"""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.failure import BenchmarkFailure
from benchmarks.gpu_server_api import Answer, Metrics, Reply
from benchmarks.gpu_server_checks import counted_series, refused
from benchmarks.gpu_server_findings import Checks, Outcome, found_by
from benchmarks.gpu_server_loads import gap_row, pick_with_base
from benchmarks.gpu_server_merging import likeness
from benchmarks.gpu_server_model import MISSHAPEN, SHAPES, write_adapters, write_base
from benchmarks.gpu_server_oracle import Agreement, Oracle, verdict
from benchmarks.gpu_server_process import run_command, trouble_in
from benchmarks.gpu_session import Session
from benchmarks.swap_stall import Stall
from benchmarks.workload import Scenario, adapter_name

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
SOUND = Agreement(100, 0.97, 60, 0, 0.01)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny base in `base`, and its adapters in `adapters`."""
    folder = tmp_path_factory.mktemp("gpu-server")
    model = write_base(folder / "base", SHAPES["tiny"], torch.float32, CPU)
    write_adapters(model, folder / "adapters")
    return folder


@pytest.fixture
def oracle(made: Path) -> Oracle:
    names = [adapter_name(index) for index in (0, 1)]
    adapters = {name: made / "adapters" / name for name in names}
    return Oracle(made / "base", adapters, torch.float32, CPU)


def said_by_hugging_face(oracle: Oracle, adapter: str | None) -> Answer:
    """Return what a server would answer to a prompt, if it computed as the oracle does."""
    texts = {token: text for text, token in oracle._ids.items()}
    tokens = [texts[token] for token in oracle.prompts(1)[0]]
    blank = Answer("", tokens, (), ())
    forced = oracle.forced(blank, adapter, torch.float32)
    likeliest = [texts[int(token)] for token in forced.argmax]
    return replace(blank, likeliest=likeliest, logprobs=forced.logprobs.tolist())


def test_an_answer_of_the_right_adapter_agrees_and_of_another_does_not(oracle: Oracle) -> None:
    for adapter in (None, adapter_name(0), adapter_name(1)):
        answer = said_by_hugging_face(oracle, adapter)
        assert oracle.judge([answer], adapter)[1]
        others = {None, adapter_name(0), adapter_name(1)} - {adapter}
        assert not any(oracle.judge([answer], other)[1] for other in others)


def test_a_token_that_is_in_no_vocabulary_is_told(oracle: Oracle) -> None:
    with pytest.raises(BenchmarkFailure, match="no token"):
        oracle.ids(["\N{SNOWMAN}"])


@pytest.mark.parametrize(
    ("served", "is_good"),
    [
        (SOUND, True),
        (replace(SOUND, share=0.9), False),
        (replace(SOUND, num_clear_differences=4), False),
        (replace(SOUND, num_clear=3), False),
        (replace(SOUND, share=float("nan")), False),
    ],
)
def test_a_server_may_be_as_far_from_float32_as_peft_is(served: Agreement, is_good: bool) -> None:
    assert verdict(served, SOUND)[1] is is_good


def test_an_adapter_of_another_shape_differs_in_one_matrix_only(made: Path) -> None:
    good, bad = (
        load_file(str(made / "adapters" / name / "adapter_model.safetensors"))
        for name in (adapter_name(0), MISSHAPEN)
    )
    assert good.keys() == bad.keys()
    assert sum(good[name].shape != bad[name].shape for name in good) == 1


def test_likeness_counts_only_places_behind_equal_texts() -> None:
    one = Answer("", ["a", "b", "c", "d"], ["b", "c", "d"], [-0.1, -0.2, -0.3])
    assert likeness(one, one) == (1, 0)
    other = Answer("", ["a", "b", "x", "y"], ["b", "x", "y"], [-0.1, -5.0, -6.0])
    assert likeness(one, other) == (0.5, 0)
    moved = replace(one, logprobs=[-0.4, -0.5, -0.6])
    assert likeness(one, moved)[1] == pytest.approx(0.3)


def test_series_are_summed_by_labels_and_one_that_is_missing_is_no_number() -> None:
    text = '# HELP a b\na_total{x="1",y="q\\"{"} 2.0\na_total{x="2"} 3\nb 4.5\nc_bucket{le="1"} 1'
    seen = Metrics(text)
    assert seen.total("a_total") == 5
    assert seen.total("a_total", x="1") == 2
    assert seen.total("b") == 4.5
    assert not seen.total("a_total", x="3") > 0


def test_device_memory_and_steps_ahead_must_be_counted_on_a_gpu_only() -> None:
    parts = [labels.get("part") for _, labels in counted_series(on_gpu=True)]
    assert "device_allocated" in parts
    assert len(counted_series(on_gpu=False)) == len(parts) - 2


def test_a_refusal_counts_with_its_status_and_code_only() -> None:
    reply = Reply(404, {"error": {"code": "model_not_found"}}, {})
    assert refused(reply, 404, "model_not_found")[1]
    assert not refused(reply, 400, "model_not_found")[1]
    assert not refused(Reply(404, {"error": {"code": "other"}}, {}), 404, "model_not_found")[1]
    assert not refused(Reply(404, {"text": "not found"}, {}), 404, "model_not_found")[1]


def test_several_adapters_take_turns_with_the_base() -> None:
    turns = [pick_with_base(Scenario(2, 4), index) for index in range(4)]
    assert turns == [0, 1, None, 0]
    assert pick_with_base(Scenario(0, 4), 3) is None
    assert pick_with_base(Scenario(1, 4), 3) == 0


def test_a_gap_is_told_in_steps_of_the_streams_alone() -> None:
    row = gap_row("load", Stall((0.1, 0.3, 0.2), 0.01, 0.02, 0.05), 0.01)
    assert row.cells == ("load", "3", "200.0", "10.00 / 20.00", "50.0", "5.0")
    assert gap_row("nothing", Stall((), 0.01, 0.02, 0.02), 0.01).cells[1:3] == ("–", "–")


def test_a_check_that_fails_is_bad_and_the_others_go_on(tmp_path: Path) -> None:
    def fails() -> Outcome:
        raise BenchmarkFailure("no such thing")

    session = Session(100, tmp_path)
    Checks(session).run(
        "some", 1, {"a": fails, "b": lambda: ("2", True), "c": lambda: ("3", False)}
    )
    assert session.failures == ["some: a", "some: c"]
    records = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [each["is"] for each in records] == ["BAD", "good", "BAD"]
    assert "no such thing" in found_by("a", fails).figure


def test_trouble_in_a_log_is_found() -> None:
    good = "Ready after 3 s\n2026 info POST /v1/completions 200"
    assert trouble_in(good) == []
    assert len(trouble_in(f"{good}\nTraceback (most recent call last):\n  x")) == 1
    assert trouble_in("RuntimeError: CUDA error: an illegal memory access was encountered")


def test_a_command_that_hangs_is_told() -> None:
    with pytest.raises(BenchmarkFailure, match="has not ended"):
        run_command("--help", timeout_s=0.01)


def test_the_whole_run_is_good_on_a_cpu(tmp_path: Path) -> None:
    """But for gaps, which need a quiet machine, and starts of further servers, which take long."""
    path = os.pathsep.join(str(ROOT / each) for each in ("server", "adapters", ""))
    kinds = "loads,answers,changes,merging,refusals,agreement"
    command = [sys.executable, "benchmarks/gpu_server.py", "--device", "cpu", "--shape", "tiny"]
    done = subprocess.run(
        [*command, "--only", kinds, "--out", str(tmp_path), "--budget", "280"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path},
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    assert "left out: nothing" in done.stdout
    records = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert sum("check" in each for each in records) > 25
    assert (tmp_path / "serve.log").stat().st_size
    assert "#### Loads" in (tmp_path / "server.md").read_text()
