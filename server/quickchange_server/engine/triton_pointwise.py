"""What lies between a block's products, in three kernels, for GPUs. Import it only where Triton is.

Unfused, these are some thirty launches a layer, which is more time than they compute in a decode
step. Every rounding is where Hugging Face's code rounds.

Source: RMSNorm as in Zhang and Sennrich 2019 (arXiv 1910.07467); rotary embeddings as in Su et al.
2021 (arXiv 2104.09864), halves of a head apart.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from quickchange_adapters.ops.triton_chain import (
    is_chained,
    launch_options,
    let_next_start,
    wait_for_inputs,
)
from quickchange_adapters.plan import Projection
from torch import Tensor

GATED_TILE, GATED_WARPS = 1024, 4
MAX_NORM_WARPS = 8
WARP = 32


@dataclass(frozen=True, slots=True)
class HeadNorm:
    """What is normed head by head before it is rotated: weights [dim] of queries and of keys."""

    query: Tensor
    key: Tensor


def add_and_norm(
    hidden: Tensor, update: Projection | None, weight: Tensor, epsilon: float
) -> Tensor:
    """Add an update to hidden, in place, and return its norm; all [tokens, width]."""
    num_tokens, width = hidden.shape
    assert hidden.is_contiguous()
    assert update is None or update.output.is_contiguous()
    out = torch.empty_like(hidden)
    tile = triton.next_power_of_2(width)
    num_warps = min(MAX_NORM_WARPS, max(1, tile // 256))
    _add_and_norm[(num_tokens,)](
        hidden, hidden if update is None else update.output, _deltas(update, hidden), weight, out,
        epsilon, WIDTH=width, TILE=tile, HAS_UPDATE=update is not None,
        num_warps=num_warps, **_options(update, hidden),
    )  # fmt: skip
    return out


def gated(both: Projection, *, is_gelu: bool) -> Tensor:
    """Return act(gate) · up [tokens, width] of both side by side [tokens, 2 · width]."""
    gate_up = both.output
    num_tokens, width = gate_up.shape[0], gate_up.shape[1] // 2
    assert gate_up.is_contiguous()
    out = gate_up.new_empty(num_tokens, width)
    _gated[(num_tokens, triton.cdiv(width, GATED_TILE))](
        gate_up, _deltas(both, gate_up), out, WIDTH=width, TILE=GATED_TILE, IS_GELU=is_gelu,
        num_warps=GATED_WARPS, **_options(both, gate_up),
    )  # fmt: skip
    return out


def rotate_and_store(
    projection: Projection,
    rotary: tuple[Tensor, Tensor],
    slots: Tensor,
    kv: tuple[Tensor, Tensor],
    norm: HeadNorm | None,
    epsilon: float,
) -> None:
    """Rotate queries in place; rotate keys into their KV slots, and copy values there.

    projection: [tokens, (heads + 2 · kv heads) · dim]; cosines and sines [tokens, dim];
    slots [tokens]; keys and values [blocks, block size, kv heads, dim].
    """
    keys, values = kv
    qkv = projection.output
    num_kv, dim = keys.shape[2], keys.shape[3]
    num_heads = qkv.shape[1] // dim - 2 * num_kv
    cosines, sines = rotary
    assert qkv.is_contiguous()
    assert cosines.is_contiguous()
    assert sines.is_contiguous()
    norm = norm or HeadNorm(cosines, cosines)
    _rotate_and_store[(qkv.shape[0], num_heads + 2 * num_kv)](
        qkv, _deltas(projection, qkv), cosines, sines, slots, keys, values,
        norm.query, norm.key, epsilon,
        NUM_HEADS=num_heads, NUM_KV=num_kv, DIM=dim,
        HALF_TILE=triton.next_power_of_2(dim // 2), HAS_NORM=norm.query is not cosines,
        num_warps=1, **_options(projection, qkv),
    )  # fmt: skip


def _deltas(projection: Projection | None, other: Tensor) -> Tensor:
    deltas = None if projection is None else projection.deltas
    return other if deltas is None else deltas


def _options(projection: Projection | None, like: Tensor) -> dict[str, Any]:
    """Where deltas come, two kernels come before, and a chain is of one."""
    has_deltas = projection is not None and projection.deltas is not None
    is_on = is_chained(like.device) and not has_deltas
    return {"HAS_DELTAS": has_deltas, **launch_options(is_on=is_on)}


@triton.jit  # type: ignore[untyped-decorator]
def _add_and_norm(
    hidden: tl.tensor,  # [tokens, WIDTH]
    update: tl.tensor,  # [tokens, WIDTH]
    deltas: tl.tensor,  # [tokens, WIDTH] float32, still to be added to the update
    weight: tl.tensor,  # [WIDTH]
    out: tl.tensor,  # [tokens, WIDTH]
    epsilon: tl.tensor,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    HAS_UPDATE: tl.constexpr,
    HAS_DELTAS: tl.constexpr,
    IS_CHAINED: tl.constexpr,
) -> None:
    """Grid (tokens)."""
    let_next_start(IS_CHAINED)
    columns = tl.arange(0, TILE)
    is_column = columns < WIDTH
    at = tl.program_id(0).to(tl.int64) * WIDTH + columns
    scale = tl.load(weight + columns, mask=is_column, other=0.0)
    wait_for_inputs(IS_CHAINED)
    value = tl.load(hidden + at, mask=is_column, other=0.0)
    if HAS_UPDATE:
        more = _complete(update + at, deltas + at, is_column, HAS_DELTAS)
        value = (value.to(tl.float32) + more.to(tl.float32)).to(value.dtype)
        tl.store(hidden + at, value, mask=is_column)
    wide = value.to(tl.float32)
    wide = wide * tl.rsqrt(tl.sum(wide * wide, 0) / WIDTH + epsilon)
    normed = wide.to(value.dtype).to(tl.float32) * scale.to(tl.float32)
    tl.store(out + at, normed.to(value.dtype), mask=is_column)


@triton.jit  # type: ignore[untyped-decorator]
def _gated(
    gate_up: tl.tensor,  # [tokens, 2 · WIDTH]
    deltas: tl.tensor,  # as much, float32
    out: tl.tensor,  # [tokens, WIDTH]
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    IS_GELU: tl.constexpr,
    HAS_DELTAS: tl.constexpr,
    IS_CHAINED: tl.constexpr,
) -> None:
    """Grid (tokens, tiles of columns)."""
    let_next_start(IS_CHAINED)
    wait_for_inputs(IS_CHAINED)
    columns = tl.program_id(1) * TILE + tl.arange(0, TILE)
    is_column = columns < WIDTH
    row = tl.program_id(0).to(tl.int64)
    at = row * 2 * WIDTH + columns
    narrow = _complete(gate_up + at, deltas + at, is_column, HAS_DELTAS)
    up = _complete(gate_up + at + WIDTH, deltas + at + WIDTH, is_column, HAS_DELTAS)
    gate = narrow.to(tl.float32)
    if IS_GELU:
        inner = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
        active = gate * tl.sigmoid(2 * inner)
    else:
        active = gate * tl.sigmoid(gate)
    active = active.to(narrow.dtype).to(tl.float32)
    product = (active * up.to(tl.float32)).to(narrow.dtype)
    tl.store(out + row * WIDTH + columns, product, mask=is_column)


@triton.jit  # type: ignore[untyped-decorator]
def _rotate_and_store(
    qkv: tl.tensor,  # [tokens, heads, DIM], keys and values behind the queries
    deltas: tl.tensor,  # as much, float32
    cosines: tl.tensor,  # [tokens, DIM]
    sines: tl.tensor,
    slots: tl.tensor,  # [tokens] int64
    keys: tl.tensor,  # [slots, NUM_KV, DIM]
    values: tl.tensor,
    query_norm: tl.tensor,  # [DIM]
    key_norm: tl.tensor,
    epsilon: tl.tensor,
    NUM_HEADS: tl.constexpr,
    NUM_KV: tl.constexpr,
    DIM: tl.constexpr,
    HALF_TILE: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_DELTAS: tl.constexpr,
    IS_CHAINED: tl.constexpr,
) -> None:
    """Grid (tokens, heads of all three)."""
    let_next_start(IS_CHAINED)
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    columns = tl.arange(0, HALF_TILE)
    is_column = columns < DIM // 2
    at = (token * (NUM_HEADS + 2 * NUM_KV) + head) * DIM + columns
    source = qkv + at
    slot = tl.load(slots + token)
    wait_for_inputs(IS_CHAINED)
    low = _complete(source, deltas + at, is_column, HAS_DELTAS)
    high = _complete(source + DIM // 2, deltas + at + DIM // 2, is_column, HAS_DELTAS)
    if head >= NUM_HEADS + NUM_KV:
        place = (slot * NUM_KV + head - NUM_HEADS - NUM_KV) * DIM + columns
        tl.store(values + place, low, mask=is_column)
        tl.store(values + place + DIM // 2, high, mask=is_column)
    else:
        dtype = low.dtype
        first, second = low.to(tl.float32), high.to(tl.float32)
        if HAS_NORM:
            square = tl.sum(first * first, 0) + tl.sum(second * second, 0)
            scale = tl.rsqrt(square / DIM + epsilon)
            weights = query_norm + columns
            if head >= NUM_HEADS:
                weights = key_norm + columns
            low_weight = tl.load(weights, mask=is_column, other=0.0).to(tl.float32)
            high_weight = tl.load(weights + DIM // 2, mask=is_column, other=0.0).to(tl.float32)
            first = ((first * scale).to(dtype).to(tl.float32) * low_weight).to(dtype)
            second = ((second * scale).to(dtype).to(tl.float32) * high_weight).to(dtype)
            first, second = first.to(tl.float32), second.to(tl.float32)
        angle = token * DIM + columns
        low_cos = tl.load(cosines + angle, mask=is_column, other=0.0).to(tl.float32)
        high_cos = tl.load(cosines + angle + DIM // 2, mask=is_column, other=0.0).to(tl.float32)
        low_sin = tl.load(sines + angle, mask=is_column, other=0.0).to(tl.float32)
        high_sin = tl.load(sines + angle + DIM // 2, mask=is_column, other=0.0).to(tl.float32)
        new_low = (first * low_cos).to(dtype).to(tl.float32)
        new_low = (new_low - (second * low_sin).to(dtype).to(tl.float32)).to(dtype)
        new_high = (second * high_cos).to(dtype).to(tl.float32)
        new_high = (new_high + (first * high_sin).to(dtype).to(tl.float32)).to(dtype)
        target = source
        if head >= NUM_HEADS:
            target = keys + (slot * NUM_KV + head - NUM_HEADS) * DIM + columns
        tl.store(target, new_low, mask=is_column)
        tl.store(target + DIM // 2, new_high, mask=is_column)


@triton.jit  # type: ignore[untyped-decorator]
def _complete(
    source: tl.tensor, deltas: tl.tensor, is_there: tl.tensor, HAS_DELTAS: tl.constexpr
) -> tl.tensor:
    """Return a projection's numbers with their deltas, rounded as if they had been added there."""
    value = tl.load(source, mask=is_there, other=0.0)
    if HAS_DELTAS:
        delta = tl.load(deltas, mask=is_there, other=0.0)
        value = (value.to(tl.float32) + delta).to(value.dtype)
    return value
