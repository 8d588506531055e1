"""The GPU's attention kernel against the CPU's path, in Triton's interpreter."""

import os

os.environ["TRITON_INTERPRET"] = "1"

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from quickchange_server.engine.attention import (
    AttentionStep,
    DecodeBucket,
    KvShape,
    KvStorage,
    PrefillChunk,
    attend,
)
from quickchange_server.engine.attention_tiles import KvRow
from torch import Tensor

pytest.importorskip("triton", reason="the kernel needs Triton, which is made for Linux only")

from quickchange_server.engine.triton_attention import TritonAttention

BLOCK_SIZE = 4
SHAPE = KvShape(num_heads=2, key_dim=16, value_dim=16, num_groups=3)
CPU = torch.device("cpu")


@dataclass
class Step:
    """One packed step over a storage full of earlier tokens, and of others' leftovers."""

    storage: KvStorage
    rows: list[KvRow]
    query: Tensor
    key: Tensor
    value: Tensor

    @property
    def slots(self) -> Tensor:
        return torch.tensor(
            [
                row.blocks[p // BLOCK_SIZE] * BLOCK_SIZE + p % BLOCK_SIZE
                for row in self.rows
                for p in range(row.position, row.position + row.num_tokens)
            ]
        )

    def attend(self, step: AttentionStep, **rule: float | int | None) -> Tensor:
        module = SimpleNamespace(layer_idx=0, is_causal=True)
        keywords = {"scaling": SHAPE.key_dim**-0.5, **rule}
        packed = (self.query[None], self.key[None], self.value[None])
        return attend(module, *packed, None, step=step, **keywords)[0][0]

    def expected(self, **rule: float | int | None) -> Tensor:
        """What the path for CPUs computes, in float32."""
        step = AttentionStep(self.storage, self.slots)
        for row in self.rows:
            length = row.position + row.num_tokens
            blocks = torch.tensor(row.blocks[: -(-length // BLOCK_SIZE)])
            if row.num_tokens == 1:
                index, lengths = torch.tensor([row.start]), torch.tensor([length])
                step.buckets.append(DecodeBucket(index, blocks[None], lengths, length))
            else:
                end = row.start + row.num_tokens
                step.chunks.append(PrefillChunk(row.start, end, blocks, length))
        return self.attend(step, **rule)

    def actual(self, shape: KvShape = SHAPE, **rule: float | int | None) -> Tensor:
        tiles = TritonAttention([shape], BLOCK_SIZE, 64, CPU).fill(self.rows)
        return self.attend(AttentionStep(self.storage, self.slots, tiles=tiles), **rule)


def step_of(
    spans: list[tuple[int, int]], shape: KvShape = SHAPE, dtype: torch.dtype = torch.float32
) -> Step:
    """Make a step of (position, tokens) per request; its blocks are scattered over the storage."""
    generator = torch.Generator().manual_seed(len(spans))
    num_blocks = [-(-(position + tokens) // BLOCK_SIZE) for position, tokens in spans]
    order = (1 + torch.randperm(sum(num_blocks), generator=generator)).tolist()
    storage = KvStorage([shape], len(order) + 1, BLOCK_SIZE, torch.empty(0, dtype=dtype))
    for tensor in (*storage.keys, *storage.values):
        tensor.copy_(torch.randn(tensor.shape, generator=generator))
    rows, start = [], 0
    for (position, tokens), count in zip(spans, num_blocks, strict=True):
        rows.append(KvRow(start, position, tokens, [order.pop() for _ in range(count)]))
        start += tokens
    heads = shape.num_heads

    def random(num_heads: int, dim: int) -> Tensor:
        return torch.randn(num_heads, start, dim, generator=generator).to(dtype)

    query = random(heads * shape.num_groups, shape.key_dim)
    return Step(storage, rows, query, random(heads, shape.key_dim), random(heads, shape.value_dim))


def assert_agree(step: Step, shape: KvShape = SHAPE, **rule: Any) -> None:
    torch.testing.assert_close(
        step.actual(shape, **rule), step.expected(**rule), atol=1e-5, rtol=1e-5
    )


MIXED = [(0, 1), (17, 1), (130, 1), (0, 30), (75, 26)]


@pytest.mark.parametrize("rule", [{}, {"sliding_window": 9}, {"softcap": 1.5}])
def test_decode_rows_and_chunks_agree_with_the_cpu_path(rule: dict[str, Any]) -> None:
    assert_agree(step_of(MIXED), **rule)


def test_window_and_softcap_together() -> None:
    assert_agree(step_of([(90, 1), (5, 12)]), sliding_window=70, softcap=0.5)


@pytest.mark.parametrize(
    "shape",
    [
        KvShape(1, 24, 24, 1),
        KvShape(1, 80, 48, 7),
        KvShape(3, 16, 16, 1),
        KvShape(1, 16, 16, 71),
    ],
)
def test_odd_widths_and_group_sizes(shape: KvShape) -> None:
    """Widths and groups that are no powers of two; K wider than V; more queries than a tile."""
    assert_agree(step_of([(20, 1), (3, 5)], shape), shape)


def test_float16_agrees_within_its_rounding() -> None:
    step = step_of([(30, 1), (2, 9)], dtype=torch.float16)
    torch.testing.assert_close(step.actual(), step.expected(), atol=2e-3, rtol=2e-3)


def test_a_tile_never_reads_beyond_its_own_positions() -> None:
    """What lies behind a request's last token, and in other blocks, may be anything."""
    step = step_of([(5, 1), (2, 4)])
    own = {slot for row in step.rows for slot in slots_of(row)}
    for tensor in (step.storage.keys[0], step.storage.values[0]):
        flat = tensor.flatten(0, 1)
        flat[[slot for slot in range(flat.shape[0]) if slot not in own]] = float("nan")
    assert torch.isfinite(step.actual()).all()


def slots_of(row: KvRow) -> list[int]:
    positions = range(row.position + row.num_tokens)
    return [row.blocks[p // BLOCK_SIZE] * BLOCK_SIZE + p % BLOCK_SIZE for p in positions]


def test_a_request_with_non_finite_values_hurts_only_itself() -> None:
    step = step_of([(6, 1), (7, 1), (0, 9)])
    step.query[:, 1] = float("inf")
    step.key[:, 1] = float("nan")
    out = step.actual()
    assert torch.isnan(out[1]).all()
    assert torch.isfinite(out[[0, *range(2, 11)]]).all()


def test_strides_of_a_transposed_query_are_followed() -> None:
    step = step_of([(9, 1), (4, 6)])
    expected = step.expected()
    step.query = step.query.transpose(0, 1).contiguous().transpose(0, 1)
    assert not step.query.is_contiguous()
    torch.testing.assert_close(step.actual(), expected, atol=1e-5, rtol=1e-5)


def test_a_step_larger_than_the_tables_moves_them() -> None:
    attention = TritonAttention([SHAPE], BLOCK_SIZE, 11, CPU)
    small = attention.fill([KvRow(0, 0, 1, [1])])
    large = attention.fill([KvRow(i, 40, 1, list(range(1, 12))) for i in range(4)])
    assert small.numbers.shape[0] == 11
    assert large.numbers.shape[0] >= 4 * (6 + 11)
    again = attention.fill([KvRow(0, 0, 1, [1])])
    assert again.numbers.data_ptr() == large.numbers.data_ptr()


PIECES = [(0, 1), (511, 1), (512, 1), (1300, 1), (40, 3)]


@pytest.mark.parametrize("rule", [{}, {"sliding_window": 700}, {"sliding_window": 9}])
def test_rows_of_several_pieces_agree_with_the_cpu_path(rule: dict[str, Any]) -> None:
    """A window may leave whole pieces with nothing to see."""
    assert_agree(step_of(PIECES), **rule)


def test_a_row_has_the_same_bits_alone_and_beside_others() -> None:
    step = step_of(PIECES)
    together = step.actual()
    row = step.rows[3]
    alone = Step(
        step.storage,
        [KvRow(0, row.position, 1, row.blocks)],
        *(each[:, 3:4] for each in (step.query, step.key, step.value)),
    )
    assert torch.equal(alone.actual()[0], together[3])


def test_programs_launched_for_a_capture_serve_later_steps() -> None:
    """A captured step launches what it launched at its capture, whatever the table holds now."""
    step = step_of([(1300, 1), (600, 1), (5, 1)])
    attention = TritonAttention([SHAPE], BLOCK_SIZE, 4000, CPU)
    attention.reserve(3)
    captured = attention.fill_for_capture([KvRow(i, 0, 1, [0]) for i in range(3)])
    later = attention.fill_for_capture(step.rows)
    assert captured.numbers.data_ptr() == later.numbers.data_ptr()
    assert captured.partials.mixed.data_ptr() == later.partials.mixed.data_ptr()
    actual = step.attend(AttentionStep(step.storage, step.slots, tiles=captured))
    torch.testing.assert_close(actual, step.expected(), atol=1e-5, rtol=1e-5)
