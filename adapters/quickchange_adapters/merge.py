"""Merged copies: W + B·A of one adapter's linears as extra resident matrices beside the base."""

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from quickchange_adapters.host_adapter import HostAdapter, HostGroup, iter_deltas
from quickchange_adapters.layout import AdapterLayout, GroupShape
from quickchange_adapters.ops.linear_weight import LinearWeight, make_linear_weight


@dataclass(frozen=True, slots=True)
class MergedCopy:
    """One adapter merged: the matrices that differ from the base's, by (group kind, layer)."""

    digest: str
    weights: dict[tuple[str, int], LinearWeight] = field(default_factory=dict)

    @property
    def num_bytes(self) -> int:
        """Bytes of all merged matrices."""
        return sum(weight.num_bytes for weight in self.weights.values())


def merged_bytes_of(adapter: HostAdapter, layout: AdapterLayout, itemsize: int) -> int:
    """Bytes that a merged copy of this adapter takes: its groups' fused matrices, whole."""
    return sum(
        layout.groups[kind].num_layers
        * layout.groups[kind].in_features
        * layout.groups[kind].out_features
        * itemsize
        for kind in adapter.groups
    )


def merge_adapter(
    adapter: HostAdapter, layout: AdapterLayout, dense: Callable[[str, int], Tensor]
) -> MergedCopy:
    """Compute W + B·A in float32, rounded once, for every group the adapter targets.

    `dense(kind, layer)` gives the base's exact fused matrix [out, in] and is not changed.
    """
    copy = MergedCopy(adapter.digest)
    for kind, group in adapter.groups.items():
        shape = layout.groups[kind]
        for layer in range(shape.num_layers):
            merged = merge_matrix(dense(kind, layer), group, shape, layer)
            copy.weights[(kind, layer)] = make_linear_weight(merged)
    return copy


def merge_matrix(base: Tensor, group: HostGroup, shape: GroupShape, layer: int) -> Tensor:
    """Return base + B·A of one layer: [out, in], in the base's dtype, a new tensor."""
    merged = base.float()
    if merged is base:
        merged = base.clone()
    for columns, delta in iter_deltas(group, shape, layer):
        merged[columns] += delta.to(merged.device)
    return merged.to(base.dtype)
