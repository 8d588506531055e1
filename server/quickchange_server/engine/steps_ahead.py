"""The step that runs, and whether the next one may be launched before its tokens are known.

While a batch is steady the device never waits for the host, which hands out the tokens of step n
while step n + 1 runs. That is launched only where nothing can change its rows but a token of n that
ends an answer. Such a row, or one that was aborted meanwhile, is computed in vain, unnoticed:

| what it touches | why it harms nobody |
|---|---|
| the KV of its next position | a block is shared when it counts as computed (`kv_cache.py`) |
| that block, free meanwhile | its next owner's writes, and zeros after damage, are queued behind |
| its adapters' rows, free meanwhile | moves are queued behind; fills wait for a later fence |
| its neighbours | rows do not depend on each other |
| its token | the request runs no more: it is passed over (`outcomes.py`) |
| its input | a valid token, also where the logits were not finite |

What else the host does meanwhile (calls from the inbox; slots that are published, evicted, moved)
is queued in the same stream, or only changes tables that are uploaded behind this step.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

from quickchange_server.engine.decode_launch import DecodeLaunch
from quickchange_server.engine.model_runner import ModelRunner
from quickchange_server.engine.sampler import Sample
from quickchange_server.engine.scheduler import ScheduledStep, Scheduler
from quickchange_server.engine.step_groups import StepGroup, StepGroups


@dataclass(frozen=True, slots=True)
class RunningStep:
    """A step whose results are still to be taken: computed, launched, or failed at its launch."""

    step: ScheduledStep
    group: StepGroup
    result: DecodeLaunch | list[Sample | None] | Exception
    started_s: float | None
    """None: it was launched ahead, and has the device when the step before it is over."""

    def samples(self) -> list[Sample | None]:
        """Return its rows' results, as soon as they are there. Raises: what the step failed at."""
        if isinstance(self.result, Exception):
            raise self.result
        return self.result.samples() if isinstance(self.result, DecodeLaunch) else self.result


class StepsAhead:
    """Starts steps, and holds the one that was launched ahead of its turn.

    `groups` says what rows run together; `is_interrupted`: whether a call waits to be run first.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        runner: ModelRunner,
        groups: Callable[[], StepGroups],
        is_interrupted: Callable[[], bool],
    ) -> None:
        self._scheduler = scheduler
        self._runner = runner
        self._groups = groups
        self._is_interrupted = is_interrupted
        self._next: RunningStep | None = None
        self.num_launched = 0
        """How many steps were launched before the last one's tokens were known."""

    def start(self, step: ScheduledStep, group: StepGroup) -> RunningStep:
        """Start a step in its turn; most are over when this returns."""
        started_s = time.monotonic()
        try:
            self._runner.prepare_blocks(step.fresh_blocks)
            result = self._runner.run(step.rows, group.copy)
        except Exception as error:
            return RunningStep(step, group, error, started_s)
        return RunningStep(step, group, result, started_s)

    def take(self) -> RunningStep | None:
        """Return the step that runs already; None, if there is none or all its requests ended."""
        running, self._next = self._next, None
        return running if self._scheduler.running else None

    def launch_after(self, running: RunningStep) -> None:
        """Launch what comes behind a step that runs, if nothing else can come. Never raises."""
        launch = running.result
        if not isinstance(launch, DecodeLaunch) or self._is_interrupted():
            return
        group, *others = self._groups().split(launch.rows)
        if others or group.copy is not None:
            return
        step = self._scheduler.schedule_after(launch.rows)
        if step is not None:
            self._next = self._launch(launch, step)

    def drop(self) -> None:
        """Forget the step that was launched ahead: the one before it failed."""
        self._next = None

    def _launch(self, launch: DecodeLaunch, step: ScheduledStep) -> RunningStep | None:
        group = StepGroup(step.rows)
        try:
            self._runner.prepare_blocks(step.fresh_blocks)
            result = self._runner.run_after(launch, step.rows)
        except Exception as error:  # of that step alone: the one before it is finished first
            return RunningStep(step, group, error, None)
        if result is None:
            return None
        self.num_launched += 1
        return RunningStep(step, group, result, None)
