"""Brings this process to what is wished of it, and tries again what does not work yet.

| wished | here | so |
|---|---|---|
| pinned | not pinned | it is loaded and pinned |
| merged | not merged | it is loaded and merged, unless somebody unloaded it: then when it is used |
| not (any more) pinned or merged | it is | it is not any more |
| nothing: no version with these bytes takes requests | loaded, and nothing runs on it | unloaded |

It looks at all of it twice a second, so that it does not matter what was missed. What fails (no
room for a merged copy, say) is logged once, counted as unmet, and tried again after a growing
pause.
"""

import asyncio
import contextlib
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal

from quickchange_adapters.errors import AdapterError
from quickchange_adapters.records import VersionRecord
from quickchange_adapters.version_states import Wish

from quickchange_server.adapter_directory import AdapterDirectory
from quickchange_server.adapter_loader import AdapterLoader
from quickchange_server.background_task import BackgroundTask
from quickchange_server.engine.interface import GenerationEngine
from quickchange_server.errors import QuickchangeError
from quickchange_server.shared_tasks import SharedTasks
from quickchange_server.wishes import Wishes

LOOK_S = 0.5
MIN_PAUSE_S, MAX_PAUSE_S = 1.0, 60.0

WISHES: tuple[Wish, ...] = ("pin", "merge")
Kind = Literal["pin", "unpin", "merge", "unmerge", "unload"]
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Step:
    """One thing to do for one digest; `version` is what is to be loaded for it, if anything."""

    kind: Kind
    digest: str
    version: VersionRecord | None = None

    @property
    def key(self) -> str:
        """What makes two steps the same."""
        return f"{self.kind} {self.digest}"

    @property
    def what(self) -> str:
        """How a log names it."""
        version = self.version
        return f"{version.name}:{version.number}" if version else self.digest[:12]


@dataclass(slots=True)
class Failure:
    """Why a step did not work, and when it is tried again (monotonic)."""

    text: str
    pause_s: float
    retry_at_s: float


