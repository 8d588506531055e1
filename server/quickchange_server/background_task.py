"""Work that goes on beside everything else until it is stopped."""

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any

log = logging.getLogger(__name__)


class BackgroundTask:
    """Runs one coroutine, which is to end only when it is stopped; an earlier end is logged."""

    def __init__(self, run: Callable[[], Coroutine[Any, Any, None]]) -> None:
        self._run = run
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin."""
        self._task = asyncio.create_task(self._run())
        self._task.add_done_callback(_tell_end)

    async def stop(self) -> None:
        """Cancel it and wait for its end; a repeat is a no-op."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)


def _tell_end(task: "asyncio.Task[None]") -> None:
    if not task.cancelled():
        log.error("%s has ended by itself", task.get_coro(), exc_info=task.exception())
