"""Attention over KV blocks, registered with transformers under one name for every architecture.

A step's rows are packed: decode rows first, one each, then prefill chunks. Layout of the cache is
this module's business alone; the scheduler only counts blocks. Two ways of computing decode rows:

* batched: one gather of blocks per layer and length bucket, one masked product for the bucket;
* exact: one product per request, unpadded, so that a row's bits do not depend on its neighbours.

Where there are kernels that read blocks in place, the step's `tiles` compute all rows instead.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from quickchange_adapters.zero_memory import lazy_zeros, resident_bytes, touch
from torch import Tensor
from torch.nn import functional

ATTENTION_NAME = "quickchange_blocks"
PIECE_BYTES = 2 << 20
"""Memory comes in pieces of this size where the system has huge pages."""
_KNOWN_KEYWORDS = frozenset(
    {
        "dropout",
        "scaling",
        "sliding_window",
        "softcap",
        "position_ids",
        "step",
        "is_causal",
        "use_cache",
    }
)


@dataclass(frozen=True, slots=True)
class KvShape:
    """One layer's KV heads, their widths, and how many query heads share each."""

    num_heads: int
    key_dim: int
    value_dim: int
    num_groups: int = 1


class KvStorage:
    """K and V of all layers: per layer [blocks, block_size, heads, dim]. Block 0 is scratch."""

    def __init__(
        self, shapes: Sequence[KvShape], num_blocks: int, block_size: int, like: Tensor
    ) -> None:
        self.block_size = block_size
        self.num_blocks = num_blocks
        rows = num_blocks, block_size
        place = like.dtype, like.device
        self.keys = [lazy_zeros((*rows, s.num_heads, s.key_dim), *place) for s in shapes]
        self.values = [lazy_zeros((*rows, s.num_heads, s.value_dim), *place) for s in shapes]
        self.num_bytes = sum(tensor.nbytes for tensor in (*self.keys, *self.values))
        """Bytes of all layers."""
        self._touched = [0] * (2 * len(shapes))

    def touch_ahead(self, highest: int) -> bool:
        """Have the system give memory for blocks behind `highest`, which nobody has had yet.

        A piece of one tensor a call; False if there is enough, or nothing of the kind to do.
        """
        tensors = (*self.keys, *self.values)
        if tensors[0].device.type != "cpu":
            return False
        place = min(range(len(tensors)), key=self._touched.__getitem__)
        tensor, first = tensors[place], max(self._touched[place], highest + 1)
        num_bytes = tensor[0].nbytes
        if self._touched[place] > min(highest + PIECE_BYTES // num_bytes // 2, self.num_blocks - 1):
            return False
        offset = tensor.data_ptr() + first * num_bytes
        left = PIECE_BYTES - offset % PIECE_BYTES  # of the piece of memory that it begins in
        end = min(first + max(1, left // num_bytes), self.num_blocks)
        touch(tensor[first:end])
        self._touched[place] = end
        return True

    def resident_bytes(self) -> int:
        """Return how much of it is in memory now, on a CPU: blocks that were ever written."""
        return sum(resident_bytes(tensor) for tensor in (*self.keys, *self.values))

    def write(self, layer: int, slots: Tensor, key: Tensor, value: Tensor) -> None:
        """Store one step's K and V [tokens, heads, dim] at token slots [tokens], in place."""
        self.keys[layer].flatten(0, 1).index_copy_(0, slots, key)
        self.values[layer].flatten(0, 1).index_copy_(0, slots, value)

    def gather(self, layer: int, blocks: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Read K, V of block tables [rows, blocks] as [rows, heads, length, dim] views."""
        rows = blocks.shape[0]
        flat = blocks.reshape(-1)
        pair = []
        for storage in (self.keys[layer], self.values[layer]):
            read = storage.index_select(0, flat)
            read = read.view(rows, -1, *storage.shape[2:])[:, :length]
            pair.append(read.transpose(1, 2))
        return pair[0], pair[1]

    def clear(self, blocks: Sequence[int]) -> None:
        """Zero blocks of a failed request, lest a non-finite value meets a masked product."""
        index = torch.tensor(blocks, dtype=torch.long, device=self.keys[0].device)
        for tensor in (*self.keys, *self.values):
            tensor.index_fill_(0, index, 0)


def block_bytes(shapes: Sequence[KvShape], block_size: int, itemsize: int) -> int:
    """Bytes of one block over all layers."""
    width = sum(s.num_heads * (s.key_dim + s.value_dim) for s in shapes)
    return width * block_size * itemsize


@dataclass(slots=True)
class DecodeBucket:
    """Decode rows of similar length: row indices, tables [rows, blocks], lengths [rows]."""

    rows: Tensor
    blocks: Tensor
    lengths: Tensor
    max_length: int
    _masks: dict[int | None, Tensor] = field(default_factory=dict)

    def mask(self, window: int | None) -> Tensor | None:
        """Return what each row sees, [rows, 1, 1, max_length]; None if that is everything."""
        if window is None and self.rows.shape[0] == 1:
            return None
        if window not in self._masks:
            positions = torch.arange(self.max_length, device=self.lengths.device)
            visible = positions < self.lengths[:, None]
            if window is not None:
                visible &= positions >= self.lengths[:, None] - window
            self._masks[window] = visible[:, None, None, :]
        return self._masks[window]


@dataclass(slots=True)
class PrefillChunk:
    """Rows [start, end) of one request; `length` positions are visible to its last row."""

    start: int
    end: int
    blocks: Tensor
    length: int
    _masks: dict[int | None, Tensor] = field(default_factory=dict)

    def mask(self, window: int | None, num_groups: int) -> Tensor:
        """Return what each row sees, [num_groups * rows, length]: causal, within the window."""
        if window not in self._masks:
            device = self.blocks.device
            first = self.length - (self.end - self.start)
            own = torch.arange(first, self.length, device=device)[:, None]
            positions = torch.arange(self.length, device=device)
            visible = positions <= own
            if window is not None:
                visible &= positions > own - window
            self._masks[window] = visible.repeat(num_groups, 1)
        return self._masks[window]


@dataclass(frozen=True, slots=True)
class Rule:
    """What a layer asks of its scores: scale, window (None: all), cap (None: none)."""

    scaling: float
    window: int | None = None
    softcap: float | None = None


class StepTiles(Protocol):
    """All rows of a step, computed by a kernel that reads KV blocks in place."""

    def attend(
        self, storage: KvStorage, layer: int, query: Tensor, rule: Rule, out: Tensor
    ) -> None:
        """Fill out [tokens, heads, value dim] for query [heads, tokens, dim]."""


@dataclass(slots=True)
class AttentionStep:
    """All that the layers need for one step: `tiles`, or else buckets and chunks."""

    storage: KvStorage
    slots: Tensor
    buckets: list[DecodeBucket] = field(default_factory=list)
    chunks: list[PrefillChunk] = field(default_factory=list)
    tiles: StepTiles | None = None


@dataclass(slots=True)
class ShapeProbe:
    """Takes a step's place once, at start, to learn each layer's KV shape and rule."""

    shapes: dict[int, KvShape] = field(default_factory=dict)
    rules: dict[int, Rule] = field(default_factory=dict)


class UnsupportedAttention(RuntimeError):
    """A layer passed a keyword whose meaning we do not implement."""


def register_attention() -> None:
    """Make `attn_implementation=ATTENTION_NAME` known to transformers; a repeat is harmless."""
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION_NAME, attend)


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **keywords: Any,
) -> tuple[Tensor, None]:
    """Compute one layer's attention for the packed row.

    query [1, heads, tokens, dim], key and value [1, kv heads, tokens, dim]; returns
    [1, tokens, heads, value dim] and no weights.

    Raises: UnsupportedAttention for a mask or an unknown keyword that is not None.
    """
    is_set = {k for k, v in keywords.items() if v is not None and v is not False}
    unknown = sorted(is_set - _KNOWN_KEYWORDS)
    if attention_mask is not None or unknown or not getattr(module, "is_causal", True):
        raise UnsupportedAttention(
            f"{type(module).__name__} wants attention that is not served: "
            f"{', '.join(unknown) or 'a mask of its own'}"
        )
    step = keywords["step"]
    rule = Rule(keywords["scaling"], keywords.get("sliding_window"), keywords.get("softcap"))
    if isinstance(step, ShapeProbe):
        step.rules[module.layer_idx] = rule
        num_groups = query.shape[1] // key.shape[1]
        shape = KvShape(key.shape[1], key.shape[3], value.shape[3], num_groups)
        step.shapes[module.layer_idx] = shape
        return query.new_zeros(1, query.shape[2], query.shape[1], value.shape[3]), None
    return _attend_step(step, module.layer_idx, (query[0], key[0], value[0]), rule), None


def _attend_step(
    step: AttentionStep, layer: int, qkv: tuple[Tensor, Tensor, Tensor], rule: Rule
) -> Tensor:
    query, key, value = qkv
    step.storage.write(layer, step.slots, key.transpose(0, 1), value.transpose(0, 1))
    # zeros: rows of padding are computed by nobody, and what they hold reaches the scratch block
    out = query.new_zeros(query.shape[1], query.shape[0], value.shape[2])
    if step.tiles is not None:
        step.tiles.attend(step.storage, layer, query, rule, out)
    for bucket in step.buckets:
        out[bucket.rows] = _decode(step.storage, layer, query, bucket, rule)
    for chunk in step.chunks:
        out[chunk.start : chunk.end] = _prefill(step.storage, layer, query, chunk, rule)
    return out.unsqueeze(0)


def _decode(
    storage: KvStorage, layer: int, query: Tensor, bucket: DecodeBucket, rule: Rule
) -> Tensor:
    """Attend one new token per row; query heads of one KV head stand as rows of one product."""
    keys, values = storage.gather(layer, bucket.blocks, bucket.max_length)
    rows, num_kv = keys.shape[:2]
    q = query[:, bucket.rows].transpose(0, 1).reshape(rows, num_kv, -1, query.shape[2])
    out = _product(q, keys, values, bucket.mask(rule.window), rule)
    return out.reshape(rows, -1, values.shape[3])


def _prefill(
    storage: KvStorage, layer: int, query: Tensor, chunk: PrefillChunk, rule: Rule
) -> Tensor:
    """Attend a chunk's rows to everything before them; returns [rows, heads, value dim]."""
    keys, values = storage.gather(layer, chunk.blocks[None], chunk.length)
    q = query[:, chunk.start : chunk.end]
    num_rows, num_kv = q.shape[1], keys.shape[1]
    groups = q.shape[0] // num_kv
    q = q.reshape(1, num_kv, groups * num_rows, q.shape[2])
    out = _product(q, keys, values, chunk.mask(rule.window, groups), rule)
    return out.view(num_kv * groups, num_rows, -1).transpose(0, 1)


def _product(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, rule: Rule) -> Tensor:
    """softmax(cap(scale · q kᵀ) + mask) v, over [rows, kv heads, queries, dim]."""
    if rule.softcap is None:
        return functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, scale=rule.scaling
        )
    scores = torch.matmul(query, key.transpose(2, 3)) * rule.scaling
    scores = torch.tanh(scores / rule.softcap) * rule.softcap
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    return torch.matmul(weights, value)
