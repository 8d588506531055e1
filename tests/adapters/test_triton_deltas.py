"""The GPU's kernels for short row blocks against the plain reference, in Triton's interpreter.

The interpreter runs a kernel on the CPU, program by program. What it cannot show: bfloat16
products (it computes them wrongly), speed, and races between programs.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"

import pytest
import torch
from quickchange_adapters.arena import Arena
from quickchange_adapters.host_adapter import HostAdapter, pack_adapter
from quickchange_adapters.layout import AdapterLayout, GroupShape, Place
from quickchange_adapters.ops.deltas import add_deltas, add_reference
from quickchange_adapters.plan import RowBlock, StepPlan, Term, build_plan
from quickchange_adapters.pool import AdapterPool, Slot
from quickchange_adapters.weights import AdapterWeights, LoraPair
from torch import Tensor

pytest.importorskip("triton", reason="the kernels need Triton, which is made for Linux only")

from quickchange_adapters.ops import triton_deltas
from quickchange_adapters.ops.triton_deltas import MAX_OUTPUT_TILE, TritonDeltas
from quickchange_adapters.ops.triton_product import MAX_ROWS, SkinnyWeight
from quickchange_adapters.ops.triton_shrink import PIECE_COLUMNS

QKV = GroupShape("qkv", 40, (24, 10, 10), 2)
MAX_BLOCKS = 16
WIDE = GroupShape("wide", PIECE_COLUMNS + 150, (MAX_OUTPUT_TILE + 9,), 1)
LAYOUT = AdapterLayout(
    {"qkv": QKV, "wide": WIDE},
    {
        **{f"layers.{n}.{p}": Place("qkv", n, i) for n in range(2) for i, p in enumerate("qkv")},
        "wide": Place("wide", 0, 0),
    },
)


def adapter_of(seed: int, rank: int, dtype: torch.dtype, *, has_bias: bool) -> HostAdapter:
    generator = torch.Generator().manual_seed(seed)
    pairs, biases = {}, {}
    for module, place in LAYOUT.places.items():
        shape = LAYOUT.groups[place.kind]
        out = shape.part_outs[place.part]
        lora_a = torch.randn(rank, shape.in_features, generator=generator) / shape.in_features**0.5
        pairs[module] = LoraPair(lora_a, torch.randn(out, rank, generator=generator) / rank**0.5)
        if has_bias:
            biases[module] = torch.randn(out, generator=generator)
    return pack_adapter(AdapterWeights(f"a{seed}", pairs, biases), LAYOUT, dtype)


def pool_with(
    ranks: list[int], dtype: torch.dtype = torch.float32, *, has_bias: bool = False
) -> tuple[AdapterPool, list[Slot]]:
    row_bytes = LAYOUT.row_elements * dtype.itemsize
    pool = AdapterPool(LAYOUT, 256 * row_bytes, dtype, torch.device("cpu"))
    slots = [
        pool.acquire(adapter_of(seed, rank, dtype, has_bias=has_bias))
        for seed, rank in enumerate(ranks)
    ]
    return pool, [slot for taken in slots if taken is not None for slot in taken]


def blocks_of(slots: list[Slot], lengths: list[int], *, is_mixed: bool) -> list[RowBlock]:
    """Row blocks with a row of the base between any two."""
    blocks, start = [], 1
    for index, length in enumerate(lengths):
        terms = [Term(slots[index % len(slots)])]
        if is_mixed:
            terms = [Term(slot, 0.5 - i) for i, slot in enumerate(slots[:4])]
        blocks.append(RowBlock(start, start + length, tuple(terms)))
        start += length + 1
    return blocks


def plan_of(blocks: list[RowBlock], pool: AdapterPool, max_blocks: int = MAX_BLOCKS) -> StepPlan:
    tables = TritonDeltas(pool, max_blocks)
    return build_plan(blocks, blocks[-1].end + 1, pool, is_exact=False, tables=tables)


def add_all(y: Tensor, x: Tensor, arena: Arena, layer: int, plan: StepPlan) -> None:
    """Add a plan's deltas as a projection does."""
    assert isinstance(plan.tables, TritonDeltas)
    plan.tables.start(x, arena, layer)
    add_deltas(y, x, arena, layer, plan)


def assert_as_reference(
    plan: StepPlan, blocks: list[RowBlock], pool: AdapterPool, tolerance: float = 1e-5
) -> None:
    """Compare every group's last layer over random rows; rows of the base keep their bits."""
    for arena in pool.arenas.values():
        layer, dtype = arena.shape.num_layers - 1, arena.lora_a.dtype
        x = torch.randn(plan.num_tokens, arena.shape.in_features).to(dtype)
        start = torch.randn(plan.num_tokens, arena.shape.out_features).to(dtype)
        expected, actual = start.float(), start.clone()
        for block in blocks:
            add_reference(expected, x, arena, layer, block)
        add_all(actual, x, arena, layer, plan)
        torch.testing.assert_close(actual.float(), expected, atol=tolerance, rtol=tolerance)
        base_rows = [0, *(block.end for block in blocks)]
        assert torch.equal(actual[base_rows], start[base_rows])


