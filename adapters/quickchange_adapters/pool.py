"""The device pool: adapters at their real ranks, in two plain arenas per projection group.

One eighth of the ceiling is kept for updates of the head and the embedding, which are as wide as
the vocabulary and live outside the arenas.

| a slot is | how it comes and goes | its rows |
|---|---|---|
| filling | `reserve`; `fill` on any thread; then `publish` or `discard` | taken, named by no plan |
| ready | `publish`; then `evict` or `retire` | taken |
| retired | `retire`; `empty` on any thread; then `forget` | taken, named by no plan |

| invariant | meaning |
|---|---|
| ranges of slots never overlap | nobody reads another adapter's rows |
| every taken row lies below `num_active_rows` | the active window is a view of the arenas |
| a slot with references, or one that is filling, is never evicted | a request keeps its weights |
| rows hold finite numbers at any moment, also while they are written | zero times them is zero |

All but `fill` and `empty` is called by one thread, between steps. Ready slots may move then;
`generation` grows whenever slots come, go or move, so a plan made under an older one is stale.
"""

import math
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import chain

import torch

from quickchange_adapters.arena import Arena, RowRange
from quickchange_adapters.copy_stream import CopyStream
from quickchange_adapters.host_adapter import HostAdapter
from quickchange_adapters.layout import ROW_UNIT, AdapterLayout
from quickchange_adapters.packed_size import PackedSize
from quickchange_adapters.weights import LoraPair
from quickchange_adapters.zero_memory import resident_bytes

VOCABULARY_SHARE = 8


@dataclass(slots=True, eq=False)
class Slot:
    """One version's place on the device: a row range per group, and the vocabulary's two ends."""

    digest: str
    ranges: dict[str, RowRange]
    num_bytes: int
    num_references: int = 0
    head: LoraPair | None = None
    embedding: LoraPair | None = None
    num_vocabulary_bytes: int = 0
    is_ready: bool = False
    fence: torch.cuda.Event | None = None
    fill_s: float = 0.0


Evictable = Callable[[Slot], int | None]
"""How soon an idle slot goes when room is needed: lowest first, then least recently used first.
None: it stays."""


