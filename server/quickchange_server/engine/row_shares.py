"""What each tenant may take while several want rows and blocks, and who gives way.

| with T tenants that wait or run | rows | KV blocks |
|---|---|---|
| an equal share | `max_rows / T`, at least 1 | all / T |
| guaranteed: taken from others if need be | half of it, at least 1 | half of it |
| kept free for tenants that were here lately | one each, at most a quarter of all | |

Rows and blocks are taken only from tenants that have more than an equal share, and never from the
oldest running request of all, which so always gets to its end. Nothing is guaranteed to a tenant
that was given more than `GRACE_STEPS` full steps' tokens above the least served that waits: half
of the rows would be more than its due. Knows no slots.
"""

from collections import Counter
from collections.abc import Collection, Iterable

from quickchange_server.engine.fair_queue import FairQueue, Tenant
from quickchange_server.engine.kv_cache import BlockManager
from quickchange_server.engine.sequence import Sequence

GRACE_STEPS = 16


class RowShares:
    """Says who may have a row, and whose row and blocks go to whom."""

    def __init__(
        self, queue: FairQueue, blocks: BlockManager, max_rows: int, max_step_tokens: int
    ) -> None:
        self._queue = queue
        self._blocks = blocks
        self._max_rows = max_rows
        self._grace_tokens = GRACE_STEPS * max_step_tokens

    @property
    def _num_guaranteed(self) -> int:
        return max(1, self._max_rows // (2 * max(self._queue.num_tenants, 1)))

    def is_in_credit(self, sequence: Sequence) -> bool:
        """Whether its tenant was not given much more than the least served that waits."""
        tenant = self._queue.tenant_of(sequence)
        return tenant.counter <= self._queue.floor + self._grace_tokens

    def has_guaranteed_row(self, sequence: Sequence) -> bool:
        """Whether its tenant has fewer rows than it is guaranteed."""
        return self._queue.tenant_of(sequence).num_running < self._num_guaranteed

    def goes_first(self, sequence: Sequence) -> bool:
        """Whether a running request's prompt is computed before others' prompts."""
        tenant = self._queue.tenant_of(sequence)
        return tenant.num_running <= self._num_guaranteed and self.is_in_credit(sequence)

    def may_take_row(self, sequence: Sequence, num_running: int) -> bool:
        """Whether a free row is one that its tenant may have."""
        kept = min(self._queue.num_recent_tenants, self._max_rows // 4)
        return num_running < self._max_rows - kept or self.has_guaranteed_row(sequence)

    def is_exhausted(self, running: Collection[Sequence]) -> bool:
        """Whether no tenant, whichever it is, can be given a row in this step."""
        return len(running) >= self._max_rows and self._row_victim(running) is None

    def victims_for(
        self, sequence: Sequence, running: Collection[Sequence]
    ) -> list[Sequence] | None:
        """Return whose places a guaranteed request takes, often nobody's; None: it must wait."""
        victims: list[Sequence] = []
        if len(running) >= self._max_rows:
            victim = self._row_victim(running)
            if victim is None:
                return None
            victims.append(victim)
        needed = self._blocks.num_needed(len(sequence.token_ids))
        missing = needed + bool(running) - self._blocks.num_free
        missing -= sum(map(self._blocks.num_held_alone, victims))
        if missing > 0 and not self._has_guaranteed_blocks(sequence, needed, running):
            return None
        while missing > 0:
            victim = self._block_victim([each for each in running if each not in victims])
            if victim is None:
                return None
            victims.append(victim)
            missing -= self._blocks.num_held_alone(victim)
        return victims

    def growth_victim(self, running: Iterable[Sequence]) -> Sequence:
        """Return who gives way when a running request needs a block and there is none.

        The youngest of the tenant that was given most.
        """
        candidates = _all_but_oldest(running) or list(running)
        tenants = {self._queue.tenant_of(each) for each in candidates}
        served_most = max(tenants, key=lambda tenant: tenant.counter)
        own = [each for each in candidates if self._queue.tenant_of(each) is served_most]
        return max(own, key=lambda sequence: sequence.arrival_s)

    def _row_victim(self, running: Iterable[Sequence]) -> Sequence | None:
        share = max(1, self._max_rows // self._queue.num_tenants)
        rows = Counter(map(self._queue.tenant_of, running))
        return self._last_of(rows, share, running)

    def _block_victim(self, running: Iterable[Sequence]) -> Sequence | None:
        share = self._blocks.num_blocks // self._queue.num_tenants
        return self._last_of(self._blocks_by_tenant(running), share, running)

    def _last_of(
        self, held: Counter[Tenant], share: int, running: Iterable[Sequence]
    ) -> Sequence | None:
        """Return the youngest of the busiest adapter of the tenant that is furthest above."""
        candidates = [
            each for each in _all_but_oldest(running) if held[self._queue.tenant_of(each)] > share
        ]
        return max(candidates, key=lambda each: self._expendability(each, held), default=None)

    def _expendability(self, sequence: Sequence, held: Counter[Tenant]) -> tuple[int, int, float]:
        num_held = held[self._queue.tenant_of(sequence)]
        return num_held, self._queue.line_of(sequence).num_running, sequence.arrival_s

    def _has_guaranteed_blocks(
        self, sequence: Sequence, needed: int, running: Iterable[Sequence]
    ) -> bool:
        held = self._blocks_by_tenant(running)[self._queue.tenant_of(sequence)]
        return held + needed <= self._blocks.num_blocks // (2 * self._queue.num_tenants)

    def _blocks_by_tenant(self, running: Iterable[Sequence]) -> Counter[Tenant]:
        held: Counter[Tenant] = Counter()
        for sequence in running:
            held[self._queue.tenant_of(sequence)] += len(sequence.blocks)
        return held


def _all_but_oldest(running: Iterable[Sequence]) -> list[Sequence]:
    return sorted(running, key=lambda sequence: sequence.arrival_s)[1:]
