"""What becomes of requests when a step is over, or has failed: tokens, ends, things given back."""

import logging
import time
from collections.abc import Sequence as SequenceOf

from quickchange_server.engine.model_runner import ModelRunner
from quickchange_server.engine.request import FinishReason, RequestFailure, TokenOutput
from quickchange_server.engine.residency import AdapterResidency
from quickchange_server.engine.sampler import Sample
from quickchange_server.engine.scheduler import ScheduledRow, ScheduledStep, Scheduler
from quickchange_server.engine.sequence import Sequence
from quickchange_server.engine.step_budget import StepBudget, is_out_of_memory
from quickchange_server.engine.step_results import token_output

log = logging.getLogger(__name__)


class StepOutcomes:
    """Hands a step's results to its rows. A row whose request ended meanwhile is passed over."""

    def __init__(
        self,
        scheduler: Scheduler,
        runner: ModelRunner,
        residency: AdapterResidency,
        budget: StepBudget,
    ) -> None:
        self._scheduler = scheduler
        self._runner = runner
        self._residency = residency
        self._budget = budget

    def live_rows(self, rows: SequenceOf[ScheduledRow]) -> list[ScheduledRow]:
        """Return the rows whose requests still run."""
        running = set(self._scheduler.running)
        return [row for row in rows if row.sequence in running]

    def advance(
        self,
        rows: SequenceOf[ScheduledRow],
        samples: SequenceOf[Sample | None],
        outputs: list[TokenOutput],
    ) -> None:
        """Take a step's results, one for each row."""
        self._budget.note_success()
        running = set(self._scheduler.running)
        damaged: set[str] = set()
        for row, sample in zip(rows, samples, strict=True):
            if row.sequence in running:
                self._advance(row, sample, outputs, damaged)
        self._residency.note_damage(damaged)

    def recover(self, step: ScheduledStep, error: Exception, outputs: list[TokenOutput]) -> None:
        """A failed step: out of memory is tried again smaller; else all its rows fail."""
        rows = self.live_rows(step.rows)
        if not rows:
            return
        if not is_out_of_memory(error):
            log.error("a step of %d rows failed", len(rows), exc_info=error)
            failure = RequestFailure("step_failed", f"the step failed: {type(error).__name__}")
            for row in rows:
                outputs.append(self.end(row.sequence, "error", failure=failure, is_damaged=True))
            return
        if self._budget.shrink(step.num_tokens):
            log.warning("out of memory at %d tokens: trying fewer", step.num_tokens)
            return
        largest = max(self._scheduler.running, key=lambda sequence: len(sequence.token_ids))
        log.error("out of memory at a single token: giving up request %s", largest.request_id)
        failure = RequestFailure(
            "out_of_memory",
            f"not enough memory to go on with {len(largest.token_ids)} tokens of context",
        )
        outputs.append(self.end(largest, "error", failure=failure, is_damaged=True))

    def end(
        self,
        sequence: Sequence,
        reason: FinishReason,
        *,
        failure: RequestFailure | None = None,
        is_damaged: bool = False,
    ) -> TokenOutput:
        """End a request without another token."""
        self._release(sequence, is_damaged=is_damaged)
        return TokenOutput(sequence.request_id, (), reason, failure=failure)

    def _advance(
        self,
        row: ScheduledRow,
        sample: Sample | None,
        outputs: list[TokenOutput],
        damaged: set[str],
    ) -> None:
        """Take one row's result: its KV counts as computed, its token is appended."""
        sequence = row.sequence
        self._scheduler.note_computed(row)
        if sample is None:
            return
        if sample.token_id is None:
            outputs.append(self._fail_row(sequence, sample, damaged))
            return
        is_first = sequence.first_token_s is None
        if is_first:
            sequence.first_token_s = time.monotonic()
        sequence.token_ids.append(sample.token_id)
        output = token_output(sequence, sample, is_first=is_first)
        outputs.append(output)
        if output.finish_reason is not None:
            self._release(sequence)

    def _fail_row(self, sequence: Sequence, sample: Sample, damaged: set[str]) -> TokenOutput:
        if sample.error is not None:
            failure = RequestFailure("sampling_failed", f"sampling failed: {sample.error}")
            return self.end(sequence, "error", failure=failure)
        adapters = sequence.request.adapters
        if len(adapters) == 1:  # in a mix nobody can tell whose fault it was
            damaged.add(adapters[0].digest)
        failure = RequestFailure("non_finite", "the model produced non-finite values")
        return self.end(sequence, "error", failure=failure, is_damaged=True)

    def _release(self, sequence: Sequence, *, is_damaged: bool = False) -> None:
        """Give back all that a sequence holds; damaged KV is neither shared nor left behind."""
        freed = self._scheduler.remove(sequence, forget=is_damaged)
        self._residency.leave(sequence.request)
        if is_damaged:
            self._clear(freed)

    def _clear(self, blocks: SequenceOf[int]) -> None:
        try:
            self._runner.clear_blocks(blocks)
        except Exception:
            log.exception("could not clear %d KV blocks", len(blocks))
