"""Who runs in the next step: rows, chunks, blocks and slots. Owns the queues; knows no tensors.

Each step, rows in decode come first (one token each), then chunks of prompts under the token
budget, then waiting requests in the order of arrival. Blocks and the adapter's slot are taken
together when a request is admitted, never before, so that waiting requests hold nothing. When
blocks run out, the youngest running request goes back to the head of the line and is computed
anew later.
"""

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from quickchange_adapters.pool import Slot

from quickchange_server.engine.kv_cache import BlockManager
from quickchange_server.engine.sequence import Sequence
from quickchange_server.engine.step_budget import StepBudget

MAX_PASSED_OVER = 64
MAX_SCORED_TOKENS = 64  # prompt tokens of a request whose logits one step makes
TakeSlots = Callable[[Sequence], tuple[Slot, ...] | None]
GiveSlots = Callable[[Sequence], None]


@dataclass(frozen=True, slots=True)
class ScheduledRow:
    """A sequence's share of a step: tokens [start, start + num_tokens) of its token_ids."""

    sequence: Sequence
    start: int
    num_tokens: int

    @property
    def end(self) -> int:
        """Position behind the last token computed."""
        return self.start + self.num_tokens

    @property
    def needs_logits(self) -> bool:
        """Whether this row ends at the newest token, so that the next one can be drawn."""
        return self.end == len(self.sequence.token_ids)


@dataclass(slots=True)
class ScheduledStep:
    """Rows of one step, decode rows first; and what scheduling did on the way.

    `fresh_blocks` hold a former owner's KV and are to be cleared: behind a row's last token a
    product is masked, not skipped, and even a masked NaN spreads.
    """

    rows: list[ScheduledRow] = field(default_factory=list)
    fresh_blocks: list[int] = field(default_factory=list)
    num_preempted: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0

    @property
    def num_tokens(self) -> int:
        """Tokens of all rows."""
        return sum(row.num_tokens for row in self.rows)


class Scheduler:
    """The waiting line and the running set."""

    def __init__(
        self,
        blocks: BlockManager,
        max_rows: int,
        budget: StepBudget,
        take_slots: TakeSlots,
        give_slots: GiveSlots,
    ) -> None:
        self.blocks = blocks
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self._max_rows = max_rows
        self._budget = budget
        self._num_steps = 0
        self._take_slots = take_slots
        self._give_slots = give_slots

    def add(self, sequence: Sequence) -> None:
        """Put a request at the end of the line."""
        self.waiting.append(sequence)

    def find(self, request_id: str) -> Sequence | None:
        """Return the live sequence of a request."""
        for sequence in (*self.running, *self.waiting):
            if sequence.request_id == request_id:
                return sequence
        return None

    def schedule(self) -> ScheduledStep:
        """Choose the rows of the next step and hold what they need; no rows: nothing can run."""
        step = ScheduledStep()
        self._num_steps += 1
        # whoever waited longest comes first, so that a small budget goes round
        in_turn = sorted(self.running, key=lambda sequence: sequence.last_step)
        for is_decode in (True, False):
            for sequence in in_turn:
                if (sequence.num_pending == 1) == is_decode:
                    self._schedule_running(step, sequence)
        self._admit_waiting(step)
        step.fresh_blocks = self.blocks.pop_taken()
        return step

    def note_computed(self, row: ScheduledRow) -> None:
        """Record that a row's KV was computed."""
        row.sequence.num_computed = row.end
        self.blocks.note_computed(row.sequence)

    def remove(self, sequence: Sequence, *, forget: bool = False) -> list[int]:
        """End a sequence wherever it is; give back blocks and slots; return the freed blocks."""
        if sequence in self.running:
            self.running.remove(sequence)
        else:
            self.waiting.remove(sequence)
        return self._give_back(sequence, forget=forget)

    def _give_back(self, sequence: Sequence, *, forget: bool = False) -> list[int]:
        freed = self.blocks.free(sequence, forget=forget)
        self._give_slots(sequence)
        return freed

    def _schedule_running(self, step: ScheduledStep, sequence: Sequence) -> None:
        if sequence not in self.running:
            return  # preempted for an older one in this very step
        num_tokens = self._share(step, sequence)
        if num_tokens <= 0:
            return
        while not self.blocks.grow(sequence, sequence.num_computed + num_tokens):
            victim = self._youngest()
            self._preempt(step, victim)
            if victim is sequence:
                return
        self._append(step, sequence, num_tokens)

    def _share(self, step: ScheduledStep, sequence: Sequence) -> int:
        """How many of its pending tokens a sequence may compute in this step."""
        budget = self._budget.num_tokens - step.num_tokens
        if sequence.request.prompt_logprobs is not None:
            budget = min(budget, MAX_SCORED_TOKENS)
        return min(sequence.num_pending, budget)

    def _append(self, step: ScheduledStep, sequence: Sequence, num_tokens: int) -> None:
        sequence.last_step = self._num_steps
        step.rows.append(ScheduledRow(sequence, sequence.num_computed, num_tokens))

    def _youngest(self) -> Sequence:
        return max(self.running, key=lambda sequence: sequence.arrival_s)

    def _preempt(self, step: ScheduledStep, victim: Sequence) -> None:
        step.rows = [row for row in step.rows if row.sequence is not victim]
        step.num_preempted += 1
        self.running.remove(victim)
        self._give_back(victim)
        self.waiting.appendleft(victim)

    def _admit_waiting(self, step: ScheduledStep) -> None:
        """Admit in order; one that must wait for a slot lets others pass, but not for ever."""
        if step.num_preempted:
            return
        passed_over: list[Sequence] = []
        while self.waiting and len(self.running) < self._max_rows:
            budget = self._budget.num_tokens - step.num_tokens
            if budget <= 0 or any(s.num_passed_over > MAX_PASSED_OVER for s in passed_over):
                break
            sequence = self.waiting.popleft()
            if not self._has_blocks_for(sequence):
                self.waiting.appendleft(sequence)
                break
            slots = self._take_slots(sequence)
            if slots is None:
                passed_over.append(sequence)
                continue
            self._admit(step, sequence, slots)
        if step.rows:
            for sequence in passed_over:
                sequence.num_passed_over += 1
        self.waiting.extendleft(reversed(passed_over))

    def _has_blocks_for(self, sequence: Sequence) -> bool:
        """Whether the whole prompt fits now, with a block to spare while others run."""
        spare = 1 if self.running else 0
        needed = self.blocks.num_needed(len(sequence.token_ids))
        return needed + spare <= self.blocks.num_free

    def _admit(self, step: ScheduledStep, sequence: Sequence, slots: tuple[Slot, ...]) -> None:
        sequence.slots = slots
        sequence.num_passed_over = 0
        self.blocks.adopt_prefix(sequence)
        if sequence.scheduled_s is None:
            sequence.scheduled_s = time.monotonic()
            sequence.num_cached = min(sequence.num_computed, sequence.num_prompt)
        step.prefix_queries += sequence.num_prompt
        step.prefix_hits += min(sequence.num_computed, sequence.num_prompt)
        num_tokens = self._share(step, sequence)
        grown = self.blocks.grow(sequence, sequence.num_computed + num_tokens)
        assert grown, "admission checked the blocks"
        self.running.append(sequence)
        self._append(step, sequence, num_tokens)

    def check_integrity(self) -> None:
        """Assert that waiting sequences hold nothing and that blocks add up."""
        assert all(not s.blocks and not s.slots for s in self.waiting)
        self.blocks.check_integrity(self.running)
