"""Packed versions in host memory, under a ceiling of bytes.

| a copy | then |
|---|---|
| is in use, pinned, merged, or on its way to the device | it stays |
| came and was not used yet | it stays, for `keep_s` at most: whoever asked is about to use it |
| is idle | it goes when room is needed, least recently used first |
| finds no room because others are in use | it waits for them, first come, first served |
| would find no room if nobody used anything | it is refused |

Knows no pool and no requests. Its owner calls it under a lock of its own.
"""

import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field

from quickchange_adapters.host_adapter import HostAdapter

KEEP_S = 2.0


@dataclass(slots=True)
class Arrival:
    """A copy that waits for room; resolves when it is there."""

    adapter: HostAdapter
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
        return not self._arrivals and self.num_bytes + adapter.num_bytes <= self.ceiling_bytes

    def add(self, adapter: HostAdapter) -> "Future[None]":
        """Keep a copy, now or when those in use leave room for it.

        Raises: MemoryError if it does not fit beside those that stay whoever uses them.
        """
        arrival = Arrival(adapter)
        if adapter.digest in self._copies:
            arrival.done.set_result(None)
            return arrival.done
        if self._is_hopeless(adapter):
            raise MemoryError(self._no_room(adapter))
        self._arrivals.append(arrival)
        self.admit()
        return arrival.done

    def admit(self) -> None:
        """Keep those that wait, as far as there is room by now."""
        while self._arrivals:
            arrival = self._arrivals[0]
            if arrival.done.cancelled():
                self._arrivals.popleft()
            elif self._make_room(arrival.adapter):
                self._arrivals.popleft()
                self._keep(arrival.adapter)
                if arrival.done.set_running_or_notify_cancel():
                    arrival.done.set_result(None)
            elif not self._is_hopeless(arrival.adapter):
                return
            else:
                self._arrivals.popleft()
                _fail(arrival.done, MemoryError(self._no_room(arrival.adapter)))

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

    def _keep(self, adapter: HostAdapter) -> None:
        if adapter.digest not in self._copies:
            self._copies[adapter.digest] = adapter
            self.num_bytes += adapter.num_bytes
            self.changed.add(adapter.digest)
            self._kept_until_s[adapter.digest] = time.monotonic() + self._keep_s

    def _make_room(self, adapter: HostAdapter) -> bool:
        """Drop idle copies until one fits; none of them if it would not fit even then."""
        excess = self.num_bytes + adapter.num_bytes - self.ceiling_bytes
        if adapter.digest in self._copies or excess <= 0:
            return True
        going = []
        for digest in self._idle():
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

    def _idle(self) -> Iterator[str]:
        now_s = time.monotonic()
        for digest in self._copies:
            is_kept = self._kept_until_s.get(digest, 0.0) > now_s
            if not is_kept and not self._is_fixed(digest) and self._is_idle(digest):
                yield digest

    def _is_hopeless(self, adapter: HostAdapter) -> bool:
        return self._fixed_bytes() + adapter.num_bytes > self.ceiling_bytes

    def _fixed_bytes(self) -> int:
        fixed = (self._copies[digest] for digest in self._copies if self._is_fixed(digest))
        return sum(adapter.num_bytes for adapter in fixed)

    def _no_room(self, adapter: HostAdapter) -> str:
        return (
            f"adapter needs {adapter.num_bytes} bytes of host memory; of {self.ceiling_bytes} "
            f"{self._fixed_bytes()} are of adapters that are pinned or merged: raise "
            "--adapter-host-bytes, or unpin or unmerge some"
        )


def _fail(done: "Future[None]", error: Exception) -> None:
    if done.set_running_or_notify_cancel():
        done.set_exception(error)
