"""A run in somebody's experiment tracker. Knows what is logged, not how it is trained."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from quickchange_adapters.errors import CannotTrain
from quickchange_adapters.training.recipe import Recipe

TRACKERS = ("mlflow",)


class Tracker(Protocol):
    """Somewhere that a run is written down."""

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Write down what a step logged."""
        ...

    def finish(self, figures: Mapping[str, float], files: list[Path]) -> None:
        """Write down what came out, and close."""
        ...


class NoTracker:
    """Nobody asked."""

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Do nothing."""

    def finish(self, figures: Mapping[str, float], files: list[Path]) -> None:
        """Do nothing."""


class MlflowTracker:
    """MLflow, at the place that its own variable `MLFLOW_TRACKING_URI` names.

    Raises: CannotTrain when it is not installed or does not answer.
    """

    def __init__(self, recipe: Recipe) -> None:
        try:
            import mlflow
        except ImportError as error:
            raise CannotTrain("--track mlflow needs mlflow: pip install mlflow") from error
        self._mlflow: Any = mlflow
        try:
            mlflow.start_run(run_name=recipe.file.resolve().parent.name)
            mlflow.log_params(_parameters(recipe))
        except Exception as error:  # of mlflow, or of what it keeps its runs in
            raise CannotTrain(f"mlflow cannot begin a run: {error}") from error

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Write down what a step logged."""
        numbers = {key: float(value) for key, value in values.items() if key != "step"}
        self._mlflow.log_metrics(numbers, step=step)

    def finish(self, figures: Mapping[str, float], files: list[Path]) -> None:
        """Write down what came out, and close."""
        self._mlflow.log_metrics(dict(figures))
        for file in files:
            if file.exists():
                self._mlflow.log_artifact(str(file))
        self._mlflow.end_run()


def tracker_of(name: str | None, recipe: Recipe) -> Tracker:
    """Return the tracker of a name; None is none.

    Raises: CannotTrain.
    """
    if name is None:
        return NoTracker()
    if name not in TRACKERS:
        raise CannotTrain(f"--track {name!r} is not known; use {' or '.join(TRACKERS)}")
    return MlflowTracker(recipe)


def _parameters(recipe: Recipe) -> dict[str, str]:
    """Return the settings that decide what is learned, as flat names and texts."""
    values: dict[str, Any] = {"base": recipe.base, "base_bits": recipe.base_bits}
    values |= {"seed": recipe.seed}
    for table, settings in (("adapter", recipe.adapter), ("training", recipe.loop)):
        values |= {f"{table}.{key}": value for key, value in asdict(settings).items()}
    return {key: str(value) for key, value in values.items()}
