"""Removes, at the start and every ten minutes, what crashes and failures left behind.

| what | since when |
|---|---|
| deletions of this process that the store or the catalog cut short | at once |
| deletions of other processes, which may have been killed | once a second sweep finds them |
| blobs that no version refers to | once no upload's reservation protects them |
| staged files that no living upload holds | an hour after the last byte |
| the oldest events of the audit log | by the rule of the settings |
"""

import asyncio
import logging

from quickchange_adapters.event_log import DEFAULT_RULE, EventRule
from quickchange_adapters.store import Store

from quickchange_server.adapter_remover import AdapterRemover
from quickchange_server.background_task import BackgroundTask
from quickchange_server.errors import QuickchangeError
from quickchange_server.live_catalog import LiveCatalog

SWEEP_S = 600.0
INCOMING_S = 3600.0
log = logging.getLogger(__name__)


class StoreSweep:
    """Sweeps one store and its catalog; several servers may do so at once."""

    def __init__(
        self,
        store: Store,
        live: LiveCatalog,
        remover: AdapterRemover,
        event_rule: EventRule = DEFAULT_RULE,
        interval_s: float = SWEEP_S,
    ) -> None:
        self._store = store
        self._live = live
        self._remover = remover
        self._event_rule = event_rule
        self._interval_s = interval_s
        self._task = BackgroundTask(self._run)

    async def start(self) -> None:
        """Sweep once, and then again and again; what cannot be swept now is swept later."""
        await self._try()
        self._task.start()

    async def stop(self) -> None:
        """Sweep no more."""
        await self._task.stop()

    async def sweep(self) -> None:
        """Remove what nobody needs. What one part of it fails at does not keep the others.

        Raises: Unavailable, StorageFull, or whatever else went wrong first.
        """
        errors: list[Exception] = []
        for part in (self._end_deletions, self._collect, self._sweep_incoming, self._prune_events):
            try:
                await part()
            except Exception as error:
                errors.append(error)
        if errors:
            raise errors[0]

    async def _end_deletions(self) -> None:
        try:
            await self._remover.retry()
        finally:
            await self._remover.end_forgotten()

    async def _collect(self) -> None:
        await self._live.ask(lambda: self._live.catalog.collect(self._store.delete))

    async def _sweep_incoming(self) -> None:
        num_files = await self._live.ask(lambda: self._store.sweep_incoming(INCOMING_S))
        if num_files:
            log.info("%d files of uploads that never ended were removed", num_files)

    async def _prune_events(self) -> None:
        event_log = self._live.catalog.event_log
        num_events = await self._live.ask(lambda: event_log.prune(self._event_rule))
        if num_events:
            log.info("%d of the oldest events of the audit log were removed", num_events)

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(self._interval_s)
            await self._try()

    async def _try(self) -> None:
        try:
            await self.sweep()
        except QuickchangeError as error:
            log.warning("what crashes left is swept later: %s", error)
        except Exception:
            log.exception("what crashes left cannot be swept")
