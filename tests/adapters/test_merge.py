"""Merged copies: float32 sums rounded once, beside a base that stays as it is."""

import pytest
import torch
from quickchange_adapters.host_adapter import iter_deltas
from quickchange_adapters.merge import MakeWeight, merge_adapter, merged_bytes_of
from quickchange_adapters.ops.linear_weight import (
    PackedWeight,
    PlainWeight,
    can_pack,
    make_linear_weight,
)
from torch import Tensor

from tests.adapters.test_pool import LAYOUT, adapter_of, weights_of


class FixedBase:
    """A base without biases and head."""

    def __init__(self, weights: dict[tuple[str, int], Tensor]) -> None:
        self.weights = weights

    def dense(self, kind: str, layer: int) -> Tensor:
        return self.weights[(kind, layer)]

    def bias(self, kind: str, layer: int) -> Tensor | None:
        return None

    def dense_head(self) -> Tensor:
        raise NotImplementedError

    def weight_maker(self) -> MakeWeight:
        return make_linear_weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_merged_matrix_is_the_base_plus_every_part(dtype: torch.dtype) -> None:
    base = {
        (kind, layer): torch.randn(shape.out_features, shape.in_features).to(dtype)
        for kind, shape in LAYOUT.groups.items()
        for layer in range(shape.num_layers)
    }
    before = {key: value.clone() for key, value in base.items()}
    adapter = adapter_of("merged", 5)
    copy = merge_adapter(adapter, LAYOUT, FixedBase(base))
    pairs = weights_of("merged", dict.fromkeys(LAYOUT.places, 5)).pairs
    for module, pair in pairs.items():
        place = LAYOUT.places[module]
        columns = LAYOUT.groups[place.kind].part_slices[place.part]
        key = (place.kind, place.layer)
        expected = before[key][columns].float() + pair.lora_b @ pair.lora_a
        actual = copy.weights[key].dense()[columns]
        assert actual.dtype == dtype
        torch.testing.assert_close(actual, expected.to(dtype), atol=2e-6, rtol=1e-2)
    assert all(torch.equal(base[key], before[key]) for key in base)
    assert copy.num_bytes == merged_bytes_of(adapter, LAYOUT, dtype.itemsize)


def test_updates_are_computed_where_the_base_is() -> None:
    """Their factors are small; the products are as large as the base."""
    kind, shape = next(iter(LAYOUT.groups.items()))
    group = adapter_of("merged", 5).groups[kind]
    deltas = [delta for _, delta in iter_deltas(group, shape, 0, torch.device("meta"))]
    assert {delta.device.type for delta in deltas} == {"meta"}
    assert [delta.shape[0] for delta in deltas] == list(shape.part_outs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_packed_matrix_gives_back_its_exact_values(dtype: torch.dtype) -> None:
    weight = torch.randn(24, 40).to(dtype)
    if not can_pack(weight):
        pytest.skip(f"this machine does not pack {dtype}")
    packed, plain = PackedWeight(weight), PlainWeight(weight)
    assert torch.equal(packed.dense(), weight)
    x, bias = torch.randn(5, 40).to(dtype), torch.randn(24).to(dtype)
    torch.testing.assert_close(packed.apply(x, bias), plain.apply(x, bias), atol=0.1, rtol=0.02)


def test_float32_rows_of_a_packed_product_do_not_depend_on_other_rows() -> None:
    weight = torch.randn(48, 64)
    packed = PackedWeight(weight)
    x = torch.randn(33, 64)
    together = packed.apply(x, None)
    for start, end in ((0, 1), (3, 5), (7, 33)):
        assert torch.equal(packed.apply(x[start:end], None), together[start:end])
