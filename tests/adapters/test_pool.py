"""The device pool: rows never overlap, references hold, ceilings hold, copies are exact."""

import ctypes
import zlib

import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quickchange_adapters.host_adapter import HostAdapter, pack_adapter
from quickchange_adapters.layout import AdapterLayout, GroupShape, Place
from quickchange_adapters.pool import VOCABULARY_SHARE, AdapterPool, Slot
from quickchange_adapters.weights import AdapterWeights, LoraPair

QKV = GroupShape("qkv", 6, (4, 2, 2), 2)
OUT = GroupShape("o", 4, (6,), 2)
LAYOUT = AdapterLayout(
    {"qkv": QKV, "o": OUT},
    {
        **{f"layers.{n}.{p}": Place("qkv", n, i) for n in range(2) for i, p in enumerate("qkv")},
        **{f"layers.{n}.o": Place("o", n, 0) for n in range(2)},
    },
)
ROW_BYTES = LAYOUT.row_elements * 4


def weights_of(digest: str, ranks: dict[str, int]) -> AdapterWeights:
    generator = torch.Generator().manual_seed(zlib.crc32(digest.encode()))
    pairs = {}
    for module, rank in ranks.items():
        place = LAYOUT.places[module]
        shape = LAYOUT.groups[place.kind]
        out = shape.part_outs[place.part]
        pairs[module] = LoraPair(
            torch.randn(rank, shape.in_features, generator=generator),
            torch.randn(out, rank, generator=generator),
        )
    return AdapterWeights(digest, pairs)


def adapter_of(digest: str, rank: int, groups: str = "both") -> HostAdapter:
    modules = [m for m in LAYOUT.places if groups == "both" or LAYOUT.places[m].kind == groups]
    return pack_adapter(weights_of(digest, dict.fromkeys(modules, rank)), LAYOUT, torch.float32)


