"""Which adapters the engine holds, and where: host copies, pool slots, merged copies.

Lives on the engine thread, but for `claim`, `start_leaving` and `book_free_room`, which the event
loop calls: a request claims its versions before it is submitted, so what it uses is neither evicted
nor unloaded before it ends. A lock guards what both threads touch (users, leaving, host copies).
Packing and merging are computed elsewhere and handed in finished; `HostCopies` says who stays in
host memory, and a `SlotLoader` fills and empties slots.
"""

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future

from quickchange_adapters.errors import MergeBudgetExceeded, PinBudgetExceeded
from quickchange_adapters.host_adapter import HostAdapter
from quickchange_adapters.merge import MergedCopy
from quickchange_adapters.pool import AdapterPool, Slot

from quickchange_server.engine.host_copies import HostCopies
from quickchange_server.engine.interface import ResidentAdapter
from quickchange_server.engine.request import GenerationRequest, RequestFailure
from quickchange_server.engine.sequence import Sequence
from quickchange_server.engine.slot_loader import SlotLoader

MAX_DAMAGED = 2
PIN_SHARE = 0.75
"""Of host memory, so that what is not pinned can still be loaded beside."""


class AdapterResidency:
    """Host copies under a ceiling, slots in the pool, merged copies under a ceiling."""

    def __init__(self, pool: AdapterPool, host_ceiling_bytes: int, merged_ceiling: int) -> None:
        self.pool = pool
        self.loader = SlotLoader(pool, self.num_users)
        self.merged: dict[str, MergedCopy] = {}
        self.merged_ceiling_bytes = merged_ceiling
        self._host = HostCopies(host_ceiling_bytes, self._is_idle, self._is_fixed, self._drop)
        self._users: Counter[str] = Counter()
        self._merging: dict[str, int] = {}
        self.quarantined: set[str] = set()
        self._leaving: set[str] = set()
        self._num_damaged: Counter[str] = Counter()
        self._lock = threading.RLock()
        self._described: dict[str, ResidentAdapter] = {}
        self._changed: set[str] = set()

    @property
    def host_bytes(self) -> int:
        """Bytes of all host copies."""
        return self._host.num_bytes

    @property
    def num_host_evictions(self) -> int:
        """How many host copies made room for others."""
        return self._host.num_evictions

    @property
    def merged_bytes(self) -> int:
        """Bytes of all merged copies."""
        return sum(copy.num_bytes for copy in self.merged.values())

    def host_copy(self, digest: str) -> HostAdapter | None:
        """Return a loaded version that takes requests."""
        return None if digest in self._leaving else self._host.get(digest)

    def num_users(self, digest: str) -> int:
        """How many live requests use a version."""
        return self._users[digest]

    def add_host(self, adapter: HostAdapter) -> "Future[None]":
        """Keep a host copy; idle ones, least recently used first, make room for it.

        It resolves at once, or when copies in use leave room.

        Raises: MemoryError if pinned and merged ones leave no room under the ceiling, or if the
        version is still being unloaded.
        """
        with self._lock:
            if adapter.digest in self._leaving:
                raise MemoryError(f"adapter {adapter.digest[:12]} is being unloaded: try again")
            return self._host.add(adapter)

    def book_room(self, owner: str, sizes: Mapping[str, int]) -> "Future[None]":
        """Keep room for versions that are to be in host memory together; idle ones make it.

        It resolves at once, or when copies in use leave room. `end_booking` gives it back.

        Raises: MemoryError if pinned and merged ones leave no room under the ceiling.
        """
        with self._lock:
            return self._host.book(owner, sizes)

    def book_free_room(self, owner: str, sizes: Mapping[str, int]) -> bool:
        """Keep room for versions if nobody has to go for it; from any thread."""
        with self._lock:
            return self._host.book_free(owner, sizes)

    def end_booking(self, owner: str) -> None:
        """Give booked room back, or no longer wait for it."""
        with self._lock:
            self._host.end_booking(owner)

    def admit_copies(self) -> None:
        """Keep host copies that waited for room, as far as there is some by now."""
        with self._lock:
            self._host.admit()

    def add_guest(self, adapter: HostAdapter) -> "Future[bool] | None":
        """Keep a host copy and bring it to the device, if there is room that nobody has."""
        with self._lock:
            if not self._host.has_free_room(adapter) or not self.pool.has_free_room(adapter):
                return None
            self.add_host(adapter)
            return self.activate(adapter.digest)

    def stop(self, error: Exception) -> None:
        """Let nobody go on waiting for a copy."""
        self.loader.stop(error)
        with self._lock:
            self._host.stop(error)

    def claim(self, request: GenerationRequest) -> RequestFailure | None:
        """Count a request as a user of its adapters until `leave`, or say why it cannot be one."""
        with self._lock:
            for adapter in request.adapters:
                refusal = self._refusal(adapter.digest)
                if refusal is not None:
                    return refusal
            for adapter in request.adapters:
                self._users[adapter.digest] += 1
                self._changed.add(adapter.digest)
                self._host.touch(adapter.digest)
        return None

    def leave(self, request: GenerationRequest) -> None:
        """Forget an ended request."""
        with self._lock:
            self.loader.leave(request.request_id)
            for adapter in request.adapters:
                self._users[adapter.digest] -= 1
                self._changed.add(adapter.digest)
                assert self._users[adapter.digest] >= 0

    def _refusal(self, digest: str) -> RequestFailure | None:
        if digest in self.quarantined:
            message = f"adapter {digest[:12]} produced non-finite values repeatedly"
            return RequestFailure("adapter_quarantined", message)
        if digest in self._leaving or digest not in self._host:
            return RequestFailure("adapter_not_loaded", f"adapter {digest[:12]} was unloaded")
        return None

    def take_slots(self, sequence: Sequence) -> tuple[Slot, ...] | None:
        """Acquire a slot for every adapter of a request, or none at all (None): ask again then."""
        return self.loader.take(sequence.request_id, self._copies_of(sequence))

    def prefetch(self, waiting: Iterable[Sequence]) -> None:
        """Bring the adapters of requests that wait to the device, in room that nobody needs."""
        for sequence in waiting:
            if not self.loader.prefetch(self._copies_of(sequence)):
                return

    def _copies_of(self, sequence: Sequence) -> list[HostAdapter]:
        return [self._host[adapter.digest] for adapter in sequence.request.adapters]

    def give_slots(self, sequence: Sequence) -> None:
        """Release a request's slots; they stay resident until their rows are wanted."""
        self._release(sequence.slots)
        sequence.slots = ()

    def reserve_merge(self, digest: str, needed_bytes: int) -> None:
        """Keep room for a merged copy until `end_merge`. Raises: MergeBudgetExceeded."""
        if digest not in self.merged and digest not in self._merging:
            used = self.merged_bytes + sum(self._merging.values())
            if used + needed_bytes > self.merged_ceiling_bytes:
                raise MergeBudgetExceeded(needed_bytes, used, self.merged_ceiling_bytes)
            self._merging[digest] = needed_bytes

    def end_merge(self, digest: str) -> None:
        """Give back the room that was kept, whether the copy was made or not."""
        self._merging.pop(digest, None)

    def add_merged(self, copy: MergedCopy) -> MergedCopy:
        """Keep a merged copy whose room was reserved, or the one that is there already."""
        self._changed.add(copy.digest)
        return self.merged.setdefault(copy.digest, copy)

    def drop_merged(self, digest: str) -> int:
        """Drop a merged copy; return its bytes, 0 if there was none."""
        copy = self.merged.pop(digest, None)
        self._changed.add(digest)
        if copy is None:
            return 0
        self.loader.free(copy)
        return copy.num_bytes

    def pin(self, digest: str) -> None:
        """Never drop a host copy to make room, and its slot only when nothing else does.

        Raises: PinBudgetExceeded.
        """
        with self._lock:
            pinned = self.pool.pinned - {digest}
            used = sum(self._host[other].num_bytes for other in pinned)
            needed = self._host[digest].num_bytes
            ceiling = int(self._host.ceiling_bytes * PIN_SHARE)
            if used + needed > ceiling:
                raise PinBudgetExceeded(needed, used, ceiling)
            self.pool.pinned.add(digest)
            self._changed.add(digest)

    def unpin(self, digest: str) -> None:
        """Let a version go like any other when room is needed; a repeat is a no-op."""
        with self._lock:
            self.pool.pinned.discard(digest)
            self._changed.add(digest)

    def activate(self, digest: str) -> "Future[bool]":
        """Bring a loaded version to the device; whether it is there, since slots may be in use."""
        return self.loader.activate(self._host[digest])

    def note_damage(self, digests: Iterable[str]) -> None:
        """Count a step's non-finite results, once per adapter; the second time it is out.

        It stays out whatever is unloaded and loaded again: the same digest is the same numbers.
        """
        for digest in digests:
            self._num_damaged[digest] += 1
            if self._num_damaged[digest] >= MAX_DAMAGED:
                self.quarantined.add(digest)

    def start_leaving(self, digest: str) -> None:
        """Refuse new requests for a version from now on."""
        with self._lock:
            self._leaving.add(digest)

    def can_leave(self, digest: str) -> bool:
        """Whether nobody uses a version any more, and nothing is being done with it."""
        return self._is_idle(digest)

    def finish_leaving(
        self, digest: str, on_done: Callable[[ResidentAdapter | None], None]
    ) -> None:
        """Free all of an unused version's memory, and say what it was; None: it was not loaded."""
        with self._lock:
            state = self.describe(digest) if digest in self._host else None
            self.drop_merged(digest)
            self.pool.pinned.discard(digest)
            self.loader.retire(digest, self._host.pop(digest), lambda: on_done(state))
            del self._users[digest]
            self._leaving.discard(digest)

    def describe(self, digest: str) -> ResidentAdapter:
        """Where one loaded version's bytes are."""
        slot = self.pool.get(digest)
        merged = self.merged.get(digest)
        return ResidentAdapter(
            digest,
            self._host[digest].num_bytes,
            0 if slot is None else slot.num_bytes,
            0 if merged is None else merged.num_bytes,
            self._users[digest],
            digest in self.pool.pinned,
        )

    def describe_all(self) -> dict[str, ResidentAdapter]:
        """Every loaded version by digest; what was returned before stays as it was."""
        with self._lock:
            return self._describe_changed()

    def _describe_changed(self) -> dict[str, ResidentAdapter]:
        for changed in (self.pool.changed, self._host.changed):
            self._changed |= changed
            changed.clear()
        if self._changed:
            self._described = dict(self._described)
        for digest in self._changed:
            self._described.pop(digest, None)
            if digest in self._host:
                self._described[digest] = self.describe(digest)
        self._changed.clear()
        return self._described

    def _is_idle(self, digest: str) -> bool:
        return not self._users[digest] and not self.loader.is_busy(digest)

    def _drop(self, digest: str) -> None:
        """Drop an idle version to make room for another one."""
        self.pool.evict(digest)
        self.loader.free(self._host.pop(digest))
        del self._users[digest]

    def _is_fixed(self, digest: str) -> bool:
        return digest in self.merged or digest in self.pool.pinned

    def _release(self, slots: Iterable[Slot]) -> None:
        for slot in slots:
            self.pool.release(slot)
