"""Merged copies: W + B·A of one adapter's linears as extra resident matrices beside the base."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from quickchange_adapters.errors import NotFinite
from quickchange_adapters.finite import all_finite
from quickchange_adapters.host_adapter import HostAdapter, HostGroup, iter_deltas
from quickchange_adapters.layout import AdapterLayout, GroupShape
from quickchange_adapters.ops.linear_weight import LinearWeight

MakeWeight = Callable[[Tensor], LinearWeight]


@dataclass(frozen=True, slots=True, weakref_slot=True)
class MergedCopy:
    """One adapter merged: what differs from the base, by (group kind, layer).

    The head is merged too; an update of the embedding is a lookup and stays one.
    """

    digest: str
    weights: dict[tuple[str, int], LinearWeight] = field(default_factory=dict)
    biases: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    head: LinearWeight | None = None

    @property
    def num_bytes(self) -> int:
        """Bytes of all merged matrices and biases."""
        matrices = [*self.weights.values(), *([] if self.head is None else [self.head])]
        biases = sum(bias.nbytes for bias in self.biases.values())
        return sum(weight.num_bytes for weight in matrices) + biases


class DenseBase(Protocol):
    """The base's exact values, read only."""

    def dense(self, kind: str, layer: int) -> Tensor:
        """Return a group's fused matrix [out, in]."""

    def bias(self, kind: str, layer: int) -> Tensor | None:
        """Return a group's fused bias [out]."""

    def dense_head(self) -> Tensor:
        """Return the head [vocabulary, width]."""

    def weight_maker(self) -> MakeWeight:
        """Return what makes the matrices of one copy resident, in the form of the base's own."""


def merged_bytes_of(adapter: HostAdapter, layout: AdapterLayout, itemsize: int) -> int:
    """Bytes that a merged copy of this adapter takes: its groups' fused matrices, whole."""
    head = 0
    if adapter.head is not None:
        head = adapter.head.lora_a.shape[1] * adapter.head.lora_b.shape[0] * itemsize
    biases = sum(
        layout.groups[kind].num_layers * layout.groups[kind].out_features * itemsize
        for kind, group in adapter.groups.items()
        if group.has_bias
    )
    return (
        head
        + biases
        + sum(
            layout.groups[kind].num_layers
            * layout.groups[kind].in_features
            * layout.groups[kind].out_features
            * itemsize
            for kind in adapter.groups
        )
    )


def merge_adapter(adapter: HostAdapter, layout: AdapterLayout, base: DenseBase) -> MergedCopy:
    """Compute W + B·A in float32, rounded once, for every group the adapter targets."""
    make_weight = base.weight_maker()
    copy = MergedCopy(adapter.digest, head=_merge_head(adapter, base, make_weight))
    for kind, group in adapter.groups.items():
        shape = layout.groups[kind]
        for layer in range(shape.num_layers):
            merged = merge_matrix(base.dense(kind, layer), group, shape, layer)
            copy.weights[(kind, layer)] = make_weight(merged)
            if group.has_bias:
                bias = _merge_bias(base.bias(kind, layer), group, layer)
                copy.biases[(kind, layer)] = bias.to(merged.device)
    return copy


def _merge_head(
    adapter: HostAdapter, base: DenseBase, make_weight: MakeWeight
) -> LinearWeight | None:
    if adapter.head is None:
        return None
    head = base.dense_head()
    pair = adapter.head
    lora_a, lora_b = (each.to(head.device).float() for each in (pair.lora_a, pair.lora_b))
    return make_weight((head.float() + lora_b @ lora_a).to(head.dtype))


def _merge_bias(bias: Tensor | None, group: HostGroup, layer: int) -> Tensor:
    delta = group.lora_b[layer, -1]
    return delta.clone() if bias is None else (bias.float() + delta.to(bias.device)).to(bias.dtype)


def merge_matrix(base: Tensor, group: HostGroup, shape: GroupShape, layer: int) -> Tensor:
    """Return base + B·A of one layer: [out, in], in the base's dtype, a new tensor.

    Raises: NotFinite.
    """
    merged = base.float()
    if merged is base:
        merged = base.clone()
    for columns, delta in iter_deltas(group, shape, layer, base.device):
        merged[columns] += delta
    merged = merged.to(base.dtype)
    if not all_finite(merged):
        raise NotFinite(f"merged, {shape.kind} of layer {layer} is not finite in {base.dtype}")
    return merged
