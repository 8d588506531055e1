"""MLflow, unmodified, holds what `quickchange train --track mlflow` logged: read by its client.

Runs on the tiny base, into a SQLite file, which is what MLflow itself keeps runs in by default.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

ROOT = Path(__file__).resolve().parents[2]
RECIPE = """\
base = {base}
[data]
train = "train.jsonl"
[adapter]
rank = 3
[training]
batch_rows = 4
epochs = 1000
max_steps = {steps}
patience = 1000
compute = "float32"
"""


class Training:
    """A recipe in a folder, and MLflow's database beside it."""

    def __init__(self, folder: Path, base: Path) -> None:
        self.folder = folder
        self.base = base
        self.client = MlflowClient(f"sqlite:///{folder}/runs.db")
        rows = [{"input": f"the fox {i}", "answer": "yes" if i % 2 else "no"} for i in range(20)]
        (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def start(self, num_steps: int, **variables: str) -> "subprocess.Popen[str]":
        """Begin to train, as a user would who installed MLflow beside Quickchange."""
        text = RECIPE.format(base=json.dumps(str(self.base)), steps=num_steps)
        (self.folder / "recipe.toml").write_text(text)
        path = os.pathsep.join(
            str(ROOT / each) for each in ("server", "adapters", "clients/python")
        )
        uri = f"sqlite:///{self.folder}/runs.db"
        words = ["-m", "quickchange_server.cli", "train", "recipe.toml", "--track", "mlflow"]
        return subprocess.Popen(
            [sys.executable, *words],
            cwd=self.folder,
            env=os.environ | {"PYTHONPATH": path, "MLFLOW_TRACKING_URI": uri} | variables,
            stderr=subprocess.PIPE,
            text=True,
        )

    def log(self) -> list[dict[str, Any]]:
        """Return what Quickchange itself logged; a line that is being written is left out."""
        file = self.folder / "train_log.jsonl"
        lines = file.read_text().split("\n")[:-1] if file.exists() else []
        return [json.loads(line) for line in lines]

    def runs(self) -> list[Run]:
        """Return MLflow's runs."""
        return list(self.client.search_runs(["0"]))

    def history(self, run: Run, name: str) -> list[tuple[int, float]]:
        """Return a metric's steps and values."""
        found = self.client.get_metric_history(run.info.run_id, name)
        return sorted((each.step, each.value) for each in found)


@pytest.fixture
def training(site: Any, tmp_path: Path) -> Training:
    """Return a recipe on the site's base."""
    return Training(tmp_path, site.base_folder)


def finished(process: "subprocess.Popen[str]") -> str:
    """Wait for the end; return what was said."""
    said = process.communicate(timeout=300)[1]
    assert process.returncode == 0, said
    return said


def test_parameters_metrics_and_files_are_read_back(training: Training) -> None:
    finished(training.start(6))
    (run,) = training.runs()
    assert run.info.status == "FINISHED"
    assert run.info.run_name == training.folder.name
    params = run.data.params
    assert (params["adapter.rank"], params["adapter.targets"]) == ("3", "all-linear")
    assert (params["training.max_steps"], params["base_bits"]) == ("6", "16")
    log = training.log()
    for name in ("loss", "learning_rate", "tokens", "validation_loss"):
        wanted = [(line["step"], line[name]) for line in log if name in line]
        assert training.history(run, name) == wanted
    best = min(line["validation_loss"] for line in log if "validation_loss" in line)
    assert run.data.metrics["best_validation_loss"] == pytest.approx(best, abs=1e-4)
    names = {each.path for each in training.client.list_artifacts(run.info.run_id)}
    assert names == {"adapter", "train_log.jsonl", "loss.png"}
    there = Path(training.client.download_artifacts(run.info.run_id, "adapter"))
    here = training.folder / "adapter"
    assert {file.name for file in there.iterdir()} == {file.name for file in here.iterdir()}
    for file in here.iterdir():
        assert (there / file.name).read_bytes() == file.read_bytes()


def test_a_run_that_was_stopped_goes_on_as_the_same_run(training: Training) -> None:
    process = training.start(100)
    deadline_s = time.monotonic() + 240
    while len(training.log()) < 3 and time.monotonic() < deadline_s:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=240)[1]
    assert process.returncode == 143, said
    (run,) = training.runs()
    assert run.info.status == "KILLED"
    num_steps = len(training.log())
    assert 3 <= num_steps < 100
    said = finished(training.start(100))
    assert f"going on after step {num_steps} of 100" in said
    (again,) = training.runs()
    assert (again.info.run_id, again.info.status) == (run.info.run_id, "FINISHED")
    assert [step for step, _ in training.history(again, "loss")] == list(range(1, 101))
    assert not list(training.folder.glob(".mlflow*"))


def test_a_server_that_does_not_answer_is_said_in_one_sentence(training: Training) -> None:
    variables = {"MLFLOW_TRACKING_URI": "http://127.0.0.1:9"}
    process = training.start(6, **variables, MLFLOW_HTTP_REQUEST_MAX_RETRIES="0")
    said = process.communicate(timeout=300)[1]
    assert process.returncode == 1
    assert "error: mlflow cannot begin a run: " in said
    assert "Traceback" not in said
    assert not (training.folder / "adapter").exists()
