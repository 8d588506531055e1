"""Bring versions from their files into the engine and out of it, one thing at a time per digest.

| what comes together | what happens |
|---|---|
| several requests for one cold version | one load; all wait for it |
| a request while its version drains for an unload | waits, then loads again |
| a request while its version drains for a deletion | waits, then gets NotFound |
| a load while another process removes the files | Unavailable, or NotFound if it was a deletion |
| loads from a store that is slow | others' loads go on: they wait in threads of their own |
| more loads than there is room for | they wait without tensors, and hold nothing |
| everybody leaves who asked for a version that has no room yet | its load is given up |
| versions that one request mixes | they have room together, or wait for all of it |
| more requests for cold versions than may wait in the engine's line | QueueFull |
"""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Protocol, TypeVar
from weakref import WeakValueDictionary

from quickchange_adapters.errors import AdapterRefused, BlobMissing, StoreUnavailable
from quickchange_adapters.packed_size import PackedSize
from quickchange_adapters.records import VersionRecord
from quickchange_adapters.structure import Structure
from quickchange_adapters.weights import AdapterWeights

from quickchange_server.adapter_views import Tier
from quickchange_server.engine.interface import GenerationEngine, MergeResult, ResidentAdapter
from quickchange_server.engine.torch_threads import use_one_thread
from quickchange_server.errors import Conflict, NotFound, QueueFull, QuickchangeError, Unavailable
from quickchange_server.load_observer import LoadObserver, NoLoadObserver
from quickchange_server.shared_tasks import SharedTasks, in_time

DRAIN_POLL_S = 60.0
MAX_LOADS = 3
NUM_FETCHERS = 8
MAX_UNPACKED = 2
"""Versions that are read and packed at once: what they hold meanwhile, no ceiling counts."""
READ_ERRORS = (AdapterRefused, BlobMissing, StoreUnavailable, OSError)
T = TypeVar("T")
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _LoadStart:
    """Where a version was when its load began, and when that was."""

    tier: Tier
    at_s: float


class AdapterFiles(Protocol):
    """Where versions' files are. All but `is_on_disk` block and run in threads."""

    def is_on_disk(self, version: VersionRecord) -> bool:
        """Whether all files are on this machine. Never waits."""

    def fetch(self, version: VersionRecord) -> None:
        """Bring the files to this machine."""

    def measure(self, version: VersionRecord) -> Structure:
        """Return what a version's files hold, without its numbers."""

    def read_weights(self, version: VersionRecord) -> AdapterWeights:
        """Return a version's tensors."""