def pool_of(rows: int) -> AdapterPool:
    """A pool of so many rank rows, beside the share that is kept for the vocabulary."""
    ceiling = -(-rows * ROW_BYTES * VOCABULARY_SHARE // (VOCABULARY_SHARE - 1))
    pool = AdapterPool(LAYOUT, ceiling, torch.float32, torch.device("cpu"))
    assert pool.num_rows == rows
    return pool


def only(slots: tuple[Slot, ...] | None) -> Slot:
    assert slots is not None
    (slot,) = slots
    return slot


def assert_rows_equal(pool: AdapterPool, slot: Slot, adapter: HostAdapter) -> None:
    for kind, group in adapter.groups.items():
        rows = slot.ranges[kind]
        arena = pool.arenas[kind]
        assert torch.equal(arena.lora_a[:, rows.start : rows.end], group.lora_a)
        assert torch.equal(arena.lora_b[:, rows.start : rows.end], group.lora_b)


def test_rows_are_rounded_to_units_and_padded_with_zeros() -> None:
    packed = pack_adapter(
        weights_of("mixed", {"layers.0.q": 3, "layers.0.k": 9, "layers.1.o": 1}),
        LAYOUT,
        torch.float32,
    )
    assert packed.groups["qkv"].num_rows == 16
    assert packed.groups["o"].num_rows == 8
    assert packed.groups["qkv"].lora_a[0, 3:, 0].abs().max() == 0
    assert packed.groups["qkv"].lora_a[1].abs().max() == 0
    assert packed.groups["o"].lora_b[1, 0].abs().max() > 0


def test_a_value_beyond_the_serving_dtype_is_refused() -> None:
    pair = LoraPair(torch.full((1, 4), 1e30), torch.ones(6, 1))
    with pytest.raises(ValueError, match="float16"):
        pack_adapter(AdapterWeights("huge", {"layers.0.o": pair}), LAYOUT, torch.float16)


def test_least_recently_used_idle_adapter_makes_room() -> None:
    pool = pool_of(32)
    adapters = [adapter_of(f"a{i}", 16) for i in range(3)]
    for adapter in adapters[:2]:
        pool.release(only(pool.acquire(adapter)))
    assert pool.acquire(adapters[0]) is not None
    assert pool.acquire(adapters[2]) is not None
    assert pool.get("a1") is None
    assert pool.get("a0") is not None


def test_referenced_adapters_are_not_evicted_and_nothing_is_dropped_in_vain() -> None:
    pool = pool_of(32)
    only(pool.acquire(adapter_of("held", 24)))
    idle = only(pool.acquire(adapter_of("idle", 8)))
    pool.release(idle)
    assert pool.acquire(adapter_of("large", 16)) is None
    assert pool.get("idle") is idle


def test_an_adapter_takes_rows_only_in_groups_it_targets() -> None:
    pool = pool_of(16)
    assert pool.acquire(adapter_of("q", 16, "qkv")) is not None
    assert pool.acquire(adapter_of("o", 16, "o")) is not None
    assert pool.acquire(adapter_of("more", 8, "o")) is None


def test_several_adapters_come_together_or_not_at_all() -> None:
    pool = pool_of(48)
    pool.release(only(pool.acquire(adapter_of("idle", 16))))
    only(pool.acquire(adapter_of("busy", 16)))
    assert pool.acquire(adapter_of("a", 24), adapter_of("b", 16)) is None
    assert pool.get("idle") is not None
    assert pool.get("a") is None
    assert pool.num_evictions == 0
    pair = pool.acquire(adapter_of("idle", 16), adapter_of("b", 16))
    assert pair is not None
    assert [slot.digest for slot in pair] == ["idle", "b"]
    assert [slot.num_references for slot in pair] == [1, 1]
    twice = pool.acquire(adapter_of("b", 16), adapter_of("b", 16))
    assert twice is not None
    assert twice[0] is twice[1]
    assert twice[0].num_references == 3
    pool.check_integrity()


WIDE = GroupShape("wide", 8192, (8192,), 2)
WIDE_LAYOUT = AdapterLayout({"wide": WIDE}, {f"layers.{n}": Place("wide", n, 0) for n in range(2)})
MIB = 1 << 20


def test_what_leaves_gives_its_memory_back_to_the_system() -> None:
    """64 MiB in host memory and as much in the pool, by the process's own count."""
    process = psutil.Process()
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", lambda kept: None)

    def grown_mib() -> float:
        malloc_trim(0)  # what the allocator keeps of freed memory is none of the adapter's
        return (process.memory_info().rss - before) / MIB

    pool = AdapterPool(WIDE_LAYOUT, 256 * MIB, torch.float32, torch.device("cpu"))
    malloc_trim(0)
    before = process.memory_info().rss
    pair = LoraPair(torch.ones(1, 8192).expand(512, 8192), torch.ones(8192, 1).expand(8192, 512))
    weights = AdapterWeights("wide", dict.fromkeys(WIDE_LAYOUT.places, pair))
    adapter = pack_adapter(weights, WIDE_LAYOUT, torch.float32)
    assert adapter.num_bytes == 64 * MIB
    assert grown_mib() > 60
    slot = only(pool.acquire(adapter))
    assert slot.num_bytes == pool.used_bytes == 64 * MIB
    assert grown_mib() > 120
    del adapter
    assert grown_mib() < 90
    pool.release(slot)
    assert pool.retire("wide") is slot
    assert pool.used_bytes == 64 * MIB
    pool.empty(slot)
    pool.forget(slot)
    assert pool.used_bytes == 0
    assert grown_mib() < 25
    assert not pool.arenas["wide"].lora_a.any()


OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from(["acquire", "release", "evict", "compact"]),
        st.integers(0, 7),
        st.sampled_from([1, 8, 12, 24, 40]),
        st.sampled_from(["both", "qkv", "o"]),
    ),
    max_size=60,
)


@settings(max_examples=60, deadline=None)
@given(OPERATIONS)
def test_any_sequence_of_operations_keeps_rows_apart_and_bytes_true(
    operations: list[tuple[str, int, int, str]],
) -> None:
    pool = pool_of(64)
    adapters: dict[str, HostAdapter] = {}
    held: list[Slot] = []
    for operation, index, rank, groups in operations:
        name = f"a{index}"
        if operation == "acquire":
            adapter = adapters.setdefault(name, adapter_of(name, rank, groups))
            held += pool.acquire(adapter) or ()
        elif operation == "release" and held:
            pool.release(held.pop(index % len(held)))
        elif operation == "evict" and not any(s.digest == name for s in held):
            pool.evict(name)
        elif operation == "compact":
            pool.compact()
        pool.check_integrity()
        for slot in pool.slots:
            assert_rows_equal(pool, slot, adapters[slot.digest])
        assert all(pool.get(slot.digest) is slot for slot in held)
        assert pool.used_bytes <= pool.total_bytes
