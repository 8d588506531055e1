"""The frozen base: what rounding its linears to fewer bits leaves of them."""

import importlib.util
from pathlib import Path

import pytest
import torch
from quickchange_adapters.errors import CannotTrain
from quickchange_adapters.training.base_model import GROUP, context_length, load_base, rounded

from tests.conftest import tiny_config


@pytest.mark.parametrize(("bits", "most"), [(8, 255), (4, 15)])
def test_a_group_holds_no_more_values_than_its_bits(bits: int, most: int) -> None:
    weight = torch.randn(8, 4 * GROUP, generator=torch.Generator().manual_seed(0))
    found = rounded(weight, bits)
    group = GROUP if bits == 4 else weight.shape[1]
    for row in found.reshape(-1, group):
        assert len(row.unique()) <= most
    error = (found - weight).abs().reshape(-1, group).amax(1)
    step = weight.abs().reshape(-1, group).amax(1) / (most // 2)
    assert (error <= step / 2 + 1e-6).all()


def test_blocks_are_rounded_and_the_head_is_not(tiny_base: Path) -> None:
    whole, four = (load_base(tiny_base, torch.float32, bits) for bits in (16, 4))
    assert torch.equal(whole.lm_head.weight, four.lm_head.weight)
    name = "model.layers.1.mlp.down_proj"
    before, after = (model.get_submodule(name).weight for model in (whole, four))
    assert not torch.equal(before, after)
    assert torch.equal(after, rounded(before, 4))
    assert not any(parameter.requires_grad for parameter in four.parameters())


@pytest.mark.parametrize(("bits", "dtype"), [(8, torch.int8), (4, torch.uint8)])
def test_bitsandbytes_holds_fewer_bits_or_says_how_to_get_it(
    bits: int, dtype: torch.dtype, tiny_base: Path
) -> None:
    if importlib.util.find_spec("bitsandbytes") is None:
        with pytest.raises(CannotTrain, match=r"quickchange-server\[bits\]"):
            load_base(tiny_base, torch.bfloat16, bits, "bitsandbytes")
        return
    model = load_base(tiny_base, torch.bfloat16, bits, "bitsandbytes")
    assert model.model.layers[0].mlp.up_proj.weight.dtype == dtype
    assert model.lm_head.weight.dtype == torch.bfloat16


def test_a_row_may_not_be_longer_than_a_sliding_window() -> None:
    assert context_length(tiny_config("llama", 384)) == 512
    assert context_length(tiny_config("mistral", 384, sliding_window=64)) == 64