@pytest.mark.parametrize("is_mixed", [False, True])
@pytest.mark.parametrize("lengths", [[1] * 4, [1, 16, 7], [1, 40, 3]])  # the last is cut
def test_real_ranks_and_mixes_agree_with_the_reference(lengths: list[int], is_mixed: bool) -> None:
    pool, slots = pool_with([1, 8, 12, 40])
    blocks = blocks_of(slots, lengths, is_mixed=is_mixed)
    plan = plan_of(blocks, pool)
    assert plan.tables is not None
    assert not plan.windows
    assert not plan.blocks
    assert_as_reference(plan, blocks, pool)


def test_float16_agrees_within_its_rounding() -> None:
    pool, slots = pool_with([8, 24], torch.float16)
    blocks = blocks_of(slots, [1, 1, 5], is_mixed=False)
    assert_as_reference(plan_of(blocks, pool), blocks, pool, tolerance=4e-3)


def test_biases_are_added_with_their_weight() -> None:
    pool, slots = pool_with([3, 20], has_bias=True)
    assert all(rows.has_bias for slot in slots for rows in slot.ranges.values())
    for is_mixed in (False, True):
        blocks = blocks_of(slots, [1, 2], is_mixed=is_mixed)
        assert_as_reference(plan_of(blocks, pool), blocks, pool)


def test_neighbours_with_one_adapter_are_joined_and_agree() -> None:
    pool, slots = pool_with([8])
    blocks = [RowBlock(i, i + 1, (Term(slots[0]),)) for i in range(1, 20)]
    plan = plan_of(blocks, pool, max_blocks=32)
    assert isinstance(plan.tables, TritonDeltas)
    assert plan.tables.tables.num_blocks == 2
    assert_as_reference(plan, [RowBlock(1, 20, (Term(slots[0]),))], pool)


def test_blocks_beyond_the_tables_are_computed_one_by_one() -> None:
    pool, slots = pool_with([8, 16, 24])
    blocks = blocks_of(slots, [1] * 6, is_mixed=False)
    plan = plan_of(blocks, pool, max_blocks=4)
    assert len(plan.blocks) == 2
    assert_as_reference(plan, blocks, pool)


@pytest.mark.parametrize("later", [1, 4])
def test_programs_launched_for_a_bucket_serve_any_later_step(later: int) -> None:
    """A captured step launches what it launched at its capture, whatever the tables hold now."""
    pool, slots = pool_with([8, 40, 16])
    tables = TritonDeltas(pool, 8)
    tables.fill(blocks_of(slots, [1, 1, 1], is_mixed=False))
    grid = blocks_of(slots, [1] * later, is_mixed=True)
    tables.tables.fill(grid)
    tables.launch_for(8)
    assert_as_reference(StepPlan(grid[-1].end + 1, tables=tables), grid, pool)


def test_a_row_of_infinities_stays_alone() -> None:
    pool, slots = pool_with([8, 8, 24])
    blocks = blocks_of(slots, [1, 3, 1], is_mixed=False)
    plan = plan_of(blocks, pool)
    x = torch.randn(plan.num_tokens, QKV.in_features)
    x[4] = float("inf")  # the middle one of the second block's rows
    y = torch.zeros(plan.num_tokens, QKV.out_features)
    add_all(y, x, pool.arenas["qkv"], 0, plan)
    assert not torch.isfinite(y[4]).all()
    assert torch.isfinite(y[[row for row in range(plan.num_tokens) if row != 4]]).all()
    assert y[3].abs().min() > 0


def test_a_neighbours_overflow_and_foreign_rank_rows_are_never_read() -> None:
    """Two adapters share a tile's width of rank rows; one's infinities never meet the other."""
    pool, slots = pool_with([8, 8, 40])
    foreign = slots[1].ranges["qkv"]
    pool.arenas["qkv"].lora_a[:, foreign.start : foreign.end] = float("inf")
    pool.arenas["qkv"].lora_b[:, foreign.start : foreign.end] = float("nan")
    blocks = blocks_of(slots, [1, 1, 1], is_mixed=False)
    plan = plan_of(blocks, pool)
    y = torch.zeros(plan.num_tokens, QKV.out_features)
    add_all(y, torch.randn(plan.num_tokens, QKV.in_features), pool.arenas["qkv"], 0, plan)
    assert torch.isnan(y[3]).all()
    assert torch.isfinite(y[[0, 1, 2, 4, 5]]).all()
    assert y[1].abs().min() > 0


def test_a_strided_input_is_read_in_place() -> None:
    pool, slots = pool_with([8])
    blocks = blocks_of(slots, [2], is_mixed=False)
    plan = plan_of(blocks, pool)
    arena = pool.arenas["qkv"]
    wide = torch.randn(plan.num_tokens, 2 * QKV.in_features)
    x = wide[:, QKV.in_features :]
    expected = torch.zeros(plan.num_tokens, QKV.out_features)
    actual = expected.clone()
    add_reference(expected, x, arena, 1, blocks[0])
    add_all(actual, x, arena, 1, plan)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["qkv", "wide"])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("lengths", [[1] * 4, [1, MAX_ROWS - 6, 1], [1, MAX_ROWS]])
