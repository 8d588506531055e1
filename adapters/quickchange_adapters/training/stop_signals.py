"""Ctrl-C, SIGTERM and SIGHUP: at the next good moment where there is one, else at once.

Knows no training. A signal that was ignored when the process began (`nohup`, a background job of
a shell) stays ignored.
"""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
SAME_S = 1.0
"""A signal so soon after another is the same wish: some senders tell a process and its group."""
_HELD = (
    b"\nstopping after this step; once more to stop at once, and go on from the last checkpoint\n"
)


class Interrupted(KeyboardInterrupt):
    """A signal ends the program, wherever it is."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.exit_code = 128 + number


class Stopped(Interrupted):
    """A signal ends the program at a moment that was chosen for it, so that all is consistent."""


class StopSignals:
    """What this process does when it is told to stop."""

    def __init__(self) -> None:
        self._is_held = False
        self._number: int | None = None
        self._noted_at_s = 0.0

    @contextmanager
    def obeyed(self) -> Iterator[None]:
        """Raise Interrupted for signals inside, or Stopped; does nothing in a thread."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.getsignal(number) for number in SIGNALS}
        mine = [number for number, handler in before.items() if handler != signal.SIG_IGN]
        for number in mine:
            signal.signal(number, self._on_signal)
        try:
            yield
        finally:
            for number in mine:
                signal.signal(number, before[number] or signal.SIG_DFL)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Only take note of the first signal inside; `obey` raises it, and so does the end."""
        self._is_held = True
        try:
            yield
        finally:
            self._is_held = False  # before it asks: one that comes later would be lost
        self.obey()

    def obey(self) -> None:
        """Raise Stopped if a signal was held back."""
        if self._number is not None:
            raise Stopped(self._number)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if not self._is_held:
            raise Interrupted(number)
        if self._number is None:
            self._number, self._noted_at_s = number, time.monotonic()
            _tell(_HELD)
        elif time.monotonic() - self._noted_at_s > SAME_S:
            raise Interrupted(number)


def _tell(words: bytes) -> None:
    """Write to standard error; not by `print`, which may be what the signal came into."""
    try:
        os.write(2, words)
    except OSError:
        return  # the terminal is gone: that may be what the signal says
