"""Calls that other threads want run on the engine thread, between two steps.

A call that was cancelled before it ran is skipped; one that arrives after `close` fails at once,
so that nobody waits for a thread that is gone.
"""

import logging
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

from quickchange_server.errors import Unavailable

log = logging.getLogger(__name__)
T = TypeVar("T")


class EngineStopped(Unavailable):
    """The engine thread has ended and takes no more calls."""


class Inbox:
    """A line of calls, filled by any thread and emptied by one."""

    def __init__(self, after_call: Callable[[], None]) -> None:
        """`after_call` runs after each call, before its caller learns the result."""
        self._after_call = after_call
        self._calls: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._is_closed = False

    def call(self, function: Callable[[], T]) -> "Future[T]":
        """Queue a function; the future has its result, its exception, or EngineStopped."""
        future: Future[T] = Future()
        with self._lock:
            if self._is_closed:
                future.set_exception(EngineStopped("the engine has stopped"))
            else:
                self._calls.put(lambda: self._run(function, future))
        return future

    @property
    def is_empty(self) -> bool:
        """Whether no call waits."""
        return self._calls.empty()

    def run_next(self, timeout_s: float) -> None:
        """Wait for a call and run it; return without one after the timeout."""
        try:
            call = self._calls.get(timeout=timeout_s)
        except queue.Empty:
            self._tidy_up()
            return
        call()

    def run_waiting(self) -> None:
        """Run all calls that are there."""
        while not self._calls.empty():
            self._calls.get_nowait()()

    def close(self) -> None:
        """Run what is waiting and refuse what comes later."""
        with self._lock:
            self._is_closed = True
        self.run_waiting()

    def _run(self, function: Callable[[], T], future: "Future[T]") -> None:
        if not future.set_running_or_notify_cancel():
            return
        try:
            result = function()
        except BaseException as error:
            self._tidy_up()
            future.set_exception(error)
        else:
            self._tidy_up()
            future.set_result(result)

    def _tidy_up(self) -> None:
        try:
            self._after_call()
        except Exception:
            log.exception("what follows a call failed")
