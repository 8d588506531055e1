"""Who was served how much: virtual token counters, and who is next. Knows no requests.

The counters are those of VTC (Sheng et al. 2024, "Fairness in Serving Large Language Models",
algorithm 2): an account is charged for what it was given; the least charged is next; one that
begins to wait is lifted to the least of those that wait, or to the one that was last to wait, so
that idleness earns nothing. Ageing is added: a step of waiting since the last admission counts as
`AGE_CREDIT` tokens less, so that a stream of newcomers, all lifted to the floor, cannot keep out
one that lies a little above it.
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

from quickchange_server.engine.lazy_heap import LazyHeap

AGE_CREDIT = 8


@dataclass(slots=True, eq=False)
class Account:
    """One who is served: how much it got, since which step it waits, how many it has."""

    name: Hashable
    counter: int = 0
    since: int = 0
    num_waiting: int = 0
    num_running: int = 0

    @property
    def rank(self) -> int:
        """The lower, the sooner. It never falls."""
        return self.counter + AGE_CREDIT * self.since

    @property
    def is_idle(self) -> bool:
        """Whether it neither waits nor runs."""
        return not self.num_waiting and not self.num_running


A = TypeVar("A", bound=Account)


class Accounts(Generic[A]):
    """Accounts side by side. Idle ones are forgotten once that changes nothing."""

    def __init__(self, make: Callable[[Hashable], A], is_ready: Callable[[A], bool]) -> None:
        """`is_ready` says whether an account has something that may be tried now."""
        self._make = make
        self._accounts: dict[Hashable, A] = {}
        self._waiting: LazyHeap[A] = LazyHeap(lambda a: a.counter, lambda a: a.num_waiting > 0)
        self._ready: LazyHeap[A] = LazyHeap(lambda a: a.rank, is_ready)
        self._idle: LazyHeap[A] = LazyHeap(lambda a: a.counter, lambda a: a.is_idle)
        self._last: A | None = None

    def __len__(self) -> int:
        return len(self._accounts)

    def open(self, name: Hashable) -> A:
        """Return the account of that name, a new one if there is none."""
        account = self._accounts.get(name)
        if account is None:
            account = self._accounts[name] = self._make(name)
        return account

    @property
    def floor(self) -> int:
        """The counter of the least served of those that wait, or of the last one that did."""
        least = self._waiting.least() or self._last
        return 0 if least is None else least.counter

    def least_served(self) -> A | None:
        """Return who is next of those that are ready."""
        return self._ready.least()

    def next_served(self, number: int) -> list[A]:
        """Return about who is next, and behind them, of those that are ready."""
        return self._ready.first(number)

    def begin_waiting(self, account: A, step: int, *, is_new: bool) -> None:
        """Count one more that waits; a new one lifts an account that did not wait before."""
        if not account.num_waiting:
            account.since = step
            if is_new:
                account.counter = max(account.counter, self.floor)
        account.num_waiting += 1
        self._waiting.push(account)
        self._ready.push(account)

    def end_waiting(self, account: A, step: int, *, is_admitted: bool) -> None:
        """Count one less that waits: it runs now, or it was given up."""
        account.num_waiting -= 1
        account.num_running += is_admitted
        if is_admitted:
            account.since = step
        if not account.num_waiting:
            self._last = account
        self._forget_idle(account)

    def end_running(self, account: A) -> None:
        """Count one less that runs."""
        account.num_running -= 1
        self._forget_idle(account)

    def make_ready(self, account: A) -> None:
        """Look again at an account that was not ready when it was its turn."""
        self._ready.push(account)

    def _forget_idle(self, account: A) -> None:
        """Drop idle accounts that a new request would lift to the floor anyway."""
        if account.is_idle:
            self._idle.push(account)
        floor = self.floor
        while (idle := self._idle.least()) and idle.counter <= floor and idle is not self._last:
            self._idle.pop()
            del self._accounts[idle.name]
