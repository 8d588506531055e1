"""The engine thread: the only one that touches the model, the pool and the KV blocks.

`step` is the whole story: schedule, run, hand out tokens, publish; on a GPU the next step may run
meanwhile (`steps_ahead.py`). Other threads speak to it through an inbox of calls that run between
steps.
"""

import logging
import math
import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from typing import TypeVar

import torch
from quickchange_adapters.pool import Slot

from quickchange_server.engine.copy_demand import CopyDemand
from quickchange_server.engine.departures import Departures
from quickchange_server.engine.inbox import EngineStopped, Inbox
from quickchange_server.engine.interface import EngineSnapshot, ResidentAdapter
from quickchange_server.engine.kv_cache import BlockManager
from quickchange_server.engine.model_runner import ModelRunner
from quickchange_server.engine.observer import EngineObserver, HarmlessObserver
from quickchange_server.engine.outcomes import StepOutcomes
from quickchange_server.engine.request import GenerationRequest, RequestFailure, TokenOutput
from quickchange_server.engine.residency import AdapterResidency
from quickchange_server.engine.scheduler import ScheduledRow, ScheduledStep, Scheduler
from quickchange_server.engine.sequence import Sequence
from quickchange_server.engine.settings import EngineSettings
from quickchange_server.engine.snapshot import SnapshotMaker, StepClock
from quickchange_server.engine.step_budget import StepBudget, is_out_of_memory
from quickchange_server.engine.step_groups import StepGroups
from quickchange_server.engine.step_results import stats_of
from quickchange_server.engine.steps_ahead import RunningStep, StepsAhead

log = logging.getLogger(__name__)
T = TypeVar("T")
Publish = Callable[[list[TokenOutput]], None]
IDLE_WAIT_S = 0.02
MAX_MOVED_BYTES = 8 << 20
"""Of adapters' rows that are moved between two steps of running requests."""
NUM_LOOKED_AHEAD = 16


