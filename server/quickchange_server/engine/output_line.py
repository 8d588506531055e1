"""Brings the outputs of a step to those who wait for them, a few at a time.

What hundreds of streams do with their tokens takes tens of milliseconds. Between two portions the
event loop looks for other work: a probe or a scrape waits for a portion, not for the whole step.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Iterable

from quickchange_server.engine.request import TokenOutput

PORTION = 8


class OutputLine:
    """First in, first out, whatever comes meanwhile. Lives on the event loop."""

    def __init__(self, deliver: Callable[[TokenOutput], None], portion: int = PORTION) -> None:
        self._deliver = deliver
        self._portion = portion
        self._waiting: deque[TokenOutput] = deque()
        self._is_moving = False

    def put(self, outputs: Iterable[TokenOutput]) -> None:
        """Deliver these behind those that wait; a portion of them at once if none do."""
        self._waiting.extend(outputs)
        if not self._is_moving:
            self._move()

    def _move(self) -> None:
        for _ in range(min(self._portion, len(self._waiting))):
            self._deliver(self._waiting.popleft())
        self._is_moving = bool(self._waiting)
        if self._is_moving:
            asyncio.get_running_loop().call_soon(self._move)
