"""The least of many things whose keys only grow: O(log n), also when keys grow in between."""

import heapq
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class LazyHeap(Generic[T]):
    """Things by a key that never shrinks, each in it at most once.

    A thing's entry keeps the key it was pushed with, a lower bound, until it comes to the top;
    there it is sunk to where it belongs, or dropped if it no longer `belongs`. So a growing key
    and a departure cost nothing at the time.
    """

    def __init__(self, key: Callable[[T], int], belongs: Callable[[T], bool]) -> None:
        self._key = key
        self._belongs = belongs
        self._entries: list[tuple[int, int, T]] = []
        self._members: set[T] = set()
        self._num_pushed = 0

    def push(self, item: T) -> None:
        """Put a thing in; one that is in it already stays."""
        if item not in self._members:
            self._members.add(item)
            self._num_pushed += 1
            heapq.heappush(self._entries, (self._key(item), self._num_pushed, item))

    def least(self) -> T | None:
        """Return the thing with the least key, of equal ones the first pushed; it stays in."""
        while self._entries:
            key, number, item = self._entries[0]
            now = self._key(item)
            if not self._belongs(item):
                self.pop()
            elif now > key:
                heapq.heapreplace(self._entries, (now, number, item))
            else:
                return item
        return None

    def first(self, number: int) -> list[T]:
        """Return about the `number` least that belong, by the keys their entries have."""
        found: list[T] = []
        border = [(*self._entries[0][:2], 0)] if self._entries else []
        for _ in range(2 * number):
            if not border or len(found) >= number:
                break
            *_, place = heapq.heappop(border)
            item = self._entries[place][2]
            if self._belongs(item):
                found.append(item)
            for child in range(2 * place + 1, min(2 * place + 3, len(self._entries))):
                heapq.heappush(border, (*self._entries[child][:2], child))
        return found

    def pop(self) -> T:
        """Take out what is at the top."""
        item = heapq.heappop(self._entries)[2]
        self._members.remove(item)
        return item
