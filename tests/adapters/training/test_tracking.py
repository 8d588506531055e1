"""A run in MLflow: what is told to it when something fails. MLflow itself: `make test-outside`."""

import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from quickchange_adapters.errors import CannotTrain
from quickchange_adapters.training.recipe import recipe_from
from quickchange_adapters.training.tracking import RUN_ID_FILE, MlflowTracker, tracked

from tests.adapters.training.training_world import recipe_values, write_world


class FakeMlflow:
    """Takes no parameters if told so, and remembers how runs ended."""

    exceptions = SimpleNamespace(MlflowException=RuntimeError)

    def __init__(self, takes_parameters: bool) -> None:
        self._takes_parameters = takes_parameters
        self.calls: list[tuple[str, str | None]] = []

    def start_run(self, run_name: str | None = None, run_id: str | None = None) -> None:
        self.calls.append(("start", run_id))

    def active_run(self) -> Any:
        return SimpleNamespace(info=SimpleNamespace(run_id="run-7"))

    def log_params(self, values: Mapping[str, str]) -> None:
        if not self._takes_parameters:
            raise RuntimeError("a value is too long")

    def log_metrics(self, values: Mapping[str, float], step: int | None = None) -> None:
        pass

    def end_run(self, status: str = "FINISHED") -> None:
        self.calls.append(("end", status))


def tracker_in(folder: Path, fake: FakeMlflow, monkeypatch: pytest.MonkeyPatch) -> MlflowTracker:
    monkeypatch.setitem(sys.modules, "mlflow", fake)
    recipe = recipe_from(write_world(folder), recipe_values(folder), {})
    return MlflowTracker(recipe, lambda sentence: None)


def test_a_run_whose_parameters_are_not_taken_is_closed_as_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeMlflow(takes_parameters=False)
    tracker = tracker_in(tmp_path, fake, monkeypatch)
    with (
        pytest.raises(CannotTrain, match="mlflow cannot begin a run: a value is too long"),
        tracked(tracker),
    ):
        tracker.log(1, {"step": 1, "loss": 2.0})
    assert fake.calls == [("start", None), ("end", "FAILED")]
    assert (tmp_path / RUN_ID_FILE).read_text() == "run-7"


def test_a_run_is_begun_until_it_is_finished_also_by_another_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = (
        tracker_in(tmp_path, FakeMlflow(takes_parameters=True), monkeypatch) for _ in range(2)
    )
    assert not first.is_begun
    first.log(1, {"step": 1, "loss": 2.0})
    assert first.is_begun
    assert second.is_begun
    second.finish({"best_step": 1.0}, [])
    assert not tracker_in(tmp_path, FakeMlflow(takes_parameters=True), monkeypatch).is_begun
