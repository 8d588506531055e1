"""What lies between a block's products, in three kernels, for GPUs. Import it only where Triton is.

Unfused, these are some thirty launches a layer, which is more time than they compute in a decode
step. Every rounding is where Hugging Face's code rounds.

Source: RMSNorm as in Zhang and Sennrich 2019 (arXiv 1910.07467); rotary embeddings as in Su et al.
2021 (arXiv 2104.09864), halves of a head apart.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

GATED_TILE = 1024
MAX_NORM_WARPS = 8


@dataclass(frozen=True, slots=True)
class HeadNorm:
    """What is normed head by head before it is rotated: weights [dim] of queries and of keys."""

    query: Tensor
    key: Tensor


def add_and_norm(hidden: Tensor, update: Tensor | None, weight: Tensor, epsilon: float) -> Tensor:
    """Add an update to hidden, in place, and return its norm; all [tokens, width]."""
    num_tokens, width = hidden.shape
    assert hidden.is_contiguous()
    assert update is None or update.is_contiguous()
    out = torch.empty_like(hidden)
    tile = triton.next_power_of_2(width)
    _add_and_norm[(num_tokens,)](
        hidden, hidden if update is None else update, weight, out, epsilon,
        WIDTH=width, TILE=tile, HAS_UPDATE=update is not None,
        num_warps=min(MAX_NORM_WARPS, max(1, tile // 256)),
    )  # fmt: skip
    return out


def gated(gate_up: Tensor, *, is_gelu: bool) -> Tensor:
    """Return act(gate) · up [tokens, width] of gate_up [tokens, 2 · width]."""
    num_tokens, width = gate_up.shape[0], gate_up.shape[1] // 2
    assert gate_up.is_contiguous()
    out = gate_up.new_empty(num_tokens, width)
    _gated[(num_tokens, triton.cdiv(width, GATED_TILE))](
        gate_up, out, WIDTH=width, TILE=GATED_TILE, IS_GELU=is_gelu
    )
    return out


def rotate_and_store(
    qkv: Tensor,
    rotary: tuple[Tensor, Tensor],
    slots: Tensor,
    kv: tuple[Tensor, Tensor],
    norm: HeadNorm | None,
    epsilon: float,
) -> None:
    """Rotate queries in place; rotate keys into their KV slots, and copy values there.

    qkv [tokens, (heads + 2 · kv heads) · dim]; cosines and sines [tokens, dim]; slots [tokens];
    keys and values [blocks, block size, kv heads, dim].
    """
    keys, values = kv
    num_kv, dim = keys.shape[2], keys.shape[3]
    num_heads = qkv.shape[1] // dim - 2 * num_kv
    cosines, sines = rotary
    assert qkv.is_contiguous()
    assert cosines.is_contiguous()
    assert sines.is_contiguous()
    norm = norm or HeadNorm(cosines, cosines)
    _rotate_and_store[(qkv.shape[0], num_heads + 2 * num_kv)](
        qkv, cosines, sines, slots, keys, values, norm.query, norm.key, epsilon,
        NUM_HEADS=num_heads, NUM_KV=num_kv, DIM=dim,
        HALF_TILE=triton.next_power_of_2(dim // 2), HAS_NORM=norm.query is not cosines,
        num_warps=1,
    )  # fmt: skip


@triton.jit  # type: ignore[untyped-decorator]
def _add_and_norm(
    hidden: tl.tensor,  # [tokens, WIDTH]
    update: tl.tensor,  # [tokens, WIDTH]
    weight: tl.tensor,  # [WIDTH]
    out: tl.tensor,  # [tokens, WIDTH]
    epsilon: tl.tensor,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    HAS_UPDATE: tl.constexpr,
) -> None:
    """Grid (tokens)."""
    columns = tl.arange(0, TILE)
    is_column = columns < WIDTH
    at = tl.program_id(0).to(tl.int64) * WIDTH + columns
    value = tl.load(hidden + at, mask=is_column, other=0.0)
    scale = tl.load(weight + columns, mask=is_column, other=0.0)
    if HAS_UPDATE:
        more = tl.load(update + at, mask=is_column, other=0.0)
        value = (value.to(tl.float32) + more.to(tl.float32)).to(value.dtype)
        tl.store(hidden + at, value, mask=is_column)
    wide = value.to(tl.float32)
    wide = wide * tl.rsqrt(tl.sum(wide * wide, 0) / WIDTH + epsilon)
    normed = wide.to(value.dtype).to(tl.float32) * scale.to(tl.float32)
    tl.store(out + at, normed.to(value.dtype), mask=is_column)


@triton.jit  # type: ignore[untyped-decorator]
def _gated(
    gate_up: tl.tensor,  # [tokens, 2 · WIDTH]
    out: tl.tensor,  # [tokens, WIDTH]
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    IS_GELU: tl.constexpr,
) -> None:
    """Grid (tokens, tiles of columns)."""
    columns = tl.program_id(1) * TILE + tl.arange(0, TILE)
    is_column = columns < WIDTH
    row = tl.program_id(0).to(tl.int64)
    source = gate_up + row * 2 * WIDTH + columns
    narrow = tl.load(source, mask=is_column, other=0.0)
    up = tl.load(source + WIDTH, mask=is_column, other=0.0)
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
) -> None:
    """Grid (tokens, heads of all three)."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    columns = tl.arange(0, HALF_TILE)
    is_column = columns < DIM // 2
    source = qkv + (token * (NUM_HEADS + 2 * NUM_KV) + head) * DIM + columns
    low = tl.load(source, mask=is_column, other=0.0)
    high = tl.load(source + DIM // 2, mask=is_column, other=0.0)
    slot = tl.load(slots + token)
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
