"""A run in somebody's experiment tracker. Knows what is logged, not how it is trained."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from quickchange_adapters.errors import CannotTrain
from quickchange_adapters.training.prepared import Say
from quickchange_adapters.training.recipe import Recipe

TRACKERS = ("mlflow",)
RUN_ID_FILE = ".mlflow_run_id"
"""Which run of MLflow an unfinished run of ours is; gone when it is finished."""


class Tracker(Protocol):
    """Somewhere that a run is written down."""

    @property
    def is_begun(self) -> bool:
        """Whether the run is there, and not finished: begun now, or by a process before."""
        ...

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Write down what a step logged."""
        ...

    def finish(self, figures: Mapping[str, float], files: list[Path]) -> None:
        """Write down what came out, and close."""
        ...

    def give_up(self, is_stopped: bool) -> None:
        """Close without a result: somebody stopped the run, or it failed."""
        ...


class NoTracker:
    """Nobody asked."""

    is_begun = False

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Do nothing."""

    def finish(self, figures: Mapping[str, float], files: list[Path]) -> None:
        """Do nothing."""

    def give_up(self, is_stopped: bool) -> None:
        """Do nothing."""


class MlflowTracker:
    """MLflow, at the place that its own variable `MLFLOW_TRACKING_URI` names.

    Its run begins with the first step that is logged, by when the folder is this process's own; a
    run that goes on goes on there too. Once it has begun, MLflow's failures cost no training.

    Raises: CannotTrain when it is not installed; at the first step when it does not answer.
    """

    def __init__(self, recipe: Recipe, say: Say) -> None:
        try:
            import mlflow
        except ImportError as error:
            raise CannotTrain("--track mlflow needs mlflow: pip install mlflow") from error
        self._mlflow: Any = mlflow
        self._recipe = recipe
        self._say = say
        self._id_file = recipe.output / RUN_ID_FILE
        self._is_open = False
        self._has_failed = False

    @property
    def is_begun(self) -> bool:
        """Whether the run is there, and not finished: begun now, or by a process before."""
        return self._is_open or self._id_file.exists()

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Write down what a step logged."""
        if not self._is_open:
            self._begin(goes_on=step > 1)
        numbers = {key: float(value) for key, value in values.items() if key != "step"}
        self._try(lambda: self._mlflow.log_metrics(numbers, step=step))

    def finish(self, figures: Mapping[str, float], files: list[Path]) -> None:
        """Write down what came out, and close."""
        if not self._is_open:
            self._begin(goes_on=True)
        self._try(lambda: self._mlflow.log_metrics(dict(figures)))
        for file in filter(Path.exists, files):
            folder = file.parent.name if file.parent != self._recipe.output else None
            self._try(partial(self._mlflow.log_artifact, str(file), folder))
        self._try(self._mlflow.end_run)
        self._id_file.unlink(missing_ok=True)

    def give_up(self, is_stopped: bool) -> None:
        """Close without a result: somebody stopped the run, or it failed."""
        if self._is_open:
            self._try(lambda: self._mlflow.end_run("KILLED" if is_stopped else "FAILED"))

    def _begin(self, goes_on: bool) -> None:
        with _begun():
            if not (goes_on and self._reopen()):
                self._mlflow.start_run(run_name=self._recipe.file.resolve().parent.name)
        self._is_open = True
        self._id_file.write_text(self._mlflow.active_run().info.run_id, encoding="utf-8")
        with _begun():
            self._mlflow.log_params(_parameters(self._recipe))

    def _reopen(self) -> bool:
        """Go on with the run that was begun here, if it is still known."""
        if not self._id_file.exists():
            return False
        try:
            self._mlflow.start_run(run_id=self._id_file.read_text(encoding="utf-8"))
        except self._mlflow.exceptions.MlflowException:
            return False
        return True

    def _try(self, act: Callable[[], object]) -> None:
        """Tell MLflow something; what it cannot take is said once, and training goes on."""
        try:
            act()
        except Exception as error:  # of mlflow, or of what it keeps its runs in
            if not self._has_failed:
                self._say(f"warning: mlflow does not take what is logged, and misses it: {error}")
            self._has_failed = True


@contextmanager
def _begun() -> Iterator[None]:
    """Say what keeps MLflow from beginning a run.

    Raises: CannotTrain.
    """
    try:
        yield
    except Exception as error:  # of mlflow, or of what it keeps its runs in
        raise CannotTrain(f"mlflow cannot begin a run: {error}") from error


def tracker_of(name: str | None, recipe: Recipe, say: Say) -> Tracker:
    """Return the tracker of a name; None is none.

    Raises: CannotTrain.
    """
    if name is None:
        return NoTracker()
    if name not in TRACKERS:
        raise CannotTrain(f"--track {name!r} is not known; use {' or '.join(TRACKERS)}")
    return MlflowTracker(recipe, say)


@contextmanager
def tracked(tracker: Tracker) -> Iterator[Tracker]:
    """Close the tracker if what is inside does not come to its end."""
    try:
        yield tracker
    except BaseException as error:
        tracker.give_up(is_stopped=isinstance(error, KeyboardInterrupt))
        raise


def _parameters(recipe: Recipe) -> dict[str, str]:
    """Return the settings that decide what is learned, as flat names and texts."""
    values: dict[str, Any] = {"base": recipe.base, "base_bits": recipe.base_bits}
    values |= {"seed": recipe.seed}
    for table, settings in (("adapter", recipe.adapter), ("training", recipe.loop)):
        values |= {f"{table}.{key}": value for key, value in asdict(settings).items()}
    return {key: str(value) for key, value in values.items()}
