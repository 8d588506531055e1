"""A version's tensors in the layout of the device pool, ready to be copied in a few large moves."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from quickchange_adapters.finite import all_finite
from quickchange_adapters.layout import AdapterLayout, GroupShape, Place, round_up_rows
from quickchange_adapters.packed_size import PackedSize
from quickchange_adapters.weights import AdapterWeights, LoraPair
from quickchange_adapters.zero_memory import lazy_zeros


@dataclass(frozen=True, slots=True)
class HostGroup:
    """One group's rows: lora_a [layers, rows, parts, in], lora_b [layers, rows, out] (rank-major).

    Row i of a layer holds rank component i of every part; parts of a smaller rank are zero there.
    With `has_bias` the last row is a bias: zero in lora_a, and its lora_b is added as it is.
    """

    lora_a: Tensor
    lora_b: Tensor
    has_bias: bool = False

    @property
    def num_rows(self) -> int:
        """Rank rows, a multiple of the allocation unit."""
        return self.lora_a.shape[1]

    @property
    def num_bytes(self) -> int:
        """Bytes of both tensors."""
        return self.lora_a.nbytes + self.lora_b.nbytes


@dataclass(frozen=True, slots=True)
class HostAdapter:
    """One version in host memory: only the groups that it targets, and the vocabulary's two ends.

    head: lora_a [rank, width], lora_b [vocabulary, rank]. embedding: lora_a [rank, vocabulary],
    lora_b [width, rank].
    """

    digest: str
    groups: dict[str, HostGroup]
    head: LoraPair | None = None
    embedding: LoraPair | None = None

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(group.num_bytes for group in self.groups.values()) + self.num_vocabulary_bytes

    @property
    def num_vocabulary_bytes(self) -> int:
        """Bytes outside the arenas."""
        return sum(pair.num_bytes for pair in (self.head, self.embedding) if pair is not None)

    @property
    def size(self) -> PackedSize:
        """What it takes, tier by tier."""
        rows = {kind: group.num_rows for kind, group in self.groups.items()}
        return PackedSize(rows, self.num_bytes, self.num_vocabulary_bytes)


def pack_adapter(
    weights: AdapterWeights,
    layout: AdapterLayout,
    dtype: torch.dtype,
    base_bias: Callable[[str], Tensor | None] = lambda module: None,
) -> HostAdapter:
    """Arrange a version for the pool. Runs on any thread but the engine's.

    `base_bias(module)` gives the base's own bias, which a replaced one is compared with.

    Raises: ValueError if a module has no place in the layout, or a value is not finite in `dtype`
    (one such value would spread to neighbours through shared matrix products).
    """
    by_kind: dict[str, _Entries] = {}
    ends: dict[str, LoraPair] = {}
    for module, pair in weights.pairs.items():
        if module in (layout.head, layout.embedding):
            ends[module] = LoraPair(pair.lora_a.to(dtype), pair.lora_b.to(dtype))
        else:
            place = _place_of(module, layout)
            by_kind.setdefault(place.kind, _Entries()).pairs.append((place, pair))
    for module, bias in _bias_deltas(weights, base_bias).items():
        place = _place_of(module, layout)
        by_kind.setdefault(place.kind, _Entries()).biases.append((place, bias))
    groups = {kind: _pack_group(layout.groups[kind], by_kind[kind], dtype) for kind in by_kind}
    head, embedding = (ends.get(path or "") for path in (layout.head, layout.embedding))
    adapter = HostAdapter(weights.digest, groups, head, embedding)
    _check_finite(adapter, dtype)
    return adapter


def pin_adapter(adapter: HostAdapter) -> HostAdapter:
    """Return a copy in page-locked memory, from which a GPU can copy while it computes."""
    groups = {
        kind: replace(group, lora_a=group.lora_a.pin_memory(), lora_b=group.lora_b.pin_memory())
        for kind, group in adapter.groups.items()
    }
    head, embedding = _pin_pair(adapter.head), _pin_pair(adapter.embedding)
    return replace(adapter, groups=groups, head=head, embedding=embedding)


def _pin_pair(pair: LoraPair | None) -> LoraPair | None:
    if pair is None:
        return None
    return LoraPair(pair.lora_a.pin_memory(), pair.lora_b.pin_memory())


@dataclass(slots=True)
class _Entries:
    """What one group holds: pairs and bias deltas with their places."""

    pairs: list[tuple[Place, LoraPair]] = field(default_factory=list)
    biases: list[tuple[Place, Tensor]] = field(default_factory=list)


def _place_of(module: str, layout: AdapterLayout) -> Place:
    place = layout.places.get(module)
    if place is None:
        raise ValueError(f"module {module!r} is not a linear of this base")
    return place


def _bias_deltas(
    weights: AdapterWeights, base_bias: Callable[[str], Tensor | None]
) -> dict[str, Tensor]:
    """What to add to each module's output: an added bias, and how a replaced one differs."""
    deltas = {module: bias.float() for module, bias in weights.added_biases.items()}
    for module, bias in weights.replaced_biases.items():
        own = base_bias(module)
        delta = bias.float() if own is None else bias.float() - own.float().cpu()
        deltas[module] = deltas[module] + delta if module in deltas else delta
    return deltas


def _pack_group(shape: GroupShape, entries: _Entries, dtype: torch.dtype) -> HostGroup:
    has_bias = bool(entries.biases)
    rank = max((pair.rank for _, pair in entries.pairs), default=0)
    rows = round_up_rows(rank + int(has_bias))
    # Not from the heap, which would keep the memory when the version is unloaded.
    a_shape = (shape.num_layers, rows, shape.num_parts, shape.in_features)
    lora_a = lazy_zeros(a_shape, dtype)
    lora_b = lazy_zeros((shape.num_layers, rows, shape.out_features), dtype)
    for place, pair in entries.pairs:
        lora_a[place.layer, : pair.rank, place.part] = pair.lora_a.to(dtype)
        columns = shape.part_slices[place.part]
        lora_b[place.layer, : pair.rank, columns] = pair.lora_b.t().to(dtype)
    for place, bias in entries.biases:
        lora_b[place.layer, -1, shape.part_slices[place.part]] = bias.to(dtype)
    return HostGroup(lora_a, lora_b, has_bias)


def _check_finite(adapter: HostAdapter, dtype: torch.dtype) -> None:
    ends = (("the head", adapter.head), ("the embedding", adapter.embedding))
    for name, held in (*adapter.groups.items(), *ends):
        if held is None:
            continue
        if not (all_finite(held.lora_a) and all_finite(held.lora_b)):
            raise ValueError(f"adapter {adapter.digest[:12]} has values in {name} beyond {dtype}")


def iter_deltas(
    group: HostGroup, shape: GroupShape, layer: int, device: torch.device
) -> Iterator[tuple[slice, Tensor]]:
    """Yield (columns, delta [out, in] in float32) for each part of one layer: B·A, no bias.

    They are computed on the device: the factors are small, the product is as large as the base's.
    """
    for part, columns in enumerate(shape.part_slices):
        lora_a = group.lora_a[layer, :, part].to(device).float()
        lora_b = group.lora_b[layer, :, columns].to(device).float()
        yield columns, lora_b.t() @ lora_a