class DesiredState:
    """Does what `wishes` say. `is_removing`: whether a deletion here sees to a digest already.

    `num_unmet`: how many wishes were not fulfilled when it last looked; for any thread.
    """

    def __init__(
        self,
        engine: GenerationEngine,
        directory: AdapterDirectory,
        wishes: Wishes,
        loader: AdapterLoader,
        is_removing: Callable[[str], bool],
        look_s: float = LOOK_S,
    ) -> None:
        self._engine = engine
        self._directory = directory
        self._wishes = wishes
        self._loader = loader
        self._is_removing = is_removing
        self._look_s = look_s
        self.num_unmet: dict[Wish, int] = dict.fromkeys(WISHES, 0)
        self._steps: SharedTasks[None] = SharedTasks()
        self._failures: dict[str, Failure] = {}
        self._fulfilling: Counter[tuple[Wish, str]] = Counter()
        self._parked: set[str] = set()
        self._woken = asyncio.Event()
        self._task = BackgroundTask(self._run)

    def start(self) -> None:
        """Look now, and again and again."""
        self._task.start()

    async def stop(self) -> None:
        """Leave everything as it is."""
        await self._task.stop()
        await self._steps.stop()

    def wake(self) -> None:
        """Look soon, since something has changed."""
        self._woken.set()

    async def renew(self) -> None:
        """Look soon: the catalog has changed."""
        self.wake()

    def park(self, digest: str) -> None:
        """Leave a version unmerged until it is used again. Call it right before it is unloaded."""
        self._parked.add(digest)

    async def fulfil(self, wish: Wish, version: VersionRecord) -> None:
        """Load a version and pin or merge it; a repeat is a no-op.

        Raises: NotFound, Conflict, Unavailable, PinBudgetExceeded, MergeBudgetExceeded.
        """
        key = wish, version.digest
        self._parked.discard(version.digest)
        self._fulfilling[key] += 1
        try:
            if wish == "pin":
                await self._loader.pin(version)
            else:
                await self._loader.merge(version)
        finally:
            self._fulfilling -= Counter([key])

    async def undo(self, wish: Wish, digest: str) -> int:
        """Take back what `fulfil` did; return the bytes of the merged copy that went."""
        freed = 0
        if wish == "pin":
            await self._loader.unpin(digest)
        else:
            freed = (await self._loader.unmerge(digest)).merged_bytes
        self._try_again_soon()
        return freed

    async def _run(self) -> None:
        while True:
            try:
                self._look()
            except Exception:
                log.exception("the desired state could not be looked at")
            # Not wait_for: before Python 3.12 it may swallow the cancel that `stop` sends.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._look_s):
                    await self._woken.wait()
            self._woken.clear()

    def _look(self) -> None:
        """Start every step that is needed, not under way and not in a pause."""
        self._parked = {digest for digest in self._parked if self.is_away(digest)}
        self.num_unmet = {wish: sum(1 for _ in self._unmet(wish)) for wish in WISHES}
        needed = {step.key: step for step in self._needed()}
        self._failures = {key: f for key, f in self._failures.items() if key in needed}
        for key, step in needed.items():
            failure = self._failures.get(key)
            if failure is None or failure.retry_at_s <= time.monotonic():
                self._steps.start(key, partial(self._try, step))

    def is_away(self, digest: str) -> bool:
        """Whether a version is not loaded, or is on its way out, however long that takes."""
        return self._loader.is_unloading(digest) or not self._engine.is_loaded(digest)

    def _needed(self) -> Iterator[Step]:
        for digest, resident in self._engine.snapshot().adapters.items():
            if not self._directory.is_served(digest):
                if not resident.num_running and not self._is_removing(digest):
                    yield Step("unload", digest)
                continue
            if resident.is_pinned and digest not in self._wishes.wished("pin"):
                yield Step("unpin", digest)
            if resident.merged_bytes and digest not in self._wishes.wished("merge"):
                yield Step("unmerge", digest)
        for wish in WISHES:
            for version in self._unmet(wish):
                if not self._fulfilling[wish, version.digest]:
                    yield Step(wish, version.digest, version)

    def _unmet(self, wish: Wish) -> Iterator[VersionRecord]:
        held = self._engine.snapshot().adapters
        for digest, version in self._wishes.wished(wish).items():
            resident = held.get(digest)
            if wish == "pin":
                is_met = resident is not None and resident.is_pinned
            else:
                is_met = bool(resident and resident.merged_bytes) or digest in self._parked
            if not is_met:
                yield version

    async def _try(self, step: Step) -> None:
        try:
            await self._do(step)
        except (QuickchangeError, AdapterError) as error:
            self._note_failure(step, str(error))
        except Exception as error:
            log.exception("%s of %s failed", step.kind, step.what)
            self._note_failure(step, repr(error))
        else:
            self._failures.pop(step.key, None)

    async def _do(self, step: Step) -> None:
        if step.kind == "pin" or step.kind == "merge":
            assert step.version is not None
            await self.fulfil(step.kind, step.version)
        elif step.kind == "unload":
            if not self._directory.is_served(step.digest):
                await self._loader.unload(step.digest, None)
            self._try_again_soon()
        else:
            await self.undo("pin" if step.kind == "unpin" else "merge", step.digest)

    def _note_failure(self, step: Step, text: str) -> None:
        last = self._failures.get(step.key)
        pause_s = MIN_PAUSE_S if last is None else min(2 * last.pause_s, MAX_PAUSE_S)
        if last is None or last.text != text:
            what = (
                f"{step.version.name}:{step.version.number}" if step.version else step.digest[:12]
            )
            log.warning("%s: %s does not work here yet: %s", what, step.kind, text)
        self._failures[step.key] = Failure(text, pause_s, time.monotonic() + pause_s)

    def _try_again_soon(self) -> None:
        """Room was made: what did not fit may fit now."""
        for failure in self._failures.values():
            failure.retry_at_s = 0.0
        self.wake()