class AdapterLoader:
    """Loads, merges and unloads versions.

    `is_served` says whether anybody may still ask for a digest; `read_again` renews what is known
    of a version.
    """

    def __init__(
        self,
        engine: GenerationEngine,
        files: AdapterFiles,
        is_served: Callable[[str], bool],
        read_again: Callable[[VersionRecord], Awaitable[None]],
    ) -> None:
        self.observer: LoadObserver = NoLoadObserver()
        self._engine = engine
        self._files = files
        self._is_served = is_served
        self._read_again = read_again
        self._threads = ThreadPoolExecutor(2, "quickchange-adapter", use_one_thread)
        self._fetchers = ThreadPoolExecutor(NUM_FETCHERS, "quickchange-fetch")
        self._num_waiting = 0
        self._together: dict[str, str] = {}
        self._mixing: Counter[str] = Counter()
        self._starts: dict[str, _LoadStart] = {}
        self._with_room: set[str] = set()
        self._num_bookings = 0
        self._unpacking = asyncio.Semaphore(MAX_UNPACKED)
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._loads: SharedTasks[None] = SharedTasks()
        self._unloads: SharedTasks[ResidentAdapter | None] = SharedTasks()

    async def stop(self) -> None:
        """Give up what is under way."""
        await self._loads.stop()
        await self._unloads.stop()
        for threads in (self._threads, self._fetchers):
            threads.shutdown(wait=False, cancel_futures=True)

    async def load(self, version: VersionRecord) -> None:
        """Make sure that the engine holds a version.

        Raises: NotFound, Conflict, Unavailable, QueueFull.
        """
        if not self._engine.is_loaded(version.digest):
            with self._one_more_waiting():
                await self._join_load(version)

    async def load_together(self, owner: str, versions: Sequence[VersionRecord]) -> None:
        """Make sure that the engine holds versions that a request mixes, all at the same time.

        They stay until `part(owner)`, which is to be called also if this raises.

        Raises: InvalidRequest (they never fit together), and what `load` raises.
        """
        by_digest = {version.digest: version for version in versions}
        if len(by_digest) == 1 or all(map(self._engine.is_loaded, by_digest)):
            for version in by_digest.values():
                await self.load(version)
            return
        with self._one_more_waiting(), self._known_as_loading(versions):
            with self._failures_told():
                sizes = {digest: await self._size_of(each) for digest, each in by_digest.items()}
            self.part(owner)
            self._together[owner] = booking = self._new_booking()
            await self._engine.book_room(booking, sizes)
            for version in by_digest.values():
                if not self._engine.is_loaded(version.digest):
                    await self._join_load(version)

    def part(self, owner: str) -> None:
        """Let versions go that were loaded together; a repeat is a no-op."""
        booking = self._together.pop(owner, None)
        if booking is not None:
            self._engine.end_booking(booking)

    @contextmanager
    def _one_more_waiting(self) -> Iterator[None]:
        limit = self._engine.max_requests
        if self._num_waiting >= limit:
            raise QueueFull(
                f"{limit} requests wait for adapters to be loaded already "
                "(--max-queue and --max-batch-rows): try again soon"
            )
        self._num_waiting += 1
        try:
            yield
        finally:
            self._num_waiting -= 1

    @contextmanager
    def _known_as_loading(self, versions: Iterable[VersionRecord]) -> Iterator[None]:
        """Have versions count as being loaded while they are sized, and wait for common room."""
        cold = {each.digest: each for each in versions if not self._engine.is_loaded(each.digest)}
        starts = {digest: self._start_of(version) for digest, version in cold.items()}
        self._mixing.update(cold.keys())
        for digest, start in starts.items():  # to size one is to fetch it
            self._starts.setdefault(digest, start)
        try:
            yield
        finally:
            self._mixing -= Counter(cold.keys())
            for digest in cold.keys() - self._mixing.keys():
                self._starts.pop(digest, None)

    def _start_of(self, version: VersionRecord) -> _LoadStart:
        tier: Tier = "disk" if self._files.is_on_disk(version) else "remote"
        return _LoadStart(tier, time.monotonic())

    async def _join_load(self, version: VersionRecord) -> None:
        def has_room() -> bool:
            return version.digest in self._with_room

        await self._loads.run(version.digest, lambda: self._load(version), has_room)

    async def activate(self, version: VersionRecord) -> None:
        """Load a version and bring it to the device.

        Raises: Unavailable (running requests hold the room), and what `load` raises.
        """
        async with self._lock(version.digest):
            if not await self._while_loaded(version, self._engine.activate):
                raise Unavailable(
                    f"running requests hold the room that {version.name}:{version.number} needs "
                    "on the device: try again",
                    code="adapter_memory",
                )

    async def pin(self, version: VersionRecord) -> None:
        """Load a version and keep it loaded, on the device too if it can be brought there now.

        Raises: PinBudgetExceeded, and what `load` raises.
        """
        async with self._lock(version.digest):
            await self._while_loaded(version, self._engine.pin)
            try:
                await self._engine.activate(version.digest)
            except Exception:
                log.exception("%s:%d stays in host memory", version.name, version.number)

    async def unpin(self, digest: str) -> None:
        """Let a version go like any other when room is needed."""
        async with self._lock(digest):
            await self._engine.unpin(digest)

    async def merge(self, version: VersionRecord) -> MergeResult:
        """Load a version and make its merged copy.

        Raises: MergeBudgetExceeded, and what `load` raises.
        """
        async with self._lock(version.digest):
            return await self._while_loaded(version, self._engine.merge)

    async def unmerge(self, digest: str) -> MergeResult:
        """Drop a merged copy."""
        async with self._lock(digest):
            return await self._engine.unmerge(digest)

    async def unload(self, digest: str, timeout_s: float | None) -> ResidentAdapter | None:
        """Drain a version and free its memory; None: wait as long as it takes.

        Raises: TimeoutError; the unload goes on.
        """
        task = self._unloads.start(digest, lambda: self._unload(digest))
        return await in_time(task, timeout_s)

    def loading(self) -> list[str]:
        """Return the digests that are being loaded for requests; from any thread."""
        return list({*self._loads.keys(), *list(self._mixing)})

    def is_unloading(self, digest: str) -> bool:
        """Whether an unload was begun and has not ended."""
        return self._unloads.is_running(digest)

    @asynccontextmanager
    async def guest(self, digest: str, read: Callable[[], AdapterWeights]) -> AsyncIterator[bool]:
        """Hold tensors while the block runs, or yield False where another would have to go."""
        async with self._lock(digest):
            if self._engine.is_loaded(digest):
                yield True
                return
            loop = asyncio.get_running_loop()
            weights = await loop.run_in_executor(self._threads, read)
            is_held = await self._engine.load_guest(weights)
            try:
                yield is_held
            finally:
                if is_held:
                    await self._engine.unload_adapter(digest, DRAIN_POLL_S)

    async def _load(self, version: VersionRecord) -> None:
        async with self._lock(version.digest):
            await self._ensure(version)

    async def _while_loaded(self, version: VersionRecord, work: Callable[[str], Awaitable[T]]) -> T:
        """Load a version for `work`, again if it had to make room in between; its lock is held."""
        for _ in range(MAX_LOADS):
            await self._ensure(version)
            try:
                return await work(version.digest)
            except NotFound:
                continue
        raise Unavailable(
            f"{version.name}:{version.number} had to make room for others: try again",
            code="adapter_memory",
        )

    async def _ensure(self, version: VersionRecord) -> None:
        """Load a version unless it is there; the digest's lock is held."""
        if self._engine.is_loaded(version.digest):
            return
        self._check_served(version)
        start = self._starts.pop(version.digest, None) or self._start_of(version)
        with self._failures_told():
            await self._bring(version)
        self.observer.on_load(start.tier, "host", time.monotonic() - start.at_s)

    async def _bring(self, version: VersionRecord) -> None:
        """Load a version, room first: who waits for room holds no tensors."""
        size, booking = await self._size_of(version), self._new_booking()
        try:
            await self._engine.book_room(booking, {version.digest: size})
            self._with_room.add(version.digest)
            async with self._unpacking:
                weights = await self._read(version, self._files.read_weights)
                await self._engine.load_adapter(weights)
        finally:
            self._with_room.discard(version.digest)
            self._engine.end_booking(booking)

    def _new_booking(self) -> str:
        self._num_bookings += 1
        return str(self._num_bookings)

    @contextmanager
    def _failures_told(self) -> Iterator[None]:
        """Have loads counted that fail, unless there is nothing to be loaded any more."""
        try:
            yield
        except NotFound:
            raise
        except QuickchangeError as error:
            self.observer.on_load_failure(error.code)
            raise

    async def _size_of(self, version: VersionRecord) -> PackedSize:
        size = self._engine.size_of(version.digest)
        if size is None:
            size = self._engine.packed_size(await self._read(version, self._files.measure))
        return size

    async def _read(self, version: VersionRecord, read: Callable[[VersionRecord], T]) -> T:
        """Read a version's files in a thread; they are fetched if they are not on this machine."""
        loop = asyncio.get_running_loop()
        try:
            if not self._files.is_on_disk(version):
                await loop.run_in_executor(self._fetchers, self._files.fetch, version)
            return await loop.run_in_executor(self._threads, read, version)
        except READ_ERRORS as error:
            if isinstance(error, BlobMissing | FileNotFoundError):
                await self._read_again(version)
                self._check_served(version)
            raise _answer(error, version) from error

    def _check_served(self, version: VersionRecord) -> None:
        if not self._is_served(version.digest):
            raise NotFound(
                f"{version.name!r} was deleted or disabled", code="model_not_found", param="model"
            )

    async def _unload(self, digest: str) -> ResidentAdapter | None:
        async with self._lock(digest):
            if not self._engine.is_loaded(digest):
                return None
            while True:
                try:
                    return await self._engine.unload_adapter(digest, DRAIN_POLL_S)
                except TimeoutError:
                    continue

    def _lock(self, digest: str) -> asyncio.Lock:
        lock = self._locks.get(digest)
        if lock is None:
            lock = self._locks[digest] = asyncio.Lock()
        return lock


def _answer(error: Exception, version: VersionRecord) -> QuickchangeError:
    """Return what a failure to read a version's files is to a caller; none carries a path."""
    what = f"{version.name}:{version.number}"
    if isinstance(error, AdapterRefused):
        message = f"{what} does not fit this base: {error.problems[0].message}"
        return Conflict(message, code="base_mismatch")
    if isinstance(error, OSError):
        text = f"the files of {what} cannot be read: {error.strerror}"
        return Unavailable(text, code="store_unavailable")
    return Unavailable(str(error), code="store_unavailable")
