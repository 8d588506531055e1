"""The device pool: adapters at their real ranks, in two plain arenas per projection group.

One eighth of the ceiling is kept for updates of the head and the embedding, which are as wide as
the vocabulary and live outside the arenas.

| invariant | meaning |
|---|---|
| ranges of live slots never overlap | nobody reads another adapter's rows |
| every live row lies below `num_active_rows` | the active window is a view of the arenas |
| a slot with references is never evicted | a running request keeps its weights |
| a pinned slot is evicted last, when nothing else makes room | nobody waits for ever |

Slots may move (`compact`, `acquire`) between steps only; `generation` grows whenever slots
come, go or move, so a plan made under an older generation is stale. Rows of dropped slots keep
their old (finite) values: steps mask them out.
"""

import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from quickchange_adapters.copy_stream import CopyStream
from quickchange_adapters.host_adapter import HostAdapter
from quickchange_adapters.layout import ROW_UNIT, AdapterLayout, GroupShape
from quickchange_adapters.weights import LoraPair
from quickchange_adapters.zero_memory import lazy_zeros

VOCABULARY_SHARE = 8


@dataclass(frozen=True, slots=True)
class RowRange:
    """Rows [start, end) of one group's arenas; with `has_bias` the last one is a bias."""

    start: int
    end: int
    has_bias: bool = False

    @property
    def num_rows(self) -> int:
        """How many rows."""
        return self.end - self.start


@dataclass(slots=True, eq=False)
class Slot:
    """One version's place on the device: a row range per group, and the vocabulary's two ends."""

    digest: str
    ranges: dict[str, RowRange]
    num_bytes: int
    num_references: int = 0
    head: LoraPair | None = None
    embedding: LoraPair | None = None


@dataclass(slots=True)
class Arena:
    """One group's storage: lora_a [layers, rows, parts, in], lora_b [layers, rows, out]."""

    shape: GroupShape
    lora_a: Tensor
    lora_b: Tensor
    used: list[RowRange] = field(default_factory=list)

    @property
    def num_rows(self) -> int:
        """Capacity in rank rows."""
        return self.lora_a.shape[1]

    @property
    def num_active_rows(self) -> int:
        """End of the last live range: the window that a dense step computes."""
        return self.used[-1].end if self.used else 0

    def find_free(self, num_rows: int) -> RowRange | None:
        """Return the lowest hole of so many rows, or None."""
        start = 0
        for live in self.used:
            if live.start - start >= num_rows:
                break
            start = live.end
        if start + num_rows > self.num_rows:
            return None
        return RowRange(start, start + num_rows)

    def take(self, rows: RowRange) -> None:
        """Mark rows as live."""
        self.used.append(rows)
        self.used.sort(key=lambda live: live.start)


def _ignore(_seconds: float) -> None:
    pass


