"""Which adapters are to be merged by traffic: what a copy saves, with hysteresis. Pure; no clock.

| an adapter | when |
|---|---|
| is merged | its copy would have saved `MERGE_AT` of the recent steps' time |
| is unmerged | its copy saves less than `UNMERGE_AT` of it, or nobody has used it for `IDLE_S` |
| is left as it is | it changed less than `DWELL_S` ago, or hardly anything ran lately |

What is compared is time saved, not a share of tokens: an adapter with half of the tokens never has
a step to itself when sixteen clients mix, and a copy would lie idle; with one client it has every
other step. The share of tokens from which a copy pays is measured so, and named in `Decision`.
"""

from dataclasses import dataclass, field
from typing import Literal

from quickchange_server.engine.copy_demand import CopyUse, Demand

MERGE_AT = 0.03
UNMERGE_AT = 0.01
DWELL_S = 60.0
IDLE_S = 600.0
HALF_LIFE_S = 60.0
"""What ran so long ago counts half. With ten seconds instead, one client that asked at random for
three adapters and the base made 49 to 120 changes an hour, each a second or two of a core."""
MIN_SECONDS = 2.0
"""Of steps, within what is remembered; less says nothing."""

Kind = Literal["merge", "unmerge"]
Reason = Literal["hot", "cold", "idle", "displaced"]


@dataclass(frozen=True, slots=True)
class Decision:
    """What to do with one adapter and why.

    `share` of the recent tokens would run on its copy, which would save `saving` of the time; from
    `break_even` on, the same share would be worth a merge.
    """

    kind: Kind
    digest: str
    reason: Reason
    share: float
    saving: float

    @property
    def break_even(self) -> float:
        """The share of tokens on a copy from which on it is merged, at what deltas cost now."""
        return MERGE_AT * self.share / self.saving if self.saving > 0 else float("inf")


@dataclass(slots=True)
class AutoMergeRule:
    """What ran lately, fading, and when each adapter was last used and last changed."""

    _recent: Demand = field(default_factory=Demand)
    _noted_at_s: float = 0.0
    _used_at_s: dict[str, float] = field(default_factory=dict)
    _changed_at_s: dict[str, float] = field(default_factory=dict)

    def note(self, demand: Demand, now_s: float) -> None:
        """Take in what ran since the last call."""
        fade = 0.5 ** ((now_s - self._noted_at_s) / HALF_LIFE_S)
        self._noted_at_s = now_s
        recent = self._recent
        recent.seconds = fade * recent.seconds + demand.seconds
        recent.num_tokens = fade * recent.num_tokens + demand.num_tokens
        for use in recent.copies.values():
            use.num_tokens *= fade
            use.saved_s *= fade
        for digest, use in demand.copies.items():
            total = recent.copies.setdefault(digest, CopyUse())
            total.num_tokens += use.num_tokens
            total.saved_s += use.saved_s
            self._used_at_s[digest] = now_s
        self._forget_unused()

    def note_change(self, digest: str, now_s: float) -> None:
        """Take note that an adapter was merged, unmerged, or could not be: leave it for a while."""
        changed = self._changed_at_s.items()
        self._changed_at_s = {d: at_s for d, at_s in changed if now_s - at_s < DWELL_S}
        self._changed_at_s[digest] = now_s

    def share(self, digest: str) -> float:
        """Return the share of the recent tokens that would run on an adapter's copy."""
        use = self._recent.copies.get(digest, CopyUse())
        return use.num_tokens / max(self._recent.num_tokens, 1e-9)

    def saving(self, digest: str) -> float:
        """Return the share of the recent steps' time that an adapter's copy would save."""
        use = self._recent.copies.get(digest, CopyUse())
        return use.saved_s / max(self._recent.seconds, 1e-9)

    def decide(self, merged: frozenset[str], now_s: float) -> list[Decision]:
        """Return what to do now, what saves most last of all unmerges and first of all merges.

        `merged`: the adapters whose copies this rule asked for.
        """
        changes = [self._cooled(digest, now_s) for digest in sorted(merged)]
        if self._recent.seconds >= MIN_SECONDS:
            hot = sorted(self._recent.copies.keys() - merged, key=self.saving, reverse=True)
            changes += [self._heated(digest) for digest in hot]
        return [
            each for each in changes if each is not None and not self._is_fresh(each.digest, now_s)
        ]

    def _heated(self, digest: str) -> Decision | None:
        if self.saving(digest) < MERGE_AT:
            return None
        return self._decision("merge", digest, "hot")

    def _cooled(self, digest: str, now_s: float) -> Decision | None:
        if now_s - self._used_at_s.get(digest, float("-inf")) >= IDLE_S:
            return self._decision("unmerge", digest, "idle")
        if self._recent.seconds < MIN_SECONDS or self.saving(digest) >= UNMERGE_AT:
            return None
        return self._decision("unmerge", digest, "cold")

    def _decision(self, kind: Kind, digest: str, reason: Reason) -> Decision:
        return Decision(kind, digest, reason, self.share(digest), self.saving(digest))

    def _is_fresh(self, digest: str, now_s: float) -> bool:
        return now_s - self._changed_at_s.get(digest, float("-inf")) < DWELL_S

    def _forget_unused(self) -> None:
        """Drop adapters of which nothing is remembered: there may be thousands."""
        copies = self._recent.copies
        for digest in [d for d, use in copies.items() if use.num_tokens < 1e-3]:
            del copies[digest]
        horizon_s = self._noted_at_s - IDLE_S
        self._used_at_s = {d: at_s for d, at_s in self._used_at_s.items() if at_s >= horizon_s}
