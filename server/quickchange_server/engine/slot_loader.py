"""Brings versions to the device while steps run, and gives their memory back when they leave.

| thread | does |
|---|---|
| engine | takes rows, starts fills, publishes them between steps |
| `quickchange-slots` | copies into rows that no plan names, empties rows, frees large memory |

A waiting request never holds one slot while it waits for another: a reservation is of all its slots
or of none. While they are filled, and until their request takes them, nobody evicts them: else two
requests could load and evict each other's for ever. A reservation that stands in others' way
without being taken (its request is behind somebody who waits for room) is given up, so that nobody
waits for what waits for him.
"""

import logging
import queue
from collections.abc import Callable, Iterable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial

from quickchange_adapters.host_adapter import HostAdapter
from quickchange_adapters.pool import AdapterPool, Slot

from quickchange_server.engine.torch_threads import use_one_thread

MAX_REFUSALS = 8
"""So many steps in which somebody else went without may a filled slot wait for its request."""
MAX_PREFETCHES = 2
MAX_ROUNDS = 512
"""So many steps may a hint wait for what is being filled for others; then it is told that there is
no room. Who wants to unload the version waits for that."""
log = logging.getLogger(__name__)


@dataclass(slots=True)
class Reservation:
    """Slots that are kept for one request, each with a reference of its own."""

    slots: tuple[Slot, ...]
    num_refusals: int = 0
    last_round: int = -1

    @property
    def is_ready(self) -> bool:
        """Whether all of them are filled."""
        return all(slot.is_ready for slot in self.slots)


@dataclass(slots=True)
class Activation:
    """Somebody who wants a version on the device for no request; resolves to whether it is."""

    adapter: HostAdapter
    since_round: int = 0
    done: "Future[bool]" = field(default_factory=Future)


