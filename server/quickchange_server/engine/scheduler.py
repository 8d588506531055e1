"""Who runs in the next step: rows, chunks, blocks and slots. Owns the queues; knows no tensors.

Each step, rows in decode come first (one token each), then waiting requests that are guaranteed a
row (`row_shares.py`), then chunks of prompts under the token budget, then other waiting requests in
fair order (`fair_queue.py`). Blocks and the adapter's slot are taken together when a request is
admitted, never before, so that waiting requests hold nothing. When blocks run out, the youngest
request of the tenant that was given most waits again, in its place, and is computed anew later.

| a waiting request | who passes it |
|---|---|
| for whose adapters there is no slot | requests with other adapters |
| for whose prompt there are no blocks | other tenants' requests |
| passed over for more than `MAX_PASSED_OVER` steps | nobody of its tenant that wants the same |
| passed over for more than `MAX_PASSED_BY_ALL` steps | nobody that wants the same |
"""

import time
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field

from quickchange_adapters.pool import Slot

from quickchange_server.engine.fair_queue import OUTPUT_WEIGHT, PROMPT_WEIGHT, FairQueue
from quickchange_server.engine.kv_cache import BlockManager
from quickchange_server.engine.row_shares import RowShares
from quickchange_server.engine.sequence import Sequence
from quickchange_server.engine.step_budget import StepBudget

