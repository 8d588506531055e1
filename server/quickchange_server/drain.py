"""The end of a server's service: what was accepted is finished, what is new is refused.

Counts the requests that run. Knows neither signals nor sockets.
"""

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

POLL_S = 0.05


class Drain:
    """Begun once, never taken back. All but `begin` belong to the event loop."""

    def __init__(self) -> None:
        self.is_begun = False
        self.num_running = 0

    def begin(self) -> None:
        """Take nothing new from now on; may be called from a signal handler."""
        self.is_begun = True

    @contextmanager
    def accepted(self) -> Iterator[None]:
        """Count a request while the block runs."""
        self.num_running += 1
        try:
            yield
        finally:
            self.num_running -= 1

    async def finish(
        self, delay_s: float, timeout_s: float, is_hurried: Callable[[], bool] = lambda: False
    ) -> int:
        """Wait until nothing runs; return how many requests were left when the time was over.

        Lasts at least `delay_s`, in which whoever balances load learns that this server is not
        ready, and at most `timeout_s` more; ends at once when `is_hurried`.
        """
        started = time.monotonic()
        while not is_hurried():
            seconds = time.monotonic() - started
            if seconds >= delay_s and (not self.num_running or seconds >= delay_s + timeout_s):
                break
            await asyncio.sleep(POLL_S)
        return self.num_running
