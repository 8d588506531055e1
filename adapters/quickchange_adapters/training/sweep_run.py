"""Runs the cells of a study, each in a process of its own, so that its memory can be told.

A cell that is done is not done again; one that was interrupted goes on.
"""

import json
import multiprocessing
import resource
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path
from typing import Any

from quickchange_adapters.errors import CannotTrain
from quickchange_adapters.training.prepared import Prepared, Say, prepare
from quickchange_adapters.training.sweep import Cell, Sweep

RESULTS = "results.jsonl"
BASE_CELL = "base alone"

Result = dict[str, Any]
RunCell = Callable[[Cell, Path], Result]


def in_own_process(cell: Cell, base_folder: Path) -> Result:
    """Run a cell in a process of its own.

    Raises: CannotTrain.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        try:
            return pool.submit(run_cell, cell, base_folder).result()
        except BrokenProcessPool as error:
            raise CannotTrain(
                f"the process of {cell.name!r} was ended from outside, perhaps for want of "
                "memory; the same command goes on from there"
            ) from error


def run_sweep(
    sweep: Sweep, base_folder: Path, say: Say, run: RunCell = in_own_process
) -> list[Result]:
    """Run what is not done yet, and return all results, the base's own first.

    Raises: CannotTrain.
    """
    sweep.output.mkdir(parents=True, exist_ok=True)
    results = Results(sweep.output / RESULTS)
    prepared = [prepare(cell.recipe, base_folder, lambda sentence: None) for cell in sweep.cells]
    jobs: list[tuple[Cell, Prepared]] = list(zip(sweep.cells, prepared, strict=True))
    if prepared[0].test is not None:
        nothing = replace(sweep.cells[0], name=BASE_CELL, settings={})
        jobs.insert(0, (nothing, prepared[0]))
    found = []
    for number, (cell, checked) in enumerate(jobs, start=1):
        fingerprint = f"{cell.name} {_fingerprint(checked)}"
        result = results.get(fingerprint)
        say(f"{number} of {len(jobs)}: {cell.name}" + ("" if result is None else ": done before"))
        if result is None:
            result = run(cell, base_folder) | {"fingerprint": fingerprint}
            results.add(result)
        found.append(result)
    return found


def _fingerprint(prepared: Prepared) -> str:
    """Return what decides a cell's figures: what is learned, and what it is tested on."""
    tested = prepared.test.rows if prepared.test is not None else []
    evaluation = prepared.recipe.evaluation
    most = min(len(tested), evaluation.max_rows)
    return f"{prepared.fingerprint} {evaluation.metric} {most}"


class Results:
    """The results that are there, one JSON object a line."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._found: dict[str, Result] = {}
        if file.exists():
            for line in file.read_text(encoding="utf-8").splitlines():
                self._remember(line)

    def _remember(self, line: str) -> None:
        try:
            result = json.loads(line)
            self._found[result["fingerprint"]] = result
        except (json.JSONDecodeError, KeyError, TypeError):
            return  # cut off when the process was ended; that cell is done again

    def get(self, fingerprint: str) -> Result | None:
        """Return the result of a cell that was done with the same settings and rows."""
        return self._found.get(fingerprint)

    def add(self, result: Mapping[str, Any]) -> None:
        """Keep a result."""
        with self._file.open("a", encoding="utf-8") as stream:
            stream.write("\n" + json.dumps(result))


def run_cell(cell: Cell, base_folder: Path) -> Result:
    """Train and test one cell; for the base alone, only test it."""
    _hush()
    prepared = prepare(cell.recipe, base_folder, _nobody)
    if cell.name == BASE_CELL:
        return {"name": cell.name, "settings": {}, **_tested(prepared, None)}
    result, adapter = _trained(cell, prepared)
    return result | _tested(prepared, adapter)


def _trained(cell: Cell, prepared: Prepared) -> tuple[Result, Path]:
    """Train a cell; return what it came to, and where its adapter is."""
    from quickchange_adapters.training.checkpoint import drop_checkpoint, load_checkpoint
    from quickchange_adapters.training.run import TrainingRun

    try:
        load_checkpoint(cell.recipe.output, prepared.fingerprint)
    except CannotTrain:  # of the cell as it was written before
        drop_checkpoint(cell.recipe.output)
    cpu_started = time.process_time()
    done = TrainingRun(prepared, _nobody, _nobody).run()
    result = {
        "name": cell.name,
        "settings": dict(cell.settings),
        "parameters": done.parameters.trainable,
        "adapter_bytes": done.adapter_bytes,
        "steps": done.steps,
        "best_step": done.best_step,
        "validation_loss": round(done.best_loss, 5),
        "seconds": round(done.seconds, 1),
        "cpu_seconds": round(time.process_time() - cpu_started, 1),
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10,
    }
    return result, done.adapter_folder


def _tested(prepared: Prepared, adapter: Path | None) -> Result:
    """Return the test loss and the metric's first figure, on the base as it is served."""
    from quickchange_adapters.training.evaluation import AskedModels, first_figure, test_rows
    from quickchange_adapters.training.metrics import metric_of

    if prepared.test is None:
        return {}
    metric = metric_of(prepared.recipe)
    models = AskedModels(prepared, test_rows(prepared), metric, lambda *title: _nobody)
    asked = models.base_alone() if adapter is None else models.adapter_alone(adapter)
    figure, value = first_figure(asked.scores)
    return {"test_loss": asked.loss, "figure": figure, "value": value}


def _nobody(*told: Any) -> None:
    """Hear what nobody wants to know."""


def _hush() -> None:
    import warnings

    from transformers.utils import logging

    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
