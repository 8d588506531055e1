"""A training run from its first step to the written adapter; ends and goes on at any moment."""

import math
import time
from collections.abc import Callable
from contextlib import closing
from typing import Any

import torch

from quickchange_adapters.errors import CannotTrain
from quickchange_adapters.training.adapter_model import (
    WEIGHTS,
    adapter_tensors,
    config_values,
    count_parameters,
    with_adapter,
    write_adapter,
    write_task,
)
from quickchange_adapters.training.base_model import fast_number_format, load_base
from quickchange_adapters.training.checkpoint import (
    Checkpoint,
    drop_checkpoint,
    forget_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from quickchange_adapters.training.prepared import Prepared, Say
from quickchange_adapters.training.run_folder import run_folder
from quickchange_adapters.training.run_log import RunLog
from quickchange_adapters.training.run_result import (
    RunResult,
    find_result,
    forget_result,
    keep_result,
)
from quickchange_adapters.training.stop_signals import Stopped, StopSignals
from quickchange_adapters.training.trainer import Batch, Learned, StepResult, Trainer, plan_batches

ADAPTER_FOLDER = "adapter"
CHECKPOINT_EVERY_S = 30.0

OnStep = Callable[[int, int, dict[str, Any]], None]
"""Is told the step, how many there are, and the values that were logged."""


class TrainingRun:
    """Follows one prepared recipe. `run` may be interrupted and done again.

    `signals` end it after a step, with a checkpoint; whatever else ends it leaves the last one.
    """

    def __init__(
        self, prepared: Prepared, say: Say, on_step: OnStep, signals: StopSignals | None = None
    ) -> None:
        self._signals = signals or StopSignals()
        self._prepared = prepared
        self._recipe = prepared.recipe
        self._say = say
        self._on_step = on_step
        self._batches = plan_batches(prepared.train.rows, self._recipe.loop, self._recipe.seed)
        self._best: Learned | None = None
        self._best_loss = math.inf
        self._best_step = 0
        self._num_worse = 0
        self._step = 0

    @property
    def num_steps(self) -> int:
        """How many steps there are unless validation ends the run early."""
        return len(self._batches)

    def run(self, restart: bool = False) -> RunResult:
        """Train, keep what does best on the validation rows, and write it.

        What was trained to its end before is not trained again while its files are as written.
        `restart`: forget what was trained, and begin at step 1.

        Raises: CannotTrain; Stopped when a signal ended it between two steps.
        """
        with run_folder(self._recipe.output):
            if restart:
                forget_checkpoint(self._recipe.output)
                forget_result(self._recipe.output)
            return self._run()

    def _run(self) -> RunResult:
        started = time.monotonic()
        found = load_checkpoint(self._recipe.output, self._prepared.fingerprint)
        done = self._done_before()
        if done is not None:
            return done
        trainer = self._make_trainer()
        if found is not None:
            self._go_on_from(found, trainer)
        log = RunLog(self._recipe.output, self._step)
        with closing(log):
            self._loop_until_told(trainer, log)
        return self._finish(trainer, time.monotonic() - started)

    def _done_before(self) -> RunResult | None:
        """Return what was trained to its end before; its task is the one of the recipe now."""
        output = self._recipe.output
        done = find_result(output, self._prepared.fingerprint, output / ADAPTER_FOLDER)
        if done is not None:
            write_task(done.adapter_folder, self._recipe.task.to_json())
            drop_checkpoint(output)
            self._say(
                f"{done.adapter_folder} was trained before, from the same recipe, rows and base; "
                "--restart trains it again"
            )
        return done

    def _make_trainer(self) -> Trainer:
        recipe = self._recipe
        dtype = fast_number_format(recipe.loop.compute)
        base = load_base(self._prepared.base_folder, dtype, recipe.base_bits, recipe.base_storage)
        torch.manual_seed(recipe.seed)
        model = with_adapter(base, recipe.adapter, self.num_steps)
        self._say(str(count_parameters(model)))
        if recipe.base_bits != 16 and recipe.base_storage == "dense":
            self._say(
                f"the base's linears are rounded to {recipe.base_bits} bits and held dense: this "
                "shows what fewer bits do to quality, and saves no memory"
            )
        return Trainer(model, recipe.loop, self.num_steps)

    def _go_on_from(self, found: Checkpoint, trainer: Trainer) -> None:
        trainer.load_state(found.state)
        self._step = found.step
        self._best, self._best_loss = found.best, found.best_loss
        self._best_step, self._num_worse = found.best_step, found.num_worse
        self._say(f"going on after step {self._step} of {self.num_steps}")

    def _save(self, trainer: Trainer) -> None:
        state = trainer.state()
        best = (self._best, self._best_loss, self._best_step, self._num_worse)
        checkpoint = Checkpoint(self._prepared.fingerprint, self._step, state, *best)
        save_checkpoint(self._recipe.output, checkpoint)

    def _loop_until_told(self, trainer: Trainer, log: RunLog) -> None:
        with self._signals.held():
            try:
                self._loop(trainer, log)
            except Stopped:
                self._save(trainer)
                self._say(f"stopped after step {self._step}; the same command goes on from there")
                raise

    def _loop(self, trainer: Trainer, log: RunLog) -> None:
        saved_at_s = time.monotonic()
        while self._step < self.num_steps and self._num_worse < self._recipe.loop.patience:
            values = self._one_step(trainer, self._batches[self._step])
            log.write(**values)
            self._on_step(self._step, self.num_steps, values)
            self._signals.obey()
            is_due = time.monotonic() - saved_at_s > CHECKPOINT_EVERY_S
            if is_due or "validation_loss" in values:
                self._save(trainer)
                saved_at_s = time.monotonic()

    def _one_step(self, trainer: Trainer, batch: Batch) -> dict[str, Any]:
        started, cpu_started = time.monotonic(), time.process_time()
        torch.manual_seed(self._recipe.seed * 1_000_003 + self._step)  # for dropout
        result = trainer.step(self._step + 1, batch)
        if not math.isfinite(result.loss):
            raise CannotTrain(
                f"step {self._step + 1}: the loss is {result.loss}; try a lower "
                "training.learning_rate, with --restart"
            )
        self._step += 1
        values = _values(self._step, result, self._recipe.loop.learning_rate)
        if self._step % self._validate_every() == 0 or self._step == self.num_steps:
            values["validation_loss"] = round(self._validate(trainer), 5)
        values["seconds"] = round(time.monotonic() - started, 3)
        values["cpu_seconds"] = round(time.process_time() - cpu_started, 3)
        return values

    def _validate_every(self) -> int:
        """Return how many steps there are between looks: four an epoch, twenty a run at most."""
        loop = self._recipe.loop
        an_epoch = len(self._prepared.train.rows) // loop.batch_rows
        return loop.validate_every or max(1, an_epoch // 4, self.num_steps // 20)

    def _validate(self, trainer: Trainer) -> float:
        loss = trainer.loss(self._prepared.validation.rows)
        if loss < self._best_loss:
            self._best_loss, self._best_step, self._num_worse = loss, self._step, 0
            self._best = trainer.learned()
        else:
            self._num_worse += 1
        return loss

    def _finish(self, trainer: Trainer, seconds: float) -> RunResult:
        recipe = self._recipe
        if self._step < self.num_steps:
            self._say(f"no better for {self._num_worse} looks: ended after step {self._step}")
        if self._best is None:
            raise CannotTrain(
                "the validation loss was never a number; try a lower training.learning_rate, "
                "with --restart"
            )
        trainer.take_over(self._best)
        folder = recipe.output / ADAPTER_FOLDER
        dtype = getattr(torch, recipe.adapter.number_format)
        tensors = adapter_tensors(trainer.model, dtype)
        config = config_values(trainer.model.peft_config["default"], recipe.adapter.base_name)
        write_adapter(folder, config, tensors, recipe.task.to_json())
        result = RunResult(
            count_parameters(trainer.model),
            self._step,
            self._best_step,
            self._best_loss,
            seconds,
            folder,
            (folder / WEIGHTS).stat().st_size,
        )
        keep_result(recipe.output, self._prepared.fingerprint, result)
        drop_checkpoint(recipe.output)
        return result


def _values(step: int, result: StepResult, learning_rate: float) -> dict[str, Any]:
    return {
        "step": step,
        "loss": round(result.loss, 5),
        "learning_rate": learning_rate * result.learning_rate_share,
        "tokens": result.num_tokens,
    }
