"""The catalog and its picture in memory, changed together."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from quickchange_adapters.catalog import Catalog
from quickchange_adapters.records import VersionRecord

from quickchange_server.adapter_directory import AdapterDirectory
from quickchange_server.answers import as_answers

T = TypeVar("T")

MAX_CALLS = 4
"""Calls of the catalog at once. Threads of their own: when it hangs, nothing else waits."""


class LiveCatalog:
    """Runs the catalog's blocking calls in threads of their own and keeps the directory true.

    One change at a time, so that the directory takes the catalog's states in their order.
    Its errors come as the server's: NotFound, Conflict, PreconditionFailed, Unavailable.
    """

    def __init__(self, catalog: Catalog, directory: AdapterDirectory) -> None:
        self.catalog = catalog
        self._directory = directory
        self._changing = asyncio.Lock()
        self._threads = ThreadPoolExecutor(MAX_CALLS, "quickchange-catalog")
        self._is_closed = False

    async def close(self) -> None:
        """Close the catalog once its calls have ended. A repeat does nothing."""
        if not self._is_closed:
            self._is_closed = True
            await self.ask(self.catalog.close)
            self._threads.shutdown(wait=False)

    async def refresh(self) -> None:
        """Read what other processes have changed."""
        async with self._changing:
            known = self._directory.revisions()
            changes = await self.ask(lambda: self.catalog.changes_since(known))
            for record in changes.changed:
                self._directory.replace(record.tenant, record.name, record)
            for tenant, name in changes.gone:
                self._directory.replace(tenant, name, None)

    async def read_again(self, version: VersionRecord) -> None:
        """Read one version's adapter anew."""
        tenant, name = version.tenant, version.name
        async with self._changing:
            record = await self.ask(lambda: self.catalog.get(name, tenant))
            self._directory.replace(tenant, name, record)

    async def ask(self, function: Callable[[], T]) -> T:
        """Run a call that changes no adapter."""
        with as_answers():
            return await asyncio.get_running_loop().run_in_executor(self._threads, function)

    async def change(self, tenant: str, name: str, function: Callable[[], T]) -> T:
        """Run a call that changes one adapter, then read that adapter anew."""
        async with self._changing:
            result = await self.ask(function)
            record = await self.ask(lambda: self.catalog.get(name, tenant))
            self._directory.replace(tenant, name, record)
            return result
