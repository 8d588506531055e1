"""Packed versions in host memory, under a ceiling of bytes.

| a copy | then |
|---|---|
| is in use, pinned, merged, or on its way to the device | it stays |
| came and was not used yet | it stays, for `keep_s` at most: whoever asked is about to use it |
| has room booked for it, or for others with it | it stays until the booking ends |
| is idle | it goes when room is needed, least recently used first |
| finds no room because others are in use | it waits for them, first come, first served |
| would find no room if nobody used anything | it is refused |

Who wants several copies together books room for all of them or waits for all of it, so that two who
want much never hold half of it each. Whoever has room never waits for anybody who waits for room:
what needs no more of it passes those who wait.

Knows no pool and no requests. Its owner calls it under a lock of its own.
"""

import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field

from quickchange_adapters.host_adapter import HostAdapter

KEEP_S = 2.0


@dataclass(slots=True)
class Arrival:
    """Who waits for room: a copy, or the owner of a booking; resolves when there is room.

    `sizes`: bytes by digest of all that is to be there together.
    """

    sizes: Mapping[str, int]
    adapter: HostAdapter | None = None
    owner: str = ""
    done: "Future[None]" = field(default_factory=Future)


class HostCopies:
    """Copies by digest, least recently used first.

    `is_idle`: whether nobody uses a version; `is_fixed`: whether it stays although nobody does.
    `drop` is called for each that makes room; it is to call `pop`.
    """

    def __init__(
        self,
        ceiling_bytes: int,
        is_idle: Callable[[str], bool],
        is_fixed: Callable[[str], bool],
        drop: Callable[[str], object],
        keep_s: float = KEEP_S,
    ) -> None:
        self.ceiling_bytes = ceiling_bytes
        self.num_bytes = 0
        self.num_evictions = 0
        self.changed: set[str] = set()
        """Digests that came or went; who reads it empties it."""
        self._is_idle = is_idle
        self._is_fixed = is_fixed
        self._drop = drop
        self._keep_s = keep_s
        self._copies: OrderedDict[str, HostAdapter] = OrderedDict()
        self._kept_until_s: dict[str, float] = {}
        self._booked: dict[str, Mapping[str, int]] = {}
        self._expected: dict[str, int] = {}  # bytes of what has room booked, here or not
        self._num_bookings: Counter[str] = Counter()
        self._arrivals: deque[Arrival] = deque()

    def __contains__(self, digest: str) -> bool:
        return digest in self._copies

    def __iter__(self) -> Iterator[str]:
        return iter(self._copies)

    def __getitem__(self, digest: str) -> HostAdapter:
        return self._copies[digest]

    def get(self, digest: str) -> HostAdapter | None:
        """Return a version's copy if there is one."""
        return self._copies.get(digest)

    def has_free_room(self, adapter: HostAdapter) -> bool:
        """Whether a copy could be kept without another one's going, or waiting longer."""
        return not self._arrivals and self._excess({adapter.digest: adapter.num_bytes}) <= 0

    def add(self, adapter: HostAdapter) -> "Future[None]":
        """Keep a copy, now or when those in use leave room for it.

        Raises: MemoryError if it does not fit beside those that stay whoever uses them.
        """
        return self._receive(Arrival({adapter.digest: adapter.num_bytes}, adapter))

    def book(self, owner: str, sizes: Mapping[str, int]) -> "Future[None]":
        """Keep room for copies that are there or to come, all of them or none, until `end_booking`.

        Raises: MemoryError if they do not fit beside those that stay whoever uses them.
        """
        return self._receive(Arrival(sizes, owner=owner))

    def book_free(self, owner: str, sizes: Mapping[str, int]) -> bool:
        """Keep room as `book` does, if no copy has to go for it and nobody waits."""
        if self._arrivals or self._excess(sizes) > 0:
            return False
        self._book(owner, sizes)
        return True

    def end_booking(self, owner: str) -> None:
        """Give booked room back, or no longer wait for it; a repeat is a no-op."""
        for digest in self._booked.pop(owner, ()):
            self._num_bookings[digest] -= 1
            if not self._num_bookings[digest]:
                del self._num_bookings[digest], self._expected[digest]
        for arrival in self._arrivals:
            if arrival.owner == owner:
                arrival.done.cancel()
        self.admit()

    def admit(self) -> None:
        """Give room to those that wait, as far as there is some by now."""
        while self._arrivals and self._is_settled(self._arrivals[0]):
            self._arrivals.popleft()

    def touch(self, digest: str) -> None:
        """Take note that a version is used: it is no longer kept for its first use."""
        self._copies.move_to_end(digest)
        self._kept_until_s.pop(digest, None)

    def pop(self, digest: str) -> HostAdapter | None:
        """Forget a copy; return it if there was one."""
        self._kept_until_s.pop(digest, None)
        adapter = self._copies.pop(digest, None)
        self.num_bytes -= 0 if adapter is None else adapter.num_bytes
        self.changed.add(digest)
        return adapter

    def stop(self, error: Exception) -> None:
        """Let nobody go on waiting."""
        while self._arrivals:
            _fail(self._arrivals.popleft().done, error)

    def _receive(self, arrival: Arrival) -> "Future[None]":
        if not self._missing(arrival.sizes):
            self._grant(arrival)
        elif self._is_hopeless(arrival.sizes):
            raise MemoryError(self._no_room(arrival.sizes))
        else:
            self._arrivals.append(arrival)
            self.admit()
        return arrival.done

    def _is_settled(self, arrival: Arrival) -> bool:
        """Give room to the first that waits, or refuse it; False: it goes on waiting."""
        if arrival.done.done():
            return True
        if self._make_room(arrival.sizes):
            self._grant(arrival)
            self._let_pass()
            return True
        if self._is_hopeless(arrival.sizes):
            _fail(arrival.done, MemoryError(self._no_room(arrival.sizes)))
            return True
        return False

    def _grant(self, arrival: Arrival) -> None:
        if not arrival.done.set_running_or_notify_cancel():
            return
        if arrival.adapter is not None:
            self._keep(arrival.adapter)
        else:
            self._book(arrival.owner, arrival.sizes)
        arrival.done.set_result(None)

    def _book(self, owner: str, sizes: Mapping[str, int]) -> None:
        assert owner not in self._booked, f"booking {owner} was made twice"
        self._booked[owner] = sizes
        self._expected.update(sizes)
        self._num_bookings.update(sizes.keys())

    def _let_pass(self) -> None:
        """Grant what needs no room any more: whoever has it may wait for just that."""
        for arrival in self._arrivals:
            if not arrival.done.done() and not self._missing(arrival.sizes):
                self._grant(arrival)

    def _keep(self, adapter: HostAdapter) -> None:
        if adapter.digest not in self._copies:
            self._copies[adapter.digest] = adapter
            self.num_bytes += adapter.num_bytes
            self.changed.add(adapter.digest)
            self._kept_until_s[adapter.digest] = time.monotonic() + self._keep_s

    def _make_room(self, sizes: Mapping[str, int]) -> bool:
        """Drop idle copies until these fit; none of them if they would not fit even then."""
        excess = self._excess(sizes)
        going = []
        for digest in self._idle(sizes) if excess > 0 else ():
            going.append(digest)
            excess -= self._copies[digest].num_bytes
            if excess <= 0:
                break
        if excess > 0:
            return False
        for digest in going:
            self._drop(digest)
            self.num_evictions += 1
        return True

    def _excess(self, sizes: Mapping[str, int]) -> int:
        """How many bytes too many there would be with these; nothing if they need no more."""
        missing = self._missing(sizes)
        if not missing:
            return 0
        to_come = sum(size for d, size in self._expected.items() if d not in self._copies)
        return self.num_bytes + to_come + sum(missing.values()) - self.ceiling_bytes

    def _missing(self, sizes: Mapping[str, int]) -> dict[str, int]:
        """Return what is neither here nor expected."""
        known = (self._copies, self._expected)
        return {d: size for d, size in sizes.items() if not any(d in each for each in known)}

    def _idle(self, wanted: Mapping[str, int]) -> Iterator[str]:
        now_s = time.monotonic()
        for digest in self._copies:
            is_kept = self._kept_until_s.get(digest, 0.0) > now_s
            is_wanted = digest in wanted or digest in self._expected
            if not (is_kept or is_wanted or self._is_fixed(digest)) and self._is_idle(digest):
                yield digest

    def _is_hopeless(self, sizes: Mapping[str, int]) -> bool:
        return self._fixed_bytes(sizes) + sum(sizes.values()) > self.ceiling_bytes

    def _fixed_bytes(self, wanted: Mapping[str, int]) -> int:
        """Return the bytes of those that stay in any case, but for the wanted ones."""
        fixed = [d for d in self._copies if d not in wanted and self._is_fixed(d)]
        return sum(self._copies[digest].num_bytes for digest in fixed)

    def _no_room(self, sizes: Mapping[str, int]) -> str:
        what = "adapter needs" if len(sizes) == 1 else f"{len(sizes)} adapters together need"
        return (
            f"{what} {sum(sizes.values())} bytes of host memory; of {self.ceiling_bytes} "
            f"{self._fixed_bytes(sizes)} are of adapters that are pinned or merged: raise "
            "--adapter-host-bytes, or unpin or unmerge some"
        )


def _fail(done: "Future[None]", error: Exception) -> None:
    if done.set_running_or_notify_cancel():
        done.set_exception(error)
