"""A scheduler without a model: sequences, slots that are counted, and steps taken by hand."""

import itertools
import sys
from collections.abc import Callable
from types import FrameType

from quickchange_adapters.pool import Slot
from quickchange_server.engine.kv_cache import BlockManager
from quickchange_server.engine.request import AdapterRef, GenerationRequest
from quickchange_server.engine.scheduler import Scheduler
from quickchange_server.engine.sequence import Sequence
from quickchange_server.engine.step_budget import StepBudget

BLOCK = 4
_ids = itertools.count()


def sequence_of(
    length: int,
    adapters: tuple[str, ...] = (),
    max_tokens: int = 4,
    scope: str = "",
    first: int = 0,
    tenant: str = "t",
) -> Sequence:
    refs = tuple(AdapterRef(digest) for digest in adapters)
    prompt = tuple(range(first, first + length))
    request = GenerationRequest(
        f"r{next(_ids)}", prompt, refs, max_tokens=max_tokens, cache_scope=scope, tenant=tenant
    )
    return Sequence.from_request(request, 0, frozenset())


class Slots:
    """At most `limit` distinct adapters at a time, counted like the pool's."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.counts: dict[str, int] = {}

    def take(self, sequence: Sequence) -> tuple[Slot, ...] | None:
        digests = [adapter.digest for adapter in sequence.request.adapters]
        live = {d for d, count in self.counts.items() if count}
        if len(live | set(digests)) > self.limit:
            return None
        for digest in digests:
            self.counts[digest] = self.counts.get(digest, 0) + 1
        return tuple(Slot(digest, {}, 0) for digest in digests)

    def give(self, sequence: Sequence) -> None:
        for slot in sequence.slots:
            self.counts[slot.digest] -= 1
            assert self.counts[slot.digest] >= 0
        sequence.slots = ()


def scheduler_of(
    num_blocks: int = 64, max_rows: int = 8, max_step_tokens: int = 16, num_slots: int = 2
) -> tuple[Scheduler, Slots]:
    slots = Slots(num_slots)
    blocks = BlockManager(num_blocks + 1, BLOCK, "base")
    return Scheduler(blocks, max_rows, StepBudget(max_step_tokens), slots.take, slots.give), slots


def advance(scheduler: Scheduler) -> list[str]:
    """Run one step as the engine would, with token 1 for everybody; return ended ids."""
    ended = []
    for row in scheduler.schedule().rows:
        scheduler.note_computed(row)
        sequence = row.sequence
        if row.end == len(sequence.token_ids):
            sequence.token_ids.append(1)
            if sequence.num_generated >= sequence.request.max_tokens:
                scheduler.remove(sequence)
                ended.append(sequence.request_id)
    scheduler.check_integrity()
    return ended


def calls_of(work: Callable[[], object]) -> int:
    """Count Python's calls while something runs: what it costs, whatever else the machine does."""
    num_calls = 0

    def count(frame: FrameType, event: str, argument: object) -> None:
        nonlocal num_calls
        num_calls += event == "call"

    sys.setprofile(count)
    try:
        work()
    finally:
        sys.setprofile(None)
    return num_calls
