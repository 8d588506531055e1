"""Tensors as they are served, against PEFT's own merged update."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from quickchange_adapters.base_spec import BaseSpec, ModuleSpec
from quickchange_adapters.errors import AdapterRefused
from quickchange_adapters.limits import AdapterLimits
from quickchange_adapters.loading import load_weights
from quickchange_adapters.validate import validate_adapter
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from tests.adapters.adapter_files import config_values, q_pairs, small_spec, write_adapter
from tests.conftest import MakeAdapter, save_peft_adapter, save_tiny_base

DIGEST = "d1" * 32
# What common trainers write for "attention and MLP of the language model".
UNSLOTH = (
    r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense).*?"
    r"(?:q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}"
    r"\.(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense)\."
    r"(?:(?:q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)))"
)
AXOLOTL = r"model.layers.[\d]+.(mlp|cross_attn|self_attn).(up|down|gate|q|k|v|o)_proj"
VARIANTS: list[dict[str, Any]] = [
    {},
    {"r": 5, "lora_alpha": 7},
    {"use_rslora": True},
    {"rank_pattern": {r"layers\.1\.self.*": 16, "q_proj": 4}},
    {"rank_pattern": {"down_proj": 1}, "alpha_pattern": {"down_proj": 3, "self_attn.q_proj": 64}},
    {"rank_pattern": {"^model.layers.0.mlp.up_proj": 2}, "use_rslora": True},
    {"target_modules": "all-linear"},
    {"target_modules": r".*\.(q|v)_proj"},
    {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1]},
    {"target_modules": "all-linear", "exclude_modules": ["o_proj"]},
    {"init_lora_weights": "orthogonal"},
    {"target_modules": UNSLOTH},
    {"target_modules": AXOLOTL},
]


def spec_of(model: nn.Module) -> BaseSpec:
    modules: dict[str, ModuleSpec] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            kind = "lm_head" if name == "lm_head" else "linear"
            modules[name] = ModuleSpec(kind, module.in_features, module.out_features)  # type: ignore[arg-type]
        elif isinstance(module, Conv1D):
            modules[name] = ModuleSpec("conv1d", *module.weight.shape)
    return BaseSpec("tiny", "0" * 64, "llama", 2, modules)


def peft_updates(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    """Return PEFT's update of every targeted weight, as [out, in]."""
    model = AutoModelForCausalLM.from_pretrained(str(base), dtype=torch.float32)
    peft_model = PeftModel.from_pretrained(model, str(adapter))
    updates: dict[str, torch.Tensor] = {}
    for name, module in peft_model.base_model.model.named_modules():
        if isinstance(module, LoraLayer):
            update = module.get_delta_weight("default").detach()
            is_transposed = isinstance(module.get_base_layer(), Conv1D)
            updates[name] = update.T if is_transposed else update
    return updates


def files(folder: Path) -> tuple[Path, Path]:
    return folder / "adapter_config.json", folder / "adapter_model.safetensors"


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: ",".join(v) or "plain")
def test_the_update_is_pefts(
    tiny_base: Path, make_adapter: MakeAdapter, variant: dict[str, Any]
) -> None:
    folder = make_adapter(**variant)
    spec = spec_of(AutoModelForCausalLM.from_pretrained(str(tiny_base)))
    weights = load_weights(*files(folder), spec, DIGEST, torch.float32)
    expected = peft_updates(tiny_base, folder)
    assert weights.digest == DIGEST
    assert weights.pairs.keys() == expected.keys()
    for module, update in expected.items():
        pair = weights.pairs[module]
        torch.testing.assert_close(pair.lora_b @ pair.lora_a, update, atol=1e-5, rtol=1e-5)
    report = validate_adapter(*files(folder), spec, AdapterLimits())
    assert report.ok, report.problems
    for found in report.modules:
        norm = expected[found.module].norm().item()
        assert found.update_norm == pytest.approx(norm, rel=1e-4)


def test_conv1d_needs_no_transposition(tmp_path: Path) -> None:
    base = save_tiny_base(tmp_path / "gpt2", "gpt2", n_embd=64, n_layer=2, n_head=4)
    settings = {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}
    folder = save_peft_adapter(tmp_path / "adapter", base, **settings)
    spec = spec_of(AutoModelForCausalLM.from_pretrained(str(base)))
    weights = load_weights(*files(folder), spec, DIGEST, torch.float32)
    expected = peft_updates(base, folder)
    assert weights.pairs.keys() == expected.keys()
    assert any(update.shape[0] != update.shape[1] for update in expected.values())
    for module, update in expected.items():
        pair = weights.pairs[module]
        torch.testing.assert_close(pair.lora_b @ pair.lora_a, update, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_scaling_is_folded_in_float32_and_rounded_once(
    tiny_base: Path, make_adapter: MakeAdapter, dtype: torch.dtype
) -> None:
    folder = make_adapter(r=3, lora_alpha=7)
    spec = spec_of(AutoModelForCausalLM.from_pretrained(str(tiny_base)))
    exact = load_weights(*files(folder), spec, DIGEST, torch.float32)
    rounded = load_weights(*files(folder), spec, DIGEST, dtype)
    for module, pair in rounded.pairs.items():
        assert pair.lora_a.dtype == pair.lora_b.dtype == dtype
        assert torch.equal(pair.lora_a, exact.pairs[module].lora_a.to(dtype))
        assert torch.equal(pair.lora_b, exact.pairs[module].lora_b.to(dtype))


def test_bfloat16_files_are_read_bit_by_bit(tmp_path: Path) -> None:
    spec = small_spec()
    tensors = {n: (a.view(np.uint32) >> 16).astype(np.uint16) for n, a in q_pairs(spec).items()}
    paths = write_adapter(tmp_path, tensors, config_values(lora_alpha=4))
    weights = load_weights(*paths, spec, DIGEST, torch.bfloat16)
    for module, pair in weights.pairs.items():
        bits = pair.lora_a.view(torch.int16).numpy().view(np.uint16)
        assert np.array_equal(bits, tensors[f"base_model.model.{module}.lora_A.weight"])
        bits = pair.lora_b.view(torch.int16).numpy().view(np.uint16)
        assert np.array_equal(bits, tensors[f"base_model.model.{module}.lora_B.weight"])


def test_what_does_not_fit_this_base_is_refused_with_all_reasons(tmp_path: Path) -> None:
    spec = small_spec()
    paths = write_adapter(tmp_path, q_pairs(spec, 8), config_values(use_dora=True))
    with pytest.raises(AdapterRefused) as caught:
        load_weights(*paths, small_spec(1), DIGEST, torch.float32)
    assert {p.code for p in caught.value.problems} == {"config_unsupported", "unknown_module"}


def test_values_that_overflow_the_serving_dtype_are_refused(tmp_path: Path) -> None:
    spec = small_spec()
    tensors = {name: array * 1e5 for name, array in q_pairs(spec).items()}
    paths = write_adapter(tmp_path, tensors, config_values())
    assert load_weights(*paths, spec, DIGEST, torch.bfloat16).pairs
    with pytest.raises(AdapterRefused) as caught:
        load_weights(*paths, spec, DIGEST, torch.float16)
    assert caught.value.problems[0].code == "not_finite"
    limits = AdapterLimits(max_value=torch.finfo(torch.float16).max)
    assert {p.code for p in validate_adapter(*paths, spec, limits).problems} == {"not_finite"}
