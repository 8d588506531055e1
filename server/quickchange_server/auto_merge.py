"""Merges by traffic (`--auto-merge`): asks twice a second what ran, and does what the rule says.

A copy that is made here is a wish of this process alone, so that a catalog's or an operator's word
stands above it. Whoever asks for a merge or an unmerge by name takes the version out of these
hands, here until the process ends. Lives on the event loop.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from quickchange_adapters.errors import AdapterError, MergeBudgetExceeded
from quickchange_adapters.records import VersionRecord

from quickchange_server.adapter_directory import AdapterDirectory
from quickchange_server.auto_merge_rule import MERGE_AT, AutoMergeRule, Decision
from quickchange_server.background_task import BackgroundTask
from quickchange_server.desired_state import DesiredState
from quickchange_server.engine.copy_demand import Demand
from quickchange_server.errors import QuickchangeError
from quickchange_server.wishes import Wishes, WishHere

LOOK_S = 0.5
ROOM_FACTOR = 2.0
"""How much more than an adapter that is merged another must save to be given its room."""
Action = Literal["merge", "unmerge", "refuse"]
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TrafficSource:
    """What auto-merge is told and whom it tells.

    `take` gives what ran since it was last called; `tell` hears of each action and its reason, for
    a metric; `say` hears of it in words; `clock` is monotonic.
    """

    take: Callable[[], Demand]
    tell: Callable[[Action, str], None]
    say: Callable[[str], None] = log.info
    clock: Callable[[], float] = time.monotonic


class AutoMerge:
    """Merges and unmerges what traffic asks for, one at a time."""

    def __init__(
        self,
        directory: AdapterDirectory,
        wishes: Wishes,
        desired: DesiredState,
        source: TrafficSource,
        look_s: float = LOOK_S,
    ) -> None:
        self._directory = directory
        self._wishes = wishes
        self._desired = desired
        self._source = source
        self._look_s = look_s
        self._rule = AutoMergeRule()
        self._mine: dict[str, WishHere] = {}
        self._task = BackgroundTask(self._run)

    def start(self) -> None:
        """Look now, and again and again."""
        self._task.start()

    async def stop(self) -> None:
        """Leave everything as it is."""
        await self._task.stop()

    async def look(self) -> None:
        """Take in what ran, and do what the rule says; at most one merge."""
        self._rule.note(self._source.take(), self._source.clock())
        self._mine = {digest: wish for digest, wish in self._mine.items() if self._is_mine(digest)}
        for decision in self._rule.decide(frozenset(self._mine), self._source.clock()):
            if decision.kind == "unmerge":
                await self._unmerge(decision)
            elif self._may_merge(decision.digest):
                await self._merge(decision)
                break

    async def _run(self) -> None:
        while True:
            try:
                await self.look()
            except Exception:
                log.exception("auto-merge could not look at the traffic")
            await asyncio.sleep(self._look_s)

    def _is_mine(self, digest: str) -> bool:
        return self._wishes.get_here("merge", digest) is self._mine[digest]

    def _may_merge(self, digest: str) -> bool:
        """Whether a version may be merged by traffic; one that was unloaded since stays away."""
        is_wished = digest in self._wishes.wished("merge")
        has_word = self._wishes.has_word("merge", digest)
        return not is_wished and not has_word and not self._desired.is_away(digest)

    async def _merge(self, decision: Decision) -> None:
        version = self._version_of(decision.digest)
        if version is None:
            return
        self._wishes.set_here("merge", version, True)
        mine = self._wishes.get_here("merge", version.digest)
        assert mine is not None
        self._mine[version.digest] = mine
        try:
            await self._desired.fulfil("merge", version)
        except BaseException as error:
            self._give_up(version.digest)
            if not isinstance(error, QuickchangeError | AdapterError):
                raise
            await self._refuse(decision, version, error)
            return
        self._rule.note_change(version.digest, self._source.clock())
        self._tell("merge", decision, version)

    async def _refuse(self, decision: Decision, version: VersionRecord, error: Exception) -> None:
        if isinstance(error, MergeBudgetExceeded) and await self._make_room(decision):
            return
        self._rule.note_change(version.digest, self._source.clock())
        reason = "no_room" if isinstance(error, MergeBudgetExceeded) else "failed"
        self._source.tell("refuse", reason)
        self._source.say(f"auto-merge: {_name(version)} stays unmerged for a while: {error}")

    async def _make_room(self, decision: Decision) -> bool:
        """Unmerge what saves least, if that is much less; the next look finds its room."""
        least = min(self._mine, key=self._rule.saving, default=None)
        if least is None or decision.saving < ROOM_FACTOR * self._rule.saving(least):
            return False
        share, saving = self._rule.share(least), self._rule.saving(least)
        await self._unmerge(Decision("unmerge", least, "displaced", share, saving))
        return True

    async def _unmerge(self, decision: Decision) -> None:
        version = self._mine[decision.digest].version
        self._give_up(decision.digest)
        if decision.digest not in self._wishes.wished("merge"):
            await self._desired.undo("merge", decision.digest)
        self._rule.note_change(decision.digest, self._source.clock())
        self._tell("unmerge", decision, version)

    def _give_up(self, digest: str) -> None:
        """Wish what the catalog wishes, unless somebody else has wished something since."""
        if self._is_mine(digest):
            self._wishes.restore_here("merge", digest, None)
        del self._mine[digest]

    def _version_of(self, digest: str) -> VersionRecord | None:
        versions = self._directory.served_versions()
        return next((version for version in versions if version.digest == digest), None)

    def _tell(self, action: Action, decision: Decision, version: VersionRecord) -> None:
        self._source.tell(action, decision.reason)
        self._source.say(f"auto-merge: {_name(version)} {_sentence(decision)}")


def _name(version: VersionRecord) -> str:
    return f"{version.name}:{version.number}"


def _sentence(decision: Decision) -> str:
    numbers = (
        f"{decision.share:.0%} of the recent tokens would run on its copy, "
        f"which saves {decision.saving:.1%} of the time"
    )
    if decision.kind == "merge":
        edge = min(decision.break_even, 1.0)
        return f"is merged: {numbers} (worth it from {MERGE_AT:.0%}, here {edge:.0%} of the tokens)"
    why = {
        "cold": "it has cooled",
        "idle": "nobody has used it for a while",
        "displaced": "another saves more in its room",
    }
    return f"is unmerged: {why[decision.reason]}; {numbers}"
