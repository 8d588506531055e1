"""A version's tensors in the layout of the device pool, ready to be copied in a few large moves."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from quickchange_adapters.layout import AdapterLayout, GroupShape, round_up_rows
from quickchange_adapters.weights import AdapterWeights, LoraPair


@dataclass(frozen=True, slots=True)
class HostGroup:
    """One group's rows: lora_a [layers, rows, parts, in], lora_b [layers, rows, out] (rank-major).

    Row i of a layer holds rank component i of every part; parts of a smaller rank are zero there.
    """

    lora_a: Tensor
    lora_b: Tensor

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
    """One version in host memory: only the groups that it targets."""

    digest: str
    groups: dict[str, HostGroup]

    @property
    def num_bytes(self) -> int:
        """Bytes of all groups."""
        return sum(group.num_bytes for group in self.groups.values())


def pack_adapter(weights: AdapterWeights, layout: AdapterLayout, dtype: torch.dtype) -> HostAdapter:
    """Arrange a version for the pool. Runs on any thread but the engine's.

    Raises: ValueError if a module has no place in the layout, or a value is not finite in `dtype`
    (one such value would spread to neighbours through shared matrix products).
    """
    by_kind: dict[str, list[tuple[int, int, LoraPair]]] = {}
    for module, pair in weights.pairs.items():
        place = layout.places.get(module)
        if place is None:
            raise ValueError(f"module {module!r} is not a linear of this base")
        by_kind.setdefault(place.kind, []).append((place.layer, place.part, pair))
    groups = {kind: _pack_group(layout.groups[kind], by_kind[kind], dtype) for kind in by_kind}
    for kind, group in groups.items():
        if not (torch.isfinite(group.lora_a).all() and torch.isfinite(group.lora_b).all()):
            raise ValueError(f"adapter {weights.digest[:12]} has values in {kind} beyond {dtype}")
    return HostAdapter(weights.digest, groups)


def _pack_group(
    shape: GroupShape, entries: list[tuple[int, int, LoraPair]], dtype: torch.dtype
) -> HostGroup:
    rows = round_up_rows(max(pair.rank for _, _, pair in entries))
    lora_a = torch.zeros(shape.num_layers, rows, shape.num_parts, shape.in_features, dtype=dtype)
    lora_b = torch.zeros(shape.num_layers, rows, shape.out_features, dtype=dtype)
    for layer, part, pair in entries:
        lora_a[layer, : pair.rank, part] = pair.lora_a.to(dtype)
        lora_b[layer, : pair.rank, shape.part_slices[part]] = pair.lora_b.t().to(dtype)
    return HostGroup(lora_a, lora_b)


def iter_deltas(group: HostGroup, shape: GroupShape, layer: int) -> Iterator[tuple[slice, Tensor]]:
    """Yield (columns, delta [out, in] in float32) for each part of one layer: B·A."""
    for part, columns in enumerate(shape.part_slices):
        lora_a = group.lora_a[layer, :, part].float()
        lora_b = group.lora_b[layer, :, columns].float()
        yield columns, lora_b.t() @ lora_a
