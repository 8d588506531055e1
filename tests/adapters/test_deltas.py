"""Every way of adding deltas against the plain float32 reference."""

import pytest
import torch
from quickchange_adapters.ops.deltas import add_deltas, add_reference
from quickchange_adapters.plan import RowBlock, Term, build_plan
from quickchange_adapters.pool import AdapterPool, Slot

from tests.adapters.test_pool import OUT, QKV, adapter_of, only, pool_of


def slots_of(pool: AdapterPool, ranks: list[int]) -> list[Slot]:
    slots = []
    for index, rank in enumerate(ranks):
        slots.append(only(pool.acquire(adapter_of(f"a{index}", rank))))
    return slots


def blocks_of(slots: list[Slot], *, is_mixed: bool, lengths: list[int]) -> list[RowBlock]:
    """Row blocks with a row of the base between any two."""
    blocks, start = [], 1
    for index, length in enumerate(lengths):
        terms = [Term(slots[index % len(slots)])]
        if is_mixed:
            terms = [Term(slot, 0.5 - i) for i, slot in enumerate(slots[:4])]
        blocks.append(RowBlock(start, start + length, tuple(terms)))
        start += length + 1
    return blocks


@pytest.mark.parametrize("is_mixed", [False, True])
@pytest.mark.parametrize("is_exact", [False, True])
@pytest.mark.parametrize("lengths", [[1] * 9, [1, 1, 1, 20, 37], [50], [3, 16, 17]])
def test_all_paths_agree_with_the_reference(
    is_mixed: bool, is_exact: bool, lengths: list[int]
) -> None:
    pool = pool_of(128)
    slots = slots_of(pool, [1, 8, 12, 40])
    blocks = blocks_of(slots, is_mixed=is_mixed, lengths=lengths)
    num_tokens = blocks[-1].end + 1
    plan = build_plan(blocks, num_tokens, pool, is_exact=is_exact)
    assert bool(plan.windows) == (lengths.count(1) > 1 and not is_exact)
    for shape in (QKV, OUT):
        x = torch.randn(num_tokens, shape.in_features)
        start = torch.randn(num_tokens, shape.out_features)
        for layer in range(2):
            expected, actual = start.clone(), start.clone()
            for block in blocks:
                add_reference(expected, x, pool.arenas[shape.kind], layer, block)
            add_deltas(actual, x, pool.arenas[shape.kind], layer, plan)
            torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)
            base_rows = [0, *(block.end for block in blocks)]
            assert torch.equal(actual[base_rows], start[base_rows])


@pytest.mark.parametrize("is_exact", [False, True])
def test_a_row_of_infinities_stays_alone(is_exact: bool) -> None:
    pool = pool_of(64)
    slots = slots_of(pool, [8, 8, 8])
    blocks = blocks_of(slots, is_mixed=False, lengths=[1, 1, 1])
    plan = build_plan(blocks, 6, pool, is_exact=is_exact)
    x = torch.randn(6, QKV.in_features)
    x[1] = float("inf")
    y = torch.zeros(6, QKV.out_features)
    add_deltas(y, x, pool.arenas["qkv"], 0, plan)
    assert not torch.isfinite(y[1]).all()
    assert torch.isfinite(y[[0, 2, 3, 4, 5]]).all()


def test_a_neighbours_overflow_in_the_shared_product_stays_alone() -> None:
    pool = pool_of(64)
    slots = slots_of(pool, [8, 8])
    rows = slots[0].ranges["qkv"]
    pool.arenas["qkv"].lora_a[:, rows.start : rows.end] = 3e38
    blocks = blocks_of(slots, is_mixed=False, lengths=[1, 1])
    plan = build_plan(blocks, 4, pool, is_exact=False)
    assert plan.windows
    y = torch.zeros(4, QKV.out_features)
    add_deltas(y, torch.full((4, QKV.in_features), 9.0), pool.arenas["qkv"], 0, plan)
    assert torch.isfinite(y[3]).all()
    assert y[3].abs().max() > 0


@pytest.mark.parametrize("is_exact", [False, True])
def test_rows_that_are_being_written_reach_nobody(is_exact: bool) -> None:
    """A step reads whole windows while another thread writes into a hole between live rows."""
    pool = pool_of(64)
    slots = slots_of(pool, [8, 24, 8])
    first, gone, last = slots
    pool.release(gone)
    pool.evict(gone.digest)
    filling = only(pool.reserve(adapter_of("coming", 24)))
    assert first.ranges["qkv"].end == filling.ranges["qkv"].start
    assert filling.ranges["qkv"].end == last.ranges["qkv"].start
    plan = build_plan(
        blocks_of([first, last], is_mixed=False, lengths=[1, 1]), 4, pool, is_exact=is_exact
    )
    x = torch.randn(4, QKV.in_features)
    arena = pool.arenas["qkv"]
    answers = []
    for value in (0.0, torch.finfo(torch.float32).max):
        half = slice(filling.ranges["qkv"].start, filling.ranges["qkv"].start + 12)
        arena.lora_a[:, half] = arena.lora_b[:, half] = value
        answers.append(torch.zeros(4, QKV.out_features))
        add_deltas(answers[-1], x, arena, 1, plan)
    assert answers[0][1].abs().max() > 0
    assert torch.equal(answers[0], answers[1])


def test_an_exact_row_does_not_depend_on_the_length_of_its_block() -> None:
    pool = pool_of(64)
    slots = slots_of(pool, [12])
    x = torch.randn(41, QKV.in_features)
    together = torch.zeros(41, QKV.out_features)
    whole = build_plan([RowBlock(0, 41, (Term(slots[0]),))], 41, pool, is_exact=True)
    add_deltas(together, x, pool.arenas["qkv"], 0, whole)
    for start, end in ((0, 1), (5, 9), (30, 41)):
        alone = torch.zeros(end - start, QKV.out_features)
        block = RowBlock(0, end - start, (Term(slots[0]),))
        plan = build_plan([block], end - start, pool, is_exact=True)
        add_deltas(alone, x[start:end], pool.arenas["qkv"], 0, plan)
        assert torch.equal(alone, together[start:end])