class SlotLoader:
    """Fills slots for requests, for hints and ahead of time. Called by the engine thread alone.

    `num_users` says how many live requests use a version. `wake` is called on the other thread when
    there is something to publish; `refresh` before anybody is told of what was published.
    """

    def __init__(
        self,
        pool: AdapterPool,
        num_users: Callable[[str], int],
        executor: Executor | None = None,
    ) -> None:
        self._pool = pool
        self._num_users = num_users
        self._executor = executor or ThreadPoolExecutor(1, "quickchange-slots", use_one_thread)
        self.wake: Callable[[], object] = lambda: None
        self.refresh: Callable[[], None] = lambda: None
        self._reservations: dict[str, Reservation] = {}
        self._failures: dict[str, Exception] = {}
        self._unfillable: set[str] = set()
        self._activations: list[Activation] = []
        self._filling: set[str] = set()
        self._finished: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._news: list[Callable[[], None]] = []
        self._round = 0
        self._refused: set[tuple[tuple[str, int], ...]] = set()

    def take(self, owner: str, adapters: Iterable[HostAdapter]) -> tuple[Slot, ...] | None:
        """Return the slots of a request, each with a reference, or see that they are filled.

        None: they are being filled, or there is no room now; ask again at the next step.

        Raises: what went wrong when they were filled.
        """
        failure = self._failures.pop(owner, None)
        if failure is not None:
            raise failure
        reservation = self._reservations.get(owner) or self._find_room(owner, tuple(adapters))
        if reservation is None or not reservation.is_ready:
            return None
        self._reservations.pop(owner, None)
        return reservation.slots

    def leave(self, owner: str) -> None:
        """Forget what was kept for a request that ended."""
        self._failures.pop(owner, None)
        self._give_up(owner)

    def prefetch(self, adapters: Iterable[HostAdapter]) -> bool:
        """Fill slots for a request that waits, in room that nobody needs: a few at a time.

        False: nothing more can be filled ahead now.
        """
        missing = [adapter for adapter in adapters if self._pool.get(adapter.digest) is None]
        if not missing or any(adapter.digest in self._unfillable for adapter in missing):
            return True  # what failed once is tried again when it is its request's turn
        if len(self._filling) >= MAX_PREFETCHES:
            return False
        slots = self._pool.reserve(*missing, evictable=self._unused)
        if slots is None:
            return False
        self._fill_all(slots, missing)
        for slot in slots:
            self._pool.release(slot)
        return True

    def activate(self, adapter: HostAdapter) -> "Future[bool]":
        """Fill a version's slot for a hint; False: what is in use holds the room."""
        activation = Activation(adapter, self._round)
        activation.done.set_running_or_notify_cancel()  # from here on nobody can cancel it
        self._activations.append(activation)
        self._go_on_activating()
        return activation.done

    def is_busy(self, digest: str) -> bool:
        """Whether a version's host copy is being read, or about to be."""
        return digest in self._filling or any(
            activation.adapter.digest == digest for activation in self._activations
        )

    def retire(self, digest: str, adapter: object, on_done: Callable[[], None]) -> None:
        """Give back the memory of an idle version's slot, and of `adapter`; then call `on_done`."""
        slot = self._pool.retire(digest)
        self._unfillable.discard(digest)
        held = [adapter]
        del adapter

        def work() -> None:
            held.clear()
            if slot is not None:
                self._pool.empty(slot)

        def finish(error: Exception | None) -> None:
            if error is not None:
                log.error("memory of adapter %s was not given back", digest[:12], exc_info=error)
            if slot is not None:
                self._pool.forget(slot)
            self._news.append(on_done)

        self._submit(work, finish)

    def free(self, thing: object) -> None:
        """Free something large elsewhere: the engine has better things to do."""
        held = [thing]
        self._submit(held.clear, lambda error: None)

    def publish(self) -> None:
        """Let steps use what was filled, and tell who waits for it. Once before each step."""
        self._round += 1
        self._refused.clear()
        while not self._finished.empty():
            self._finished.get_nowait()()
        self._go_on_activating()
        if self._news:
            self.refresh()
        while self._news:
            self._news.pop()()

    def stop(self, error: Exception) -> None:
        """End the other thread; nobody goes on waiting."""
        self._executor.shutdown(wait=False, cancel_futures=True)
        while self._news:
            self._news.pop()()
        for activation in self._activations:
            activation.done.set_exception(error)
        self._activations.clear()

    def _find_room(self, owner: str, adapters: tuple[HostAdapter, ...]) -> Reservation | None:
        """Reserve, or say no without looking where one of the same size found no room this step.

        A step may ask for dozens that all want room, and room does not grow while it is scheduled.
        """
        size = self._size_of_missing(adapters)
        if size and size in self._refused:
            return None
        reservation = self._reserve(owner, adapters)
        if reservation is None and self._note_refusal():
            reservation = self._reserve(owner, adapters)
        if reservation is None and size:
            self._refused.add(size)
        return reservation

    def _size_of_missing(self, adapters: tuple[HostAdapter, ...]) -> tuple[tuple[str, int], ...]:
        """Return rows by group of a single adapter that has no slot; else nothing."""
        if len(adapters) != 1 or self._pool.has_slot(adapters[0].digest):
            return ()
        rows = ((kind, group.num_rows) for kind, group in adapters[0].groups.items())
        return (("", adapters[0].num_vocabulary_bytes), *sorted(rows))

    def _reserve(self, owner: str, adapters: tuple[HostAdapter, ...]) -> Reservation | None:
        slots = self._pool.reserve(*adapters, evictable=self._for_a_request)
        if slots is None:
            return None
        self._fill_all(slots, adapters)
        self._reservations[owner] = reservation = Reservation(slots)
        return reservation

    def _fill_all(self, slots: Iterable[Slot], adapters: Iterable[HostAdapter]) -> None:
        for slot, adapter in zip(slots, adapters, strict=True):
            if not slot.is_ready and slot.digest not in self._filling:
                self._filling.add(slot.digest)
                self._submit(partial(self._pool.fill, slot, adapter), partial(self._end_fill, slot))

    def _end_fill(self, slot: Slot, error: Exception | None) -> None:
        self._filling.discard(slot.digest)
        if error is None:
            self._unfillable.discard(slot.digest)
            self._pool.publish(slot)
            return
        self._unfillable.add(slot.digest)
        log.error("adapter %s cannot be brought to the device", slot.digest[:12], exc_info=error)
        for owner, reservation in list(self._reservations.items()):
            if slot in reservation.slots:
                self._give_up(owner)
                self._failures[owner] = error
        self._pool.discard(slot)
        for activation in self._activations:
            if activation.adapter.digest == slot.digest:
                self._news.append(partial(activation.done.set_exception, error))
        self._activations = [a for a in self._activations if a.adapter.digest != slot.digest]

    def _go_on_activating(self) -> None:
        """Settle activations that are ready or hopeless, and start those that now have room."""
        waiting, self._activations = self._activations, []
        for activation in waiting:
            adapter = activation.adapter
            if self._pool.get(adapter.digest) is not None:
                self._news.append(partial(activation.done.set_result, True))
            elif self._start(adapter) or self._may_wait(activation):
                self._activations.append(activation)
            else:
                self._news.append(partial(activation.done.set_result, False))

    def _may_wait(self, activation: Activation) -> bool:
        """Whether there may be room soon: what is being filled may be idle once it is there."""
        is_coming = bool(self._filling) or self._pool.is_cramped
        return is_coming and self._round - activation.since_round < MAX_ROUNDS

    def _start(self, adapter: HostAdapter) -> bool:
        """Begin to fill a version's slot unless that was begun; False: there is no room now."""
        if adapter.digest in self._filling:
            return True
        slots = self._pool.reserve(adapter, evictable=self._for_a_hint)
        if slots is None:
            return False
        self._fill_all(slots, [adapter])
        self._pool.release(slots[0])
        return True

    def _give_up(self, owner: str) -> None:
        reservation = self._reservations.pop(owner, None)
        for slot in () if reservation is None else reservation.slots:
            self._pool.release(slot)

    def _note_refusal(self) -> bool:
        """Count against filled slots that wait for their request; whether one was given up."""
        num_before = len(self._reservations)
        for owner, reservation in list(self._reservations.items()):
            if reservation.is_ready and reservation.last_round != self._round:
                reservation.last_round = self._round
                reservation.num_refusals += 1
                if reservation.num_refusals > MAX_REFUSALS:
                    self._give_up(owner)
        return len(self._reservations) < num_before

    def _for_a_request(self, slot: Slot) -> int:
        """What nobody waits for goes first; pinned ones go when nothing else makes room."""
        if slot.digest in self._pool.pinned:
            return 2
        return int(self._num_users(slot.digest) > 0)

    def _for_a_hint(self, slot: Slot) -> int | None:
        return None if self._num_users(slot.digest) else int(slot.digest in self._pool.pinned)

    def _unused(self, slot: Slot) -> int | None:
        return None if self._num_users(slot.digest) or slot.digest in self._pool.pinned else 0

    def _submit(self, work: Callable[[], None], finish: Callable[[Exception | None], None]) -> None:
        """Run `work` on the other thread, and then `finish` on this one, between two steps."""

        def run() -> None:
            try:
                work()
            except Exception as error:
                self._finished.put(partial(finish, error))
            else:
                self._finished.put(partial(finish, None))
            self.wake()

        self._executor.submit(run)