def test_deltas_apart_are_those_in_place(lengths: list[int], kind: str, *, has_bias: bool) -> None:
    """The last case has too many rows for memory of their own."""
    pool, slots = pool_with([3, 40, 16])
    blocks = blocks_of(slots, lengths, is_mixed=True)
    plan = plan_of(blocks, pool)
    assert plan.tables is not None
    arena = pool.arenas[kind]
    shape, layer = arena.shape, arena.shape.num_layers - 1
    weight = SkinnyWeight(torch.randn(shape.out_features, shape.in_features))
    bias = torch.randn(shape.out_features) if has_bias else None
    x = torch.randn(plan.num_tokens, shape.in_features)
    in_place = weight.apply(x, bias)
    add_all(in_place, x, arena, layer, plan)
    found = plan.tables.project(weight, x, bias, arena, layer)
    assert (found.deltas is None) is (plan.num_tokens > MAX_BLOCKS)
    whole = found.output if found.deltas is None else found.output + found.deltas
    assert torch.equal(whole, in_place)
    assert not torch.equal(whole, weight.apply(x, bias))


def test_what_lay_apart_is_gone_when_another_step_has_other_rows() -> None:
    """A row of the base, and one whose adapter has nothing for the projection, get nothing."""
    pool, slots = pool_with([8, 8])
    tables = TritonDeltas(pool, MAX_BLOCKS)
    only_wide = Slot("only-wide", {"wide": slots[1].ranges["wide"]}, 0)
    x, arena = torch.randn(4, QKV.in_features), pool.arenas["qkv"]
    weight = SkinnyWeight(torch.zeros(QKV.out_features, QKV.in_features))
    tables.fill([RowBlock(row, row + 1, (Term(slots[0]),)) for row in range(4)])
    first = tables.project(weight, x, None, arena, 0).deltas
    assert first is not None
    assert first.abs().amax(1).min() > 0
    tables.fill([RowBlock(1, 2, (Term(only_wide),)), RowBlock(2, 3, (Term(slots[1]),))])
    second = tables.project(weight, x, None, arena, 0).deltas
    assert second is not None
    assert (second.abs().amax(1) > 0).tolist() == [False, False, True, False]


def test_sums_between_the_kernels_take_no_more_than_their_share(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What does not fit is computed one by one."""
    pool, slots = pool_with([8, 16, 24])
    monkeypatch.setattr(triton_deltas, "MAX_HIDDEN_BYTES", 3 * 3 * 1024)  # qkv has three parts
    tables = TritonDeltas(pool, MAX_BLOCKS, 64)
    blocks = blocks_of(slots, [1] * 6, is_mixed=False)
    plan = plan_with(tables, blocks, pool)
    assert tables.tables.max_items == 3
    assert len(plan.blocks) == 4
    assert_as_reference(plan, blocks, pool)


def test_what_is_captured_is_launched_the_same_way_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """In eager steps kernels are chained; in a step to capture they are not, nor in its warm-up."""
    launches: list[bool] = []

    class Kernel:
        def __getitem__(self, grid: object) -> "Kernel":
            return self

        def __call__(self, *values: object, **constants: object) -> None:
            launches.append(bool(constants["IS_CHAINED"]))

    monkeypatch.setattr(triton_deltas, "_expand", Kernel())
    monkeypatch.setattr(triton_deltas, "is_chained", lambda device: True)
    pool, slots = pool_with([8])
    tables = TritonDeltas(pool, 4)
    y, arena = torch.zeros(4, QKV.out_features), pool.arenas["qkv"]
    tables.fill([RowBlock(0, 1, (Term(slots[0]),))])
    tables.add(y, arena, 0)
    tables.launch_for(4)
    tables.add(y, arena, 0)
    tables.fill([RowBlock(0, 1, (Term(slots[0]),))])
    tables.add(y, arena, 0)
    tables.warm_up()
    assert launches == [True, False, True, *[True] * len(pool.arenas)]


def test_a_step_like_the_last_is_not_uploaded_again_but_a_moved_slot_is() -> None:
    pool, slots = pool_with([16, 8])
    tables = TritonDeltas(pool, 4)
    blocks = blocks_of(slots, [1, 1], is_mixed=False)
    tables.fill(blocks)
    tables.tables.values.zero_()
    assert tables.fill(list(blocks)) == 2
    assert not tables.tables.values.any(), "what is on the device is as it was"
    pool.release(slots[0])
    pool.evict(slots[0].digest)
    pool.compact()
    assert slots[1].ranges["qkv"].start == 0
    blocks = blocks_of(slots[1:], [1, 1], is_mixed=False)
    assert_as_reference(plan_with(tables, blocks, pool), blocks, pool)


def plan_with(tables: TritonDeltas, blocks: list[RowBlock], pool: AdapterPool) -> StepPlan:
    return build_plan(blocks, blocks[-1].end + 1, pool, is_exact=False, tables=tables)
