"""Asks the catalog, twice a second, whether another process has changed it.

One number tells. Only when it has grown is more read, and whoever keeps a picture of the catalog is
told. While the catalog does not answer, the pictures stay as they are, and it is asked less often.
"""

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable

from quickchange_server.background_task import BackgroundTask
from quickchange_server.errors import Unavailable
from quickchange_server.live_catalog import LiveCatalog

POLL_S = 0.5
MAX_PAUSE_S = 4.0
JITTER = 0.2

OnChange = Callable[[], Awaitable[None]]
log = logging.getLogger(__name__)


class CatalogPoll:
    """Keeps `live` and the pictures behind `on_change` true.

    A callback is called after `live` was renewed, whatever has changed; it may be called without
    need. When anything raises, the others are renewed all the same, and all again at the next look.
    """

    def __init__(self, live: LiveCatalog, interval_s: float = POLL_S) -> None:
        self.on_change: list[OnChange] = []
        self._live = live
        self._interval_s = interval_s
        self._pause_s = interval_s
        self._seen = -1
        self._is_troubled = False
        self._task = BackgroundTask(self._run)

    def start(self) -> None:
        """Begin to ask."""
        self._task.start()

    async def stop(self) -> None:
        """Ask no more."""
        await self._task.stop()

    async def look(self) -> None:
        """Ask once, and renew everything if the catalog has changed.

        Raises: Unavailable; what a callback raises.
        """
        revision = await self._live.ask(self._live.catalog.revision)
        if revision != self._seen:
            await self._renew_all()
            # The number from before the reading: what came in between is read once more.
            self._seen = revision

    async def _renew_all(self) -> None:
        """Renew every picture, also when one of them fails: a revoked key must not wait for it."""
        errors: list[Exception] = []
        for renew in (self._live.refresh, *self.on_change):
            try:
                await renew()
            except Exception as error:
                errors.append(error)
        if errors:
            raise errors[0]

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(self._pause_s * random.uniform(1 - JITTER, 1 + JITTER))
            try:
                await self.look()
            except Unavailable:  # its database has said so, once
                self._pause_s = min(2 * self._pause_s, MAX_PAUSE_S)
            except Exception as error:
                self._pause_s = min(2 * self._pause_s, MAX_PAUSE_S)
                self._note_trouble(error)
            else:
                self._pause_s = self._interval_s
                self._note_trouble(None)

    def _note_trouble(self, error: Exception | None) -> None:
        """Say once that something is wrong, and once that it is well again."""
        if error is not None and not self._is_troubled:
            log.error("the catalog's news cannot be taken in: %r", error, exc_info=error)
        elif error is None and self._is_troubled:
            log.warning("the catalog is followed again")
        self._is_troubled = error is not None