class AdapterPool:
    """Slots of versions on the device, under a byte ceiling, least recently used goes first.

    `on_load` is told how many seconds each copy took, when it is published. `changed` collects the
    digests of slots that came or went; who reads it empties it.
    """

    def __init__(
        self,
        layout: AdapterLayout,
        ceiling_bytes: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.layout = layout
        self.row_bytes = row_bytes = layout.row_elements * dtype.itemsize
        self.vocabulary_ceiling_bytes = ceiling_bytes // VOCABULARY_SHARE
        for_rows = ceiling_bytes - self.vocabulary_ceiling_bytes
        rows = for_rows // max(row_bytes, 1) // ROW_UNIT * ROW_UNIT
        self.num_rows = rows
        self.total_bytes = rows * row_bytes + self.vocabulary_ceiling_bytes
        self.device = device
        self._copies = CopyStream(device)
        self.arenas = {
            kind: Arena.of(shape, rows, dtype, device) for kind, shape in layout.groups.items()
        }
        self._slots: OrderedDict[str, Slot] = OrderedDict()
        self._retired: list[Slot] = []
        self.pinned: set[str] = set()
        self.num_evictions = 0
        self.used_bytes = 0
        """Of all slots; asked for at every step, so it is not added up then."""
        self.generation = 0
        self.changed: set[str] = set()
        self.on_load: Callable[[float], None] = lambda seconds: None
        self._has_holes = False
        self.is_cramped = False
        """Whether rows must move before something that was reserved in vain can have room."""

    def resident_bytes(self) -> int:
        """Return how much of it is in memory now, on a CPU: rows that were ever written."""
        tensors = [t for arena in self.arenas.values() for t in (arena.lora_a, arena.lora_b)]
        wide = sum(slot.num_vocabulary_bytes for slot in list(self._slots.values()))
        return wide + sum(resident_bytes(tensor) for tensor in tensors if tensor.nbytes)

    @property
    def slots(self) -> tuple[Slot, ...]:
        """Ready slots, least recently used first."""
        return tuple(slot for slot in self._slots.values() if slot.is_ready)

    def get(self, digest: str) -> Slot | None:
        """Return the slot of a version if it is ready."""
        slot = self._slots.get(digest)
        return slot if slot is not None and slot.is_ready else None

    def has_slot(self, digest: str) -> bool:
        """Whether a version is on the device, or on its way there."""
        return digest in self._slots

    def has_free_room(self, adapter: HostAdapter) -> bool:
        """Whether an adapter could be brought in now without another one's going."""
        return adapter.digest in self._slots or self._fits(adapter)

    @property
    def is_untidy(self) -> bool:
        """Whether `tidy` has something to do."""
        return self.is_cramped or self._has_holes

    def can_ever_hold(self, *sizes: PackedSize) -> bool:
        """Whether an empty pool would hold adapters of these sizes together."""
        return self._is_within_ceilings([], sizes)

    def reserve(
        self, *adapters: HostAdapter, evictable: Evictable | None = None
    ) -> tuple[Slot, ...] | None:
        """Return a slot for each adapter with one more reference; what is missing is to be filled.

        Idle slots are evicted as `evictable` says; None: pinned ones last. The answer None: they do
        not fit together now, and none of them was taken. If only scattered rows are free, `tidy`
        brings them together.
        """
        wanted = {adapter.digest: adapter for adapter in adapters}
        missing = [adapter for digest, adapter in wanted.items() if digest not in self._slots]
        rank = self._pinned_last if evictable is None else evictable
        if missing and not self._could_fit(missing, wanted, rank):
            return None
        held = [slot for digest in wanted if (slot := self._slots.get(digest)) is not None]
        for slot in held:
            slot.num_references += 1  # what is wanted is not evicted for its companions
        try:
            has_room = self._take_rows(missing, rank)
        finally:
            for slot in held:
                slot.num_references -= 1
        if not has_room:
            return None
        slots = tuple(self._slots[adapter.digest] for adapter in adapters)
        for slot in slots:
            self._slots.move_to_end(slot.digest)
            slot.num_references += 1
        return slots

    def fill(self, slot: Slot, adapter: HostAdapter) -> None:
        """Copy an adapter into its reserved rows, on any thread; it is done when this returns."""
        started_s = time.monotonic()
        with self._copies.copying(slot.fence):
            for kind, group in adapter.groups.items():
                self.arenas[kind].fill(slot.ranges[kind], group)
            slot.head = self._to_device(adapter.head)
            slot.embedding = self._to_device(adapter.embedding)
        slot.fill_s = time.monotonic() - started_s

    def publish(self, slot: Slot) -> None:
        """Let steps use a slot that was filled."""
        for pair in (slot.head, slot.embedding):
            if pair is not None:
                self._copies.share(pair.lora_a, pair.lora_b)
        slot.is_ready = True
        self.generation += 1
        self.changed.add(slot.digest)
        self.on_load(slot.fill_s)

    def discard(self, slot: Slot) -> None:
        """Free the rows of a slot that could not be filled, whoever waits for it."""
        assert not slot.is_ready
        del self._slots[slot.digest]
        self._give_rows(slot)

    def acquire(self, *adapters: HostAdapter) -> tuple[Slot, ...] | None:
        """Reserve slots and fill them here and now: for callers that nothing waits for.

        Returns None when they do not fit together now; an error leaves nothing of them behind.
        """
        slots = self.reserve(*adapters)
        if slots is None and self.is_cramped:
            self.tidy()
            slots = self.reserve(*adapters)
        try:
            for slot, adapter in zip(slots or (), adapters, strict=False):
                if not slot.is_ready:
                    self.fill(slot, adapter)
                    self.publish(slot)
        except BaseException:
            for slot in slots or ():
                slot.num_references -= 1
                if not slot.is_ready and slot.digest in self._slots:
                    self.discard(slot)
            raise
        return slots

    def release(self, slot: Slot) -> None:
        """Give one reference back; the slot stays resident until its rows are wanted."""
        assert slot.num_references > 0, f"slot {slot.digest[:12]} released too often"
        slot.num_references -= 1

    def evict(self, digest: str) -> int:
        """Drop an idle slot for others to take its rows; return its bytes, 0 if there was none."""
        slot = self._take_out(digest)
        if slot is None:
            return 0
        self._give_rows(slot)
        return slot.num_bytes

    def retire(self, digest: str) -> Slot | None:
        """Take an idle slot out of use, with its rows, to be emptied; None if there was none."""
        slot = self._take_out(digest)
        if slot is not None:
            slot.fence = self._copies.fence()
            self._retired.append(slot)
        return slot

    def empty(self, slot: Slot) -> None:
        """Give a retired slot's memory back to the system, on any thread. On a device it stays."""
        for kind, rows in slot.ranges.items():
            self.arenas[kind].give_memory_back(rows)
        slot.head = slot.embedding = None

    def forget(self, slot: Slot) -> None:
        """Free a retired slot's rows; `tidy` fills the holes."""
        self._retired.remove(slot)
        self._give_rows(slot)
        self._has_holes = True

    def tidy(self, max_bytes: float = math.inf) -> None:
        """Move rows of ready slots, so that holes go: about `max_bytes`, but at least one range.

        Between steps only. Rows close up to the front when somebody lacks room, and fill holes from
        the end after an unload, so that the active window stays small. Slots that are filling or
        retired stay where they are.
        """
        if not self.is_untidy:
            return
        budget = max_bytes
        for kind, rows, start in self._moves():
            if budget <= 0:
                return
            self._move(self.arenas[kind], kind, rows, start)
            budget -= rows.num_rows * self.arenas[kind].row_bytes
        self.is_cramped = self._has_holes = False

    def compact(self) -> None:
        """Fill all holes from the end at once."""
        self._has_holes = True
        self.tidy()

    def check_integrity(self) -> None:
        """Assert the invariants of the table above."""
        for kind, arena in self.arenas.items():
            taken = sorted(
                (slot.ranges[kind] for slot in self._all_slots() if kind in slot.ranges),
                key=lambda rows: rows.start,
            )
            assert taken == arena.used
            assert all(a.end <= b.start for a, b in zip(taken, taken[1:], strict=False))
            assert not taken or taken[-1].end <= arena.num_rows
        assert all(slot.num_references == 0 for slot in self._retired)
        assert self.used_bytes == sum(slot.num_bytes for slot in self._all_slots())

    def _all_slots(self) -> Iterator[Slot]:
        return chain(self._slots.values(), self._retired)

    def _pinned_last(self, slot: Slot) -> int:
        return int(slot.digest in self.pinned)

    def _idle(self, evictable: Evictable) -> list[Slot]:
        """Return the slots that may go, in the order in which they go."""
        idle = [slot for slot in self.slots if not slot.num_references]
        ranked = [(rank, slot) for slot in idle if (rank := evictable(slot)) is not None]
        return [slot for _, slot in sorted(ranked, key=lambda each: each[0])]

    def _could_fit(
        self, missing: Iterable[HostAdapter], wanted: Collection[str], evictable: Evictable
    ) -> bool:
        """Whether all of these fit once every slot that may go is gone."""
        gone = {slot.digest for slot in self._idle(evictable)} - set(wanted)
        stay = [slot for slot in self._slots.values() if slot.digest not in gone]
        return self._is_within_ceilings([*stay, *self._retired], [each.size for each in missing])

    def _is_within_ceilings(self, slots: Iterable[Slot], sizes: Iterable[PackedSize]) -> bool:
        vocabulary_bytes, rows = 0, Counter[str]()
        for slot in slots:
            vocabulary_bytes += slot.num_vocabulary_bytes
            rows.update({kind: held.num_rows for kind, held in slot.ranges.items()})
        for size in sizes:
            vocabulary_bytes += size.num_vocabulary_bytes
            rows.update(size.rows)
        return vocabulary_bytes <= self.vocabulary_ceiling_bytes and all(
            num_rows <= self.num_rows for num_rows in rows.values()
        )

    def _take_rows(self, adapters: Iterable[HostAdapter], evictable: Evictable) -> bool:
        """Take rows for all of these, or for none (False): enough are free, but scattered."""
        taken: list[Slot] = []
        for adapter in adapters:
            if not self._make_room(adapter, evictable):
                for slot in taken:
                    self.discard(slot)
                self.is_cramped = True
                return False
            taken.append(self._take(adapter))
        for slot in taken:
            slot.fence = self._copies.fence()
        return True

    def _take(self, adapter: HostAdapter) -> Slot:
        slot = Slot(adapter.digest, {}, adapter.num_bytes)
        slot.num_vocabulary_bytes = adapter.num_vocabulary_bytes
        for kind, group in adapter.groups.items():
            rows = self.arenas[kind].find_free(group.num_rows)
            assert rows is not None
            slot.ranges[kind] = replace(rows, has_bias=group.has_bias)
            self.arenas[kind].take(slot.ranges[kind])
        self._slots[adapter.digest] = slot
        self.used_bytes += slot.num_bytes
        return slot

    def _make_room(self, adapter: HostAdapter, evictable: Evictable) -> bool:
        for slot in self._idle(evictable):
            if self._fits(adapter):
                break
            self.evict(slot.digest)
            self.num_evictions += 1
        return self._fits(adapter)

    def _fits(self, adapter: HostAdapter) -> bool:
        held = sum(slot.num_vocabulary_bytes for slot in self._all_slots())
        if held + adapter.num_vocabulary_bytes > self.vocabulary_ceiling_bytes:
            return False
        return all(
            self.arenas[kind].find_free(group.num_rows) is not None
            for kind, group in adapter.groups.items()
        )

    def _take_out(self, digest: str) -> Slot | None:
        slot = self._slots.get(digest)
        if slot is None:
            return None
        assert slot.is_ready, f"slot {digest[:12]} is being filled"
        assert slot.num_references == 0, f"slot {digest[:12]} is in use"
        del self._slots[digest]
        self.generation += 1
        self.changed.add(digest)
        return slot

    def _give_rows(self, slot: Slot) -> None:
        self.used_bytes -= slot.num_bytes
        for kind, rows in slot.ranges.items():
            self.arenas[kind].give(rows)

    def _moves(self) -> Iterator[tuple[str, RowRange, int]]:
        """Yield what to move where: group kind, rows, first row of their new place."""
        for kind, arena in self.arenas.items():
            movable = [s.ranges[kind] for s in self.slots if kind in s.ranges]
            if self.is_cramped:
                moves = arena.gaps_from_the_front(movable)
            else:
                moves = arena.holes_from_the_end(movable if self._has_holes else ())
            for rows, start in moves:
                yield kind, rows, start

    def _move(self, arena: Arena, kind: str, source: RowRange, start: int) -> None:
        target = source.moved_to(start)
        arena.copy_rows(source, start)
        arena.give(source)
        arena.take(target)
        owner = next(slot for slot in self.slots if slot.ranges.get(kind) == source)
        owner.ranges[kind] = target
        if not self.is_cramped and target.end <= source.start:
            arena.give_memory_back(source)
        self.generation += 1

    def _to_device(self, pair: LoraPair | None) -> LoraPair | None:
        if pair is None:
            return None
        return LoraPair(
            pair.lora_a.to(self.device, copy=True, non_blocking=True),
            pair.lora_b.to(self.device, copy=True, non_blocking=True),
        )