class AdapterPool:
    """Slots of versions on the device, under a byte ceiling, least recently used goes first.

    `on_load` is told how many seconds each copy took; on a GPU how long it took to queue it.
    `changed` collects the digests of slots that came or went; who reads it empties it.
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
            kind: Arena(
                shape,
                lazy_zeros(
                    (shape.num_layers, rows, shape.num_parts, shape.in_features), dtype, device
                ),
                lazy_zeros((shape.num_layers, rows, shape.out_features), dtype, device),
            )
            for kind, shape in layout.groups.items()
        }
        self._slots: OrderedDict[str, Slot] = OrderedDict()
        self.pinned: set[str] = set()
        self.num_evictions = 0
        self.generation = 0
        self.changed: set[str] = set()
        self.on_load: Callable[[float], None] = _ignore

    @property
    def used_bytes(self) -> int:
        """Bytes of live rows."""
        return sum(slot.num_bytes for slot in self._slots.values())

    @property
    def slots(self) -> tuple[Slot, ...]:
        """Live slots, least recently used first."""
        return tuple(self._slots.values())

    def get(self, digest: str) -> Slot | None:
        """Return the slot of a version if it is resident."""
        return self._slots.get(digest)

    def can_ever_hold(self, *adapters: HostAdapter) -> bool:
        """Whether an empty pool would hold all these adapters together."""
        vocabulary_bytes = sum(adapter.num_vocabulary_bytes for adapter in adapters)
        rows: Counter[str] = Counter()
        for adapter in adapters:
            rows.update({kind: group.num_rows for kind, group in adapter.groups.items()})
        return vocabulary_bytes <= self.vocabulary_ceiling_bytes and all(
            num_rows <= self.num_rows for num_rows in rows.values()
        )

    def has_free_room(self, adapter: HostAdapter) -> bool:
        """Whether an adapter could be brought in now without another one's going."""
        return adapter.digest in self._slots or self._fits(adapter)

    def acquire(self, *adapters: HostAdapter) -> tuple[Slot, ...] | None:
        """Return a slot for each adapter with one more reference, copying in what is missing.

        Evicts unreferenced slots, least recently used first, pinned ones last. None: they do not
        fit together now, because other referenced slots hold the rows; nothing was changed.
        """
        wanted = {adapter.digest: adapter for adapter in adapters}
        missing = [adapter for digest, adapter in wanted.items() if digest not in self._slots]
        if missing and not self._could_fit(missing, wanted):
            return None
        held = [slot for digest in wanted if (slot := self._slots.get(digest)) is not None]
        for slot in held:
            slot.num_references += 1  # what is wanted is not evicted for its companions
        try:
            for adapter in missing:
                slot = self._load(adapter)
                slot.num_references += 1
                held.append(slot)
        finally:
            for slot in held:
                slot.num_references -= 1
        slots = tuple(self._slots[adapter.digest] for adapter in adapters)
        for slot in slots:
            self._slots.move_to_end(slot.digest)
            slot.num_references += 1
        return slots

    def release(self, slot: Slot) -> None:
        """Give one reference back; the slot stays resident until its rows are wanted."""
        assert slot.num_references > 0, f"slot {slot.digest[:12]} released too often"
        slot.num_references -= 1

    def evict(self, digest: str) -> int:
        """Drop an unreferenced slot; return its bytes (0 if it was not resident)."""
        slot = self._slots.get(digest)
        if slot is None:
            return 0
        assert slot.num_references == 0, f"slot {digest[:12]} is in use"
        del self._slots[digest]
        self.generation += 1
        self.changed.add(digest)
        for kind, rows in slot.ranges.items():
            self.arenas[kind].used.remove(rows)
        return slot.num_bytes

    def compact(self) -> None:
        """Fill holes from the end, so that the active window stays small. Between steps only."""
        for arena in self.arenas.values():
            self._fill_holes(arena)

    def check_integrity(self) -> None:
        """Assert the invariants of the table above."""
        for kind, arena in self.arenas.items():
            live = sorted(
                (slot.ranges[kind] for slot in self._slots.values() if kind in slot.ranges),
                key=lambda rows: rows.start,
            )
            assert live == arena.used
            assert all(a.end <= b.start for a, b in zip(live, live[1:], strict=False))
            assert not live or live[-1].end <= arena.num_rows

    def _load(self, adapter: HostAdapter) -> Slot:
        """Copy an adapter in; `_could_fit` has said that it fits. On an error nothing is kept."""
        started_s = time.monotonic()
        self._make_room(adapter)
        slot = Slot(adapter.digest, {}, adapter.num_bytes)
        try:
            for kind, group in adapter.groups.items():
                rows = self.arenas[kind].find_free(group.num_rows)
                assert rows is not None
                slot.ranges[kind] = replace(rows, has_bias=group.has_bias)
                self.arenas[kind].take(slot.ranges[kind])
            with self._copies.copying():
                self._copy_in(adapter, slot)
        except BaseException:
            for kind, rows in slot.ranges.items():
                self.arenas[kind].used.remove(rows)
            raise
        self._slots[adapter.digest] = slot
        self.generation += 1
        self.changed.add(adapter.digest)
        self.on_load(time.monotonic() - started_s)
        return slot

    def _copy_in(self, adapter: HostAdapter, slot: Slot) -> None:
        for kind, group in adapter.groups.items():
            arena, rows = self.arenas[kind], slot.ranges[kind]
            arena.lora_a[:, rows.start : rows.end].copy_(group.lora_a, non_blocking=True)
            arena.lora_b[:, rows.start : rows.end].copy_(group.lora_b, non_blocking=True)
        slot.head = _to_device(adapter.head, self.device)
        slot.embedding = _to_device(adapter.embedding, self.device)

    def _fits(self, adapter: HostAdapter) -> bool:
        held = sum(_vocabulary_bytes(slot) for slot in self._slots.values())
        if held + adapter.num_vocabulary_bytes > self.vocabulary_ceiling_bytes:
            return False
        return all(
            self.arenas[kind].find_free(group.num_rows) is not None
            for kind, group in adapter.groups.items()
        )

    def _make_room(self, adapter: HostAdapter) -> None:
        idle = [slot for slot in self._slots.values() if slot.num_references == 0]
        for slot in sorted(idle, key=lambda slot: slot.digest in self.pinned):
            if self._fits(adapter):
                return
            self.evict(slot.digest)
            self.num_evictions += 1
        if not self._fits(adapter):
            for arena in self.arenas.values():
                self._slide(arena)

    def _could_fit(self, missing: list[HostAdapter], wanted: Collection[str]) -> bool:
        """Whether all of these fit once every idle slot that is not wanted is gone."""
        stays = [s for s in self._slots.values() if s.num_references or s.digest in wanted]
        vocabulary_bytes = sum(_vocabulary_bytes(slot) for slot in stays)
        vocabulary_bytes += sum(adapter.num_vocabulary_bytes for adapter in missing)
        rows: Counter[str] = Counter()
        for slot in stays:
            rows.update({kind: held.num_rows for kind, held in slot.ranges.items()})
        for adapter in missing:
            rows.update({kind: group.num_rows for kind, group in adapter.groups.items()})
        return vocabulary_bytes <= self.vocabulary_ceiling_bytes and all(
            rows[kind] <= arena.num_rows for kind, arena in self.arenas.items()
        )

    def _owners(self, arena: Arena) -> dict[RowRange, Slot]:
        kind = arena.shape.kind
        return {slot.ranges[kind]: slot for slot in self._slots.values() if kind in slot.ranges}

    def _fill_holes(self, arena: Arena) -> None:
        owners = self._owners(arena)
        for rows in reversed(list(arena.used)):
            hole = arena.find_free(rows.num_rows)
            if hole is not None and hole.start < rows.start:
                self._move(arena, owners[rows], rows, hole.start)

    def _slide(self, arena: Arena) -> None:
        """Move every live range down to the end of the one before it: no hole is left."""
        owners = self._owners(arena)
        end = 0
        for rows in list(arena.used):
            if rows.start > end:
                self._move(arena, owners[rows], rows, end)
            end += rows.num_rows

    def _move(self, arena: Arena, slot: Slot, source: RowRange, start: int) -> None:
        target = replace(source, start=start, end=start + source.num_rows)
        for tensor in (arena.lora_a, arena.lora_b):
            moved = tensor[:, source.start : source.end]
            if target.end > source.start:
                moved = moved.clone()
            tensor[:, target.start : target.end].copy_(moved)
        arena.used.remove(source)
        arena.take(target)
        slot.ranges[arena.shape.kind] = target
        self.generation += 1


def _to_device(pair: LoraPair | None, device: torch.device) -> LoraPair | None:
    if pair is None:
        return None
    return LoraPair(
        pair.lora_a.to(device, copy=True, non_blocking=True),
        pair.lora_b.to(device, copy=True, non_blocking=True),
    )


def _vocabulary_bytes(slot: Slot) -> int:
    return sum(pair.num_bytes for pair in (slot.head, slot.embedding) if pair is not None)
