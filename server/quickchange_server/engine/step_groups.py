"""Whether a merged adapter's rows run in a step of their own, on the copy, or with everybody's.

| rows of a scheduled step | run as |
|---|---|
| all of one merged adapter, alone at weight 1 | one step on its copy |
| some of them, and two steps are expected to take less time than one | two steps in a row |
| anything else | one step on the base with deltas |

Everybody who was scheduled is computed before anything else is scheduled, whatever is split: a row
never waits for another turn, and what the two steps take together is less than the one would have
taken. So nobody starves and no order changes. What steps cost is learned (`StepCosts`). Knows no
tensors.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from quickchange_adapters.merge import MergedCopy

from quickchange_server.engine.scheduler import ScheduledRow
from quickchange_server.engine.step_costs import StepCosts, StepLoad

MARGIN = 0.97
"""What two steps may take of what one would: predictions are a few per cent off."""


@dataclass(frozen=True, slots=True)
class StepGroup:
    """Rows that run in one step, and the copy they run on; None: the base, with deltas."""

    rows: list[ScheduledRow]
    copy: MergedCopy | None = None

    @property
    def load(self) -> StepLoad:
        """The step's work."""
        load = load_of(self.rows)
        return load if self.copy is None else load.without_deltas()


class StepGroups:
    """Splits scheduled rows. `copies`: the merged copies, by digest; read at every step.

    `is_on` False: only rows that all use one copy run on it.
    """

    def __init__(
        self, copies: Mapping[str, MergedCopy], costs: StepCosts | None = None, *, is_on: bool
    ) -> None:
        self.costs = costs or StepCosts()
        self._copies = copies
        self._is_on = is_on

    def split(self, rows: Sequence[ScheduledRow]) -> list[StepGroup]:
        """Return the groups to run, those that are over soonest first; together they are `rows`."""
        if not self._copies:
            return [StepGroup(list(rows))]
        rest, groups = list(rows), []
        for digest, own in self._by_size(rows):
            others = [row for row in rest if lone_digest(row) != digest]
            if not others or self.saving(load_of(own), load_of(others)):
                groups.append(StepGroup(own, self._copies[digest]))
                rest = others
        if rest:
            groups.append(StepGroup(rest))
        groups.sort(key=lambda group: sum(row.num_tokens for row in group.rows))
        return groups

    def saving(self, mine: StepLoad, theirs: StepLoad) -> float:
        """Return the seconds that an adapter's rows on its copy, then the others, save together.

        0 where they save nothing, by some margin, or where that is not known.
        """
        if not self._is_on or not self.costs.is_known:
            return 0.0
        together = self.costs.predict(mine + theirs)
        apart = self.costs.predict(mine.without_deltas()) + self.costs.predict(theirs)
        return together - apart if apart < MARGIN * together else 0.0

    def _by_size(self, rows: Sequence[ScheduledRow]) -> list[tuple[str, list[ScheduledRow]]]:
        """Return the rows of each merged adapter, those with most tokens first."""
        merged = [each for each in by_digest(rows).items() if each[0] in self._copies]
        return sorted(merged, key=lambda each: -sum(row.num_tokens for row in each[1]))


def by_digest(rows: Iterable[ScheduledRow]) -> dict[str, list[ScheduledRow]]:
    """Return the rows of each adapter that rows use alone at weight 1."""
    found: dict[str, list[ScheduledRow]] = {}
    for row in rows:
        digest = lone_digest(row)
        if digest is not None:
            found.setdefault(digest, []).append(row)
    return found


def lone_digest(row: ScheduledRow) -> str | None:
    """Return the adapter that a row uses alone at weight 1; None for the base and for mixes."""
    adapters = row.sequence.request.adapters
    return adapters[0].digest if len(adapters) == 1 and adapters[0].weight == 1 else None


def load_of(rows: Iterable[ScheduledRow]) -> StepLoad:
    """Return the work of a step on the base, with deltas."""
    counts = {(False, False): 0, (False, True): 0, (True, False): 0, (True, True): 0}
    for row in rows:
        counts[row.num_tokens > 1, bool(row.sequence.request.adapters)] += row.num_tokens
    adapted_decode, adapted_prompt = counts[False, True], counts[True, True]
    return StepLoad(
        counts[False, False] + adapted_decode,
        counts[True, False] + adapted_prompt,
        adapted_decode,
        adapted_prompt,
    )
