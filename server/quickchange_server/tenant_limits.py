"""Two kinds of limit for each tenant: how often in a minute, and how many at once. Knows no HTTP.

Counted by this process, in memory; a tenant that is back at its start is forgotten.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class PerMinute:
    """A minute's tries at once, of which one comes back every 60 / `limit` s; None: no limit."""

    def __init__(self, limit: int | None, clock: Callable[[], float] = time.monotonic) -> None:
        self.limit = limit
        self._clock = clock
        self._full_at_s: dict[str, float] = {}

    def take(self, tenant: str, number: int = 1) -> float | None:
        """Count tries; or count nothing, and return after how many seconds they may come again.

        More than a minute's at once may come after a pause, and cost a longer one.
        """
        if self.limit is None:
            return None
        now, one_s = self._clock(), 60.0 / self.limit
        self._full_at_s = {name: at_s for name, at_s in self._full_at_s.items() if at_s > now}
        full_at_s = max(self._full_at_s.get(tenant, now), now) + number * one_s
        wait_s = full_at_s - now - max(60.0, number * one_s)
        if wait_s > 1e-6:
            return wait_s
        self._full_at_s[tenant] = full_at_s
        return None


class AtOnce:
    """How many a tenant has under way."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()

    @property
    def total(self) -> int:
        """What all tenants have under way."""
        return self._counts.total()

    def of(self, tenant: str) -> int:
        """Return what one tenant has under way."""
        return self._counts[tenant]

    def add(self, tenant: str, number: int = 1) -> None:
        """Begin so many."""
        self._counts[tenant] += number

    def remove(self, tenant: str, number: int = 1) -> None:
        """End so many."""
        self._counts[tenant] -= number
        assert self._counts[tenant] >= 0
        if not self._counts[tenant]:
            del self._counts[tenant]

    @contextmanager
    def one(self, tenant: str) -> Iterator[None]:
        """Count one while the block runs."""
        self.add(tenant)
        try:
            yield
        finally:
            self.remove(tenant)
