"""The files of a version as they were uploaded, for whoever reads them back."""

from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from quickchange_adapters.names import DEFAULT_TENANT

from quickchange_server.adapter_lookup import AdapterLookup
from quickchange_server.adapter_upload import FileName
from quickchange_server.errors import NotFound
from quickchange_server.threaded_context import in_thread
from quickchange_server.version_files import VersionFiles

MAX_OPENED = 4
"""Files that are fetched for downloads at once. Threads of their own: a store may be slow."""


@dataclass(frozen=True, slots=True)
class HeldFile:
    """A file to be read at `path`, and what it is wherever it lies. `created_at`: its version's."""

    path: Path
    sha256: str
    created_at: int


class AdapterDownloads:
    """Gives files, and keeps them where they are until they were read."""

    def __init__(self, lookup: AdapterLookup, files: VersionFiles) -> None:
        self._lookup = lookup
        self._files = files
        self._threads = ThreadPoolExecutor(MAX_OPENED, "quickchange-download")

    async def stop(self) -> None:
        """Begin no more."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    @asynccontextmanager
    async def open_file(
        self, name: str, version: int, file: FileName, *, tenant: str = DEFAULT_TENANT
    ) -> AsyncIterator[HeldFile]:
        """Give where one file of a version can be read, byte for byte as it was uploaded.

        It stays while the block runs.

        Raises: NotFound (adapter_not_found, version_not_found, file_not_found), Unavailable.
        """
        record = self._lookup.version(name, version, tenant)
        found = record.file(file)
        if found is None:
            raise NotFound(f"{name}:{version} has no {file}", code="file_not_found")
        async with in_thread(self._threads, self._files.held(record, file)) as paths:
            yield HeldFile(paths[file], found.sha256, record.created_at)
