"""Work that several callers may want at once, and that outlives a caller who leaves."""

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Coroutine
from typing import Any, Generic, TypeVar

T = TypeVar("T")
MOMENT_S = 0.5
"""What work may take that has nobody to wait for."""
log = logging.getLogger(__name__)


class SharedTasks(Generic[T]):
    """At most one running task per key."""

    def __init__(self) -> None:
        self._tasks: dict[str, asyncio.Task[T]] = {}
        self._num_waiting: Counter[asyncio.Task[T]] = Counter()

    def start(self, key: str, work: Callable[[], Coroutine[Any, Any, T]]) -> "asyncio.Task[T]":
        """Start work under a key, or return what runs under it already. Shield it when waiting."""
        task = self._tasks.get(key)
        if task is None or task.done():
            task = self._tasks[key] = asyncio.create_task(work())
            task.add_done_callback(lambda done: self._end(key, done))
        return task

    async def run(
        self,
        key: str,
        work: Callable[[], Coroutine[Any, Any, T]],
        goes_on_alone: Callable[[], bool] = lambda: True,
    ) -> T:
        """Start or join work, and return its result.

        A caller that is cancelled leaves. When the last one has left, the work is cancelled unless
        `goes_on_alone()` says that it is worth its end even if nobody waits for it.
        """
        task = self.start(key, work)
        self._num_waiting[task] += 1
        try:
            return await asyncio.shield(task)
        finally:
            self._num_waiting[task] -= 1
            if not self._num_waiting[task]:
                del self._num_waiting[task]
                if not task.done() and not goes_on_alone():
                    self._give_up(key, task)

    def is_running(self, key: str) -> bool:
        """Whether work runs under a key."""
        return key in self._tasks

    def keys(self) -> list[str]:
        """Return the keys under which work runs now; from any thread."""
        return list(self._tasks)

    async def stop(self) -> None:
        """Cancel everything that runs, and wait for it to end."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def join(self) -> None:
        """Wait for everything that runs, whatever becomes of it."""
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    def _give_up(self, key: str, task: "asyncio.Task[T]") -> None:
        """Cancel work; who comes from now on starts it anew instead of sharing its end."""
        if self._tasks.get(key) is task:
            del self._tasks[key]
        task.cancel()

    def _end(self, key: str, task: "asyncio.Task[T]") -> None:
        if self._tasks.get(key) is task:
            del self._tasks[key]
        # Asking for the exception tells asyncio that somebody saw it, though all callers may have
        # left by now.
        if not task.cancelled() and task.exception() is not None:
            log.info("%s ended with %r", key, task.exception())


async def in_time(task: "asyncio.Task[T]", timeout_s: float | None) -> T:
    """Return what a task comes to; it goes on when the time is up. None: as long as it takes.

    A time of 0 is a moment: it says not to wait for others, and not that nothing may be done.

    Raises: TimeoutError.
    """
    seconds = None if timeout_s is None else max(timeout_s, MOMENT_S)
    return await asyncio.wait_for(asyncio.shield(task), seconds)
