"""`quickchange train` as a process that is told to stop: its exit code, its words, what is kept."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from psutil import Process, wait_procs
from quickchange_adapters.training.checkpoint import NAME as CHECKPOINT
from quickchange_adapters.training.run_log import read_log

from tests.adapters.training.training_world import ROWS, write_rows

RECIPE = """\
base = "{base}"
[data]
train = "train.jsonl"
[training]
batch_rows = 4
epochs = 1000
patience = 1000
max_steps = {steps}
compute = "float32"
"""
STEPS = 1200
"""Some ten seconds."""
WAIT_S = 400


@pytest.fixture
def recipe(tmp_path: Path, tiny_base: Path) -> Path:
    write_rows(tmp_path / "train.jsonl", ROWS)
    file = tmp_path / "recipe.toml"
    file.write_text(RECIPE.format(base=tiny_base, steps=STEPS))
    return file


def started(recipe: Path, *words: str, ignored: int | None = None) -> "subprocess.Popen[str]":
    """Start a command, as `nohup` would with a signal that is ignored; wait for its first steps.

    Whether these tests themselves run in a shell's background makes no difference to it.
    """

    def ignore() -> None:
        for number in (signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        if ignored is not None:
            signal.signal(ignored, signal.SIG_IGN)

    process = subprocess.Popen(
        [sys.executable, "-m", "quickchange_server.cli", "train", *words],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        preexec_fn=ignore,
    )
    wait_for_steps(recipe.parent, process, 3)
    return process


def wait_for_steps(folder: Path, process: "subprocess.Popen[str]", num_steps: int) -> None:
    deadline_s = time.monotonic() + WAIT_S
    while num_logged(folder) < num_steps:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline_s
        time.sleep(0.02)


def num_logged(folder: Path) -> int:
    return len(read_log(folder / "train_log.jsonl"))


def told(process: "subprocess.Popen[str]", number: int) -> str:
    """Tell a process to stop; return what it said. Its exit code is the shells' for the signal."""
    process.send_signal(number)
    said = process.communicate(timeout=WAIT_S)[1]
    assert process.returncode == 128 + number, said
    assert "Traceback" not in said
    return said


def test_told_to_stop_it_keeps_what_was_done_and_says_how_to_go_on(recipe: Path) -> None:
    folder = recipe.parent
    said = told(started(recipe, str(recipe)), signal.SIGINT)
    num_steps = num_logged(folder)
    assert 3 <= num_steps < STEPS
    assert f"stopped after step {num_steps}; the same command goes on from there" in said
    assert (folder / CHECKPOINT).exists()
    again = started(recipe, str(recipe), ignored=signal.SIGHUP)
    wait_for_steps(folder, again, num_steps + 1)
    again.send_signal(signal.SIGHUP)
    wait_for_steps(folder, again, num_logged(folder) + 3)
    said = told(again, signal.SIGTERM)
    assert f"going on after step {num_steps} of {STEPS}" in said


def test_a_sweep_stops_its_cell_with_a_checkpoint_and_leaves_no_process(recipe: Path) -> None:
    study = recipe.with_name("study.toml")
    study.write_text("[[cell]]\nrank = 2\n")
    cell = recipe.parent / "sweep" / "rank-2" / "recipe.toml"
    said = told(started(cell, "sweep", str(study)), signal.SIGTERM)
    assert said.endswith("stopped; the same command goes on from there\n")
    num_steps = num_logged(cell.parent)
    assert num_steps < STEPS
    found = torch.load(cell.with_name(CHECKPOINT), weights_only=True)
    assert found["step"] == num_steps


def test_a_sweep_that_is_killed_leaves_no_process_and_its_cell_a_checkpoint(recipe: Path) -> None:
    study = recipe.with_name("study.toml")
    study.write_text("[[cell]]\nrank = 2\n")
    cell = recipe.parent / "sweep" / "rank-2" / "recipe.toml"
    process = started(cell, "sweep", str(study))
    children = Process(process.pid).children()
    process.kill()
    process.communicate(timeout=WAIT_S)  # its child has the same standard error
    assert wait_procs(children, WAIT_S)[1] == []
    assert children
    num_steps = num_logged(cell.parent)
    assert num_steps < STEPS
    found = torch.load(cell.with_name(CHECKPOINT), weights_only=True)
    assert found["step"] == num_steps