MAX_PASSED_OVER = 64
MAX_PASSED_BY_ALL = 256
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
    num_taken: int = 0  # of the budget; else every row would add up all before it
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
        self.waiting = FairQueue()
        self.running: list[Sequence] = []
        self._max_rows = max_rows
        self._budget = budget
        self._shares = RowShares(self.waiting, blocks, max_rows, budget.max_tokens)
        self._num_steps = 0
        self._num_busy_steps = 0
        self._overdue: Sequence | None = None
        self._take_slots = take_slots
        self._give_slots = give_slots

    def add(self, sequence: Sequence) -> None:
        """Let a request wait."""
        self.waiting.add(sequence)

    def find(self, request_id: str) -> Sequence | None:
        """Return the live sequence of a request."""
        return self.waiting.find(request_id)

    def schedule(self) -> ScheduledStep:
        """Choose the rows of the next step and hold what they need; no rows: nothing can run."""
        step = ScheduledStep()
        self._num_steps += 1
        self.waiting.start_step()
        # whoever waited longest comes first, so that a small budget goes round
        in_turn = sorted(self.running, key=lambda sequence: sequence.last_step)
        for sequence in in_turn:
            if sequence.num_pending == 1:
                self._schedule_running(step, sequence)
        prompts = [sequence for sequence in in_turn if sequence.num_pending > 1]
        self._admit_guaranteed(step)
        for sequence in self._prompts_in_turn(prompts):
            self._schedule_running(step, sequence)
        self._admit_waiting(step)
        self._num_busy_steps += bool(step.rows)
        step.fresh_blocks = self.blocks.pop_taken()
        return step

    def schedule_after(self, rows: SequenceOf[ScheduledRow]) -> ScheduledStep | None:
        """Choose the rows of the step after one that still runs, each one token further.

        `rows`: that step's, of one token each, whose tokens are not known. Those that the step ends
        by their length are left out; one that a token ends is computed in vain. None: somebody else
        may have a turn, or there is no room for all; then nothing was taken.
        """
        going = self._rows_after(rows)
        short = [row for row in going if self.blocks.is_short(row.sequence, row.end)]
        if not going or len(short) > self.blocks.num_free:
            return None
        step = ScheduledStep()
        self._num_steps += 1
        self._num_busy_steps += 1
        self.waiting.start_step()
        for row in short:
            grown = self.blocks.grow(row.sequence, row.end)
            assert grown, "all were counted before"
        for row in going:
            row.sequence.last_step = self._num_steps
        step.rows, step.num_taken = going, len(going)
        step.fresh_blocks = self.blocks.pop_taken()
        return step

    def _rows_after(self, rows: SequenceOf[ScheduledRow]) -> list[ScheduledRow]:
        """Return the next rows of those that go on; none, if any other request could run."""
        running = set(self.running)
        live = [row for row in rows if row.sequence in running]
        going = [
            ScheduledRow(row.sequence, row.end, 1)
            for row in live
            if row.sequence.num_generated + 1 < row.sequence.request.max_tokens
        ]
        is_all = len(live) == len(running) and len(going) <= self._budget.num_tokens
        is_closed = not self.waiting or (len(going) == len(running) and self._admits_nobody())
        return going if is_all and is_closed else []

    def _admits_nobody(self) -> bool:
        """Whether all who wait would go on waiting if all who run went on running.

        Of a single tenant only: several take rows and blocks from each other.
        """
        if self.waiting.num_tenants > 1:
            return False
        if len(self.running) >= self._max_rows:
            return True
        self.waiting.start_pass()
        first = self._overdue or self.waiting.next()
        if first is None:  # each was tried for the step that runs, and there were no slots
            return True
        may_run = self._shares.may_take_row(first, len(self.running))
        return not may_run or not self._has_blocks_for(first)

    def note_computed(self, row: ScheduledRow) -> None:
        """Record that a row's KV was computed, and its next token if it was the newest one's."""
        if row.needs_logits:
            self.waiting.charge(row.sequence, OUTPUT_WEIGHT)
        row.sequence.num_computed = row.end
        self.blocks.note_computed(row.sequence)

    def remove(self, sequence: Sequence, *, forget: bool = False) -> list[int]:
        """End a sequence wherever it is; give back blocks and slots; return the freed blocks."""
        if sequence in self.running:
            self.running.remove(sequence)
        self._note_served(sequence)
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
            victim = self._shares.growth_victim(self.running)
            self._preempt(step, victim)
            if victim is sequence:
                return
        self._append(step, sequence, num_tokens)

    def _share(self, step: ScheduledStep, sequence: Sequence) -> int:
        """How many of its pending tokens a sequence may compute in this step."""
        budget = self._budget.num_tokens - step.num_taken
        if sequence.request.prompt_logprobs is not None:
            budget = min(budget, MAX_SCORED_TOKENS)
        return min(sequence.num_pending, budget)

    def _append(self, step: ScheduledStep, sequence: Sequence, num_tokens: int) -> None:
        sequence.last_step = self._num_steps
        step.rows.append(ScheduledRow(sequence, sequence.num_computed, num_tokens))
        step.num_taken += num_tokens

    def _preempt(self, step: ScheduledStep, victim: Sequence) -> None:
        step.rows = [row for row in step.rows if row.sequence is not victim]
        step.num_taken = step.num_tokens
        step.num_preempted += 1
        self.running.remove(victim)
        self._give_back(victim)
        self.waiting.put_back(victim)

    def _prompts_in_turn(self, prompts: list[Sequence]) -> list[Sequence]:
        """Put the prompts of tenants within what they are guaranteed first."""
        if self.waiting.num_tenants < 2:
            return prompts
        live = [sequence for sequence in prompts if sequence in self.running]
        return sorted(live, key=lambda sequence: not self._shares.goes_first(sequence))

    def _admit_guaranteed(self, step: ScheduledStep) -> None:
        """Admit what tenants are guaranteed, in others' places if need be."""
        if self.waiting.num_tenants < 2:
            return
        self.waiting.start_pass()
        while (sequence := self.waiting.next()) is not None:
            if not self._shares.is_in_credit(sequence):
                break
            has_row = self._shares.has_guaranteed_row(sequence)
            victims = self._shares.victims_for(sequence, self.running) if has_row else None
            if victims is None:
                if self._shares.is_exhausted(self.running):
                    break  # for every tenant that waits, and there may be thousands
                self.waiting.set_tenant_aside(sequence)
                continue
            if not victims and not self._has_budget(step):
                break
            self._try(step, sequence, victims)

    def _admit_waiting(self, step: ScheduledStep) -> None:
        """Admit in fair order; one that must wait lets others pass, but not for ever."""
        if step.num_preempted:
            return
        self.waiting.start_pass()
        first = self._overdue
        while len(self.running) < self._max_rows and self._has_budget(step):
            sequence, first = first or self.waiting.next(), None
            if sequence is None:
                break
            if not self._shares.may_take_row(sequence, len(self.running)):
                self.waiting.set_tenant_aside(sequence)
            elif not self._has_blocks_for(sequence):
                self._note_passed_over(sequence)
                self.waiting.set_tenant_aside(sequence)
            else:
                self._try(step, sequence)

    def _try(
        self, step: ScheduledStep, sequence: Sequence, victims: SequenceOf[Sequence] = ()
    ) -> None:
        """Admit a request, in the places of others, if there are slots; else let others pass."""
        slots = None if self._is_held_back(sequence) else self._take_slots(sequence)
        if slots is None:
            self._note_passed_over(sequence)
            self.waiting.pass_over(sequence)
            return
        for victim in victims:
            self._preempt(step, victim)
        self._admit(step, sequence, slots)

    def _has_budget(self, step: ScheduledStep) -> bool:
        return step.num_taken < self._budget.num_tokens

    def _note_passed_over(self, sequence: Sequence) -> None:
        if sequence.passed_since is None:
            sequence.passed_since = self._num_busy_steps
        if self._overdue is None and self._passed_steps(sequence) > MAX_PASSED_OVER:
            self._overdue = sequence

    def _note_served(self, sequence: Sequence) -> None:
        sequence.passed_since = None
        if self._overdue is sequence:
            self._overdue = None

    def _passed_steps(self, sequence: Sequence) -> int:
        """Return for how many steps that did something others have passed a request."""
        since = sequence.passed_since
        return 0 if since is None else self._num_busy_steps - since

    def _is_held_back(self, sequence: Sequence) -> bool:
        """Whether one that was passed over too often lets nobody like this one pass any more."""
        overdue = self._overdue
        if overdue is None or overdue is sequence:
            return False
        if not sequence.request.adapters and self._has_blocks_for(overdue):
            return False  # it waits for slots, and this one wants none
        is_own = sequence.request.tenant == overdue.request.tenant
        return is_own or self._passed_steps(overdue) > MAX_PASSED_BY_ALL

    def _has_blocks_for(self, sequence: Sequence) -> bool:
        """Whether the whole prompt fits now, with a block to spare while others run."""
        spare = 1 if self.running else 0
        needed = self.blocks.num_needed(len(sequence.token_ids))
        return needed + spare <= self.blocks.num_free

    def _admit(self, step: ScheduledStep, sequence: Sequence, slots: tuple[Slot, ...]) -> None:
        sequence.slots = slots
        self._note_served(sequence)
        self.waiting.admit(sequence)
        self.blocks.adopt_prefix(sequence)
        if sequence.scheduled_s is None:
            sequence.scheduled_s = time.monotonic()
            sequence.num_cached = min(sequence.num_computed, sequence.num_prompt)
            num_charged = sequence.num_prompt - sequence.num_cached
            self.waiting.charge(sequence, PROMPT_WEIGHT * num_charged)
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
        self.waiting.check_integrity(self.running)
        self.blocks.check_integrity(self.running)