class Engine:
    """Continuous batching over one base and many adapters, on a thread of its own."""

    def __init__(
        self,
        runner: ModelRunner,
        settings: EngineSettings,
        eos_token_ids: frozenset[int],
        observer: EngineObserver,
        publish: Publish,
        on_exit: Callable[[], None] = lambda: None,
    ) -> None:
        self.runner = runner
        self.settings = settings
        self.eos_token_ids = eos_token_ids
        self.blocks = BlockManager(
            runner.storage.num_blocks, runner.storage.block_size, runner.base.digest
        )
        merged_bytes = settings.merged_bytes
        self.residency = AdapterResidency(
            runner.pool,
            settings.adapter_host_bytes,
            runner.base.num_bytes if merged_bytes is None else merged_bytes,
        )
        # on a GPU steps are replayed from graphs and merged ones are not: costs would mislead
        is_cpu = runner.base.device.type == "cpu"
        self.groups = StepGroups(self.residency.merged, is_on=is_cpu and settings.group_merged)
        self.demand = CopyDemand(self.groups) if settings.auto_merge else None
        budget = StepBudget(settings.max_step_tokens)
        self.scheduler = Scheduler(
            self.blocks,
            settings.max_batch_rows,
            budget,
            self._take_slots,
            self.residency.give_slots,
        )
        self._outcomes = StepOutcomes(self.scheduler, runner, self.residency, budget)
        self.snapshot = EngineSnapshot()
        self._snapshots = SnapshotMaker(self.scheduler, runner, self.residency)
        self._observer = HarmlessObserver(observer)
        runner.pool.on_load = self._observer.on_activation
        self._publish = publish
        self._on_exit = on_exit
        self._inbox = Inbox(self._refresh_snapshot)
        self.ahead = StepsAhead(
            self.scheduler, runner, lambda: self.groups, lambda: not self._inbox.is_empty
        )
        self.residency.loader.wake = lambda: self._inbox.call(lambda: None)
        self.residency.loader.refresh = self._refresh_snapshot
        self._departures = Departures(self.residency, self.call)
        self._unplaced: list[tuple[Sequence, Exception]] = []
        self._num_steps = 0
        self._last_step_s = time.monotonic()
        self._is_stopping = False
        self._can_admit = False
        self._thread = threading.Thread(target=self._run, name="quickchange-engine", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._refresh_snapshot()
        self._thread.start()

    def stop(self) -> None:
        """Abort what runs and join the thread."""
        if self._thread.is_alive():
            self.call(self._stop_here)
            self._thread.join()

    def call(self, function: Callable[[], T]) -> "Future[T]":
        """Run a function on the engine thread between two steps."""
        return self._inbox.call(function)

    def submit(self, request: GenerationRequest) -> RequestFailure | None:
        """Queue a request from any thread, or say at once why its adapters cannot be used.

        Its outputs arrive through `publish`.
        """
        refusal = self.residency.claim(request)
        if refusal is None:
            self.call(lambda: self.add(request))
        return refusal

    def abort(self, request_id: str) -> None:
        """End a request from any thread, before the next step."""
        self.call(lambda: self._abort(request_id))

    def unload(self, digest: str) -> "Future[ResidentAdapter | None]":
        """Refuse new requests for a version; resolves when its last request ended, with the bytes.

        Runs from any thread; the refusal holds when this returns.
        """
        return self._departures.begin(digest)

    @property
    def is_idle(self) -> bool:
        """Whether no request runs or waits; on the engine thread."""
        return not self.scheduler.running and not self.scheduler.waiting

    def step(self) -> None:
        """Advance every request that can run by one step; what was gained is published, always."""
        outputs: list[TokenOutput] = []
        try:
            self._prepare_adapters()
            running = self.ahead.take()
            step = self._schedule(outputs) if running is None else running.step
            self.residency.prefetch(self.scheduler.waiting.upcoming(NUM_LOOKED_AHEAD))
            if running is not None:
                self._note_demand(step.rows, self._finish(running, outputs))
            elif step.rows:
                self._run_groups(step, outputs)
        finally:
            self._hand_out(outputs)

    def _schedule(self, outputs: list[TokenOutput]) -> ScheduledStep:
        step = self.scheduler.schedule()
        self._can_admit = bool(step.rows)
        self._give_up_unplaced(outputs)
        return step

    def _prepare_adapters(self) -> None:
        """Publish what came meanwhile, and move rows, a little while requests run."""
        self.residency.admit_copies()
        self.residency.loader.publish()
        self.runner.pool.tidy(MAX_MOVED_BYTES if self.scheduler.running else math.inf)

    def _run_groups(self, step: ScheduledStep, outputs: list[TokenOutput]) -> None:
        """Run what was scheduled: in one step, or merged adapters' rows in steps of their own."""
        step.rows.sort(key=lambda row: (row.num_tokens > 1, row.sequence.request.adapters))
        rows, seconds = step.rows, 0.0
        for group in self.groups.split(rows):
            self._hand_out(outputs)
            # what came before may have ended a row of these, when memory ran out
            step.rows = self._outcomes.live_rows(group.rows)
            if step.rows:
                seconds += self._finish(self.ahead.start(step, group), outputs)
            step = ScheduledStep()
        self._note_demand(rows, seconds)

    def _hand_out(self, outputs: list[TokenOutput]) -> None:
        if outputs:
            self._refresh_snapshot()
            self._publish(list(outputs))
            outputs.clear()

    def _finish(self, running: RunningStep, outputs: list[TokenOutput]) -> float:
        """Take a step's results, behind the launch of the next one; return the step's seconds."""
        self.ahead.launch_after(running)
        step, group = running.step, running.group
        started = self._last_step_s if running.started_s is None else running.started_s
        try:
            samples = running.samples()
        except Exception as error:
            self.ahead.drop()
            self._outcomes.recover(step, error, outputs)
        else:
            self._outcomes.advance(step.rows, samples, outputs)
            if self.demand is not None or self.residency.merged:
                self.groups.costs.observe(group.load, time.monotonic() - started)
        self._num_steps += 1
        self._last_step_s = time.monotonic()
        seconds = self._last_step_s - started
        is_merged, is_ahead = group.copy is not None, running.started_s is None
        self._observer.on_step(stats_of(step, seconds, is_merged=is_merged, is_ahead=is_ahead))
        return seconds

    def _note_demand(self, rows: list[ScheduledRow], seconds: float) -> None:
        if self.demand is not None:
            self.demand.note(rows, seconds)

    def _run(self) -> None:
        if self.settings.num_threads is not None:
            torch.set_num_threads(self.settings.num_threads)
            # PyTorch gives a thread its number at the first question, and would give it the one
            # that some other thread was set to since.
            torch.get_num_threads()
        device = self.runner.base.device
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)  # kernels launch on the thread's current device
        try:
            while not self._is_stopping:
                self._handle_inbox()
                self.step()
                self._departures.finish()
        except BaseException:
            log.exception("the engine thread died")
            raise
        finally:
            self._wind_up()

    def _wind_up(self) -> None:
        """End whatever still waits for this thread: requests, calls, unloads.

        What one part of it fails at, in an engine that died, does not keep the others.
        """
        self._is_stopping = True
        self.snapshot = replace(self.snapshot, is_alive=False)
        self._inbox.close()
        outputs = [self._end_anyhow(sequence) for sequence in self._live_sequences()]
        stopped = EngineStopped("the engine has stopped")
        for part in (
            self._refresh_snapshot,
            lambda: self._publish(outputs),
            lambda: self.residency.stop(stopped),
            lambda: self._departures.stop(stopped),
            self._on_exit,
        ):
            try:
                part()
            except Exception:
                log.exception("the engine's end is not in order")

    def _end_anyhow(self, sequence: Sequence) -> TokenOutput:
        """End a request although what it holds may be in disorder: nobody may go on waiting."""
        try:
            return self._outcomes.end(sequence, "abort")
        except Exception:
            log.exception("request %s was not given back in order", sequence.request_id)
            return TokenOutput(sequence.request_id, (), "abort")

    def _handle_inbox(self) -> None:
        """Run all waiting calls; sleep here while there is nothing to compute."""
        if not self.scheduler.running and not self._can_admit and not self.runner.pool.is_untidy:
            self._touch_ahead()
            self._inbox.run_next(IDLE_WAIT_S if self.scheduler.waiting else 1.0)
        self.run_calls()

    def run_calls(self) -> None:
        """Run what other threads asked for; for whoever calls `step` without the thread, too."""
        self._inbox.run_waiting()

    def _touch_ahead(self) -> None:
        """Get memory for the KV of the next tokens while nobody waits: it takes its time."""
        while self._inbox.is_empty and self.runner.storage.touch_ahead(self.blocks.highest_taken):
            pass

    def _stop_here(self) -> None:
        self._is_stopping = True

    def _live_sequences(self) -> list[Sequence]:
        return [*self.scheduler.running, *self.scheduler.waiting]

    def add(self, request: GenerationRequest) -> None:
        """Queue a request whose adapters are claimed; on the engine thread, or before its start."""
        if self._is_stopping:
            self.residency.leave(request)
            failure = RequestFailure("draining", "the engine is shutting down")
            self._publish([TokenOutput(request.request_id, (), "error", failure=failure)])
            return
        seed = request.sampling.seed
        end_ids = request.stop_token_ids
        if not request.ignore_eos:
            end_ids = end_ids | self.eos_token_ids
        self.scheduler.add(
            Sequence.from_request(
                request, random.getrandbits(63) if seed is None else seed, end_ids
            )
        )

    def _abort(self, request_id: str) -> None:
        sequence = self.scheduler.find(request_id)
        if sequence is not None:
            output = self._outcomes.end(sequence, "abort")
            self._refresh_snapshot()
            self._publish([output])

    def _take_slots(self, sequence: Sequence) -> tuple[Slot, ...] | None:
        """Take a request's slots; a request whose slots cannot be made fails alone."""
        try:
            return self.residency.take_slots(sequence)
        except Exception as error:
            log.exception("no slots for request %s", sequence.request_id)
            self._unplaced.append((sequence, error))
            return None

    def _give_up_unplaced(self, outputs: list[TokenOutput]) -> None:
        for sequence, error in dict(self._unplaced).items():
            code = "out_of_memory" if is_out_of_memory(error) else "load_failed"
            message = f"its adapter could not be brought to the device: {type(error).__name__}"
            outputs.append(
                self._outcomes.end(sequence, "error", failure=RequestFailure(code, message))
            )
        self._unplaced.clear()

    def _refresh_snapshot(self) -> None:
        is_alive = not self._is_stopping
        clock = StepClock(self._num_steps, self._last_step_s, is_alive)
        self.snapshot = self._snapshots.make(clock)
