"""What merged copies would bring: how many tokens each would serve, how many seconds it would save.

Counted on the engine thread from the rows of every step, taken away by whoever decides. For a copy
that is there the count is the same: what is compared is always the base with deltas. Decides
nothing.
"""

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

from quickchange_server.engine.scheduler import ScheduledRow
from quickchange_server.engine.step_costs import StepLoad
from quickchange_server.engine.step_groups import StepGroups, by_digest, load_of

ASSUMED_SAVING = 0.1
"""Of a step's time, what deltas cost as long as no step without them was seen to compare with."""


@dataclass(slots=True)
class CopyUse:
    """What one copy would have served and saved; fractions once they fade."""

    num_tokens: float = 0
    saved_s: float = 0.0


@dataclass(slots=True)
class Demand:
    """What ran since it was last taken: seconds of steps, tokens, and by digest a copy's part."""

    seconds: float = 0.0
    num_tokens: float = 0
    copies: dict[str, CopyUse] = field(default_factory=dict)


class CopyDemand:
    """Counts; `note` on the engine thread, `take` on any."""

    def __init__(self, groups: StepGroups) -> None:
        self._groups = groups
        self._demand = Demand()
        self._lock = threading.Lock()

    def take(self) -> Demand:
        """Return what was counted, and begin anew."""
        with self._lock:
            taken, self._demand = self._demand, Demand()
        return taken

    def note(self, rows: Sequence[ScheduledRow], seconds: float) -> None:
        """Count the rows that were scheduled together, however many steps they ran in."""
        whole = load_of(rows)
        loads = {digest: load_of(own) for digest, own in by_digest(rows).items()}
        uses = [(digest, self._use(own, whole, seconds)) for digest, own in loads.items()]
        with self._lock:
            self._demand.seconds += seconds
            self._demand.num_tokens += sum(row.num_tokens for row in rows)
            for digest, use in uses:
                total = self._demand.copies.setdefault(digest, CopyUse())
                total.num_tokens += use.num_tokens
                total.saved_s += use.saved_s

    def _use(self, own: StepLoad, whole: StepLoad, seconds: float) -> CopyUse:
        if own == whole:
            return CopyUse(own.num_tokens, self._whole_saving(own, seconds))
        saved_s = self._groups.saving(own, whole - own)
        return CopyUse(own.num_tokens, saved_s) if saved_s else CopyUse()

    def _whole_saving(self, load: StepLoad, seconds: float) -> float:
        costs = self._groups.costs
        if not costs.is_known:
            return ASSUMED_SAVING * seconds
        return costs.predict(load) - costs.predict(load.without_deltas())
