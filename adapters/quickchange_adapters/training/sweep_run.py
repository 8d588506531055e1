"""Runs the cells of a study, each in a process of its own, so that its memory can be told.

A cell that is done is not done again; one that was interrupted goes on.
"""

import hashlib
import json
import multiprocessing
import os
import resource
import signal
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quickchange_adapters.errors import AdapterError, CannotTrain
from quickchange_adapters.training.prepared import Prepared, Say, prepare
from quickchange_adapters.training.run_log import NAME as LOG
from quickchange_adapters.training.run_log import read_log
from quickchange_adapters.training.stop_signals import Interrupted, StopSignals
from quickchange_adapters.training.sweep import Cell, Sweep

if TYPE_CHECKING:
    from quickchange_adapters.training.run_result import RunResult

RESULTS = "results.jsonl"
TRAINED = "trained.jsonl"
"""In a cell's own folder, so that one whose test was interrupted is not trained again."""
BASE_CELL = "base alone"
EXITED_BY_SIGNAL = 128
"""Exit codes beyond it are of signals that were obeyed; Python has negative ones for the others."""

Result = dict[str, Any]
RunCell = Callable[[Cell, Path], Result]


def in_own_process(cell: Cell, base_folder: Path) -> Result:
    """Run a cell in a process of its own, which is told to stop when this one is, or ends.

    Raises: CannotTrain.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send_result, args=(sender, cell, base_folder))
    process.start()
    sender.close()
    try:
        found: Result | str = receiver.recv()
    except EOFError as error:
        process.join()
        raise CannotTrain(_ended(cell, process.exitcode)) from error
    except KeyboardInterrupt:
        process.terminate()
        raise
    finally:
        process.join()
    if isinstance(found, str):
        raise CannotTrain(found)
    return found


def _ended(cell: Cell, exit_code: int | None) -> str:
    """Say how the process of a cell ended that sent nothing."""
    if exit_code is not None and 0 < exit_code < EXITED_BY_SIGNAL:
        return f"{cell.name!r} failed (see above); the same command goes on from there"
    return (
        f"the process of {cell.name!r} was ended from outside, perhaps for want of memory; "
        "the same command goes on from there"
    )


def _send_result(sender: Connection, cell: Cell, base_folder: Path) -> None:
    """Run a cell and send its result, or why there is none; send nothing if told to stop."""
    signals = StopSignals()
    threading.Thread(target=_stop_with_parent, daemon=True).start()
    try:
        with signals.obeyed():
            sender.send(run_cell(cell, base_folder, signals))
    except (AdapterError, OSError) as error:
        sender.send(str(error))
    except Interrupted as interrupted:
        sys.exit(interrupted.exit_code)


def _stop_with_parent() -> None:
    """Tell this process to stop once the one that started it has ended, even if by `kill -9`."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)


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
    if prepared.test is None:
        return prepared.fingerprint
    recipe = prepared.recipe
    tested = prepared.test.rows[: recipe.evaluation.max_rows]
    digest = hashlib.sha256(repr((recipe.evaluation, recipe.task, tested)).encode())
    return f"{prepared.fingerprint} {digest.hexdigest()}"


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


def run_cell(cell: Cell, base_folder: Path, signals: StopSignals | None = None) -> Result:
    """Train and test one cell; for the base alone, only test it."""
    _hush()
    prepared = prepare(cell.recipe, base_folder, _nobody)
    if cell.name == BASE_CELL:
        return {"name": cell.name, "settings": {}, **_tested(prepared, None)}
    result, adapter = _trained(cell, prepared, signals)
    return result | _tested(prepared, adapter)


def _trained(cell: Cell, prepared: Prepared, signals: StopSignals | None) -> tuple[Result, Path]:
    """Train a cell unless that was done; return what it came to, and where its adapter is."""
    from quickchange_adapters.training.checkpoint import drop_checkpoint, load_checkpoint
    from quickchange_adapters.training.run import ADAPTER_FOLDER, TrainingRun
    from quickchange_adapters.training.run_result import forget_result

    file, adapter = cell.recipe.output / TRAINED, cell.recipe.output / ADAPTER_FOLDER
    result = Results(file).get(prepared.fingerprint)
    if result is None:
        file.unlink(missing_ok=True)  # it is of the adapter that is now replaced
        forget_result(cell.recipe.output)  # a cell that is found says not how much memory it took
        try:
            load_checkpoint(cell.recipe.output, prepared.fingerprint)
        except CannotTrain:  # of the cell as it was written before
            drop_checkpoint(cell.recipe.output)
        done = TrainingRun(prepared, _nobody, _nobody, signals).run()
        result = _result(cell, done) | {"fingerprint": prepared.fingerprint}
        Results(file).add(result)
    return result, adapter


def _result(cell: Cell, done: "RunResult") -> Result:
    """Return what training came to. Its times are those of all steps, also before a stop."""
    log = read_log(cell.recipe.output / LOG)
    return {
        "name": cell.name,
        "settings": dict(cell.settings),
        "parameters": done.parameters.trainable,
        "adapter_bytes": done.adapter_bytes,
        "steps": done.steps,
        "best_step": done.best_step,
        "validation_loss": round(done.best_loss, 5),
        "seconds": round(sum(line["seconds"] for line in log), 1),
        "cpu_seconds": round(sum(line["cpu_seconds"] for line in log), 1),
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10,
    }


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
