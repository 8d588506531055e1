"""Adapters that were started from a part of the base: refused as they are, served once converted.

The oracle is the model that was trained: the untouched base with the converted adapter's updates
gives its logits.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.config import CordaConfig, LoraGAConfig
from peft.tuners.lora.corda import preprocess_corda
from peft.tuners.lora.loraga import preprocess_loraga
from quickchange_adapters.limits import AdapterLimits
from quickchange_adapters.loading import load_weights
from quickchange_adapters.validate import validate_adapter
from transformers import AutoModelForCausalLM

from tests.adapters.test_loading import DIGEST, files, spec_of

PROMPT = torch.arange(3, 40)[None]
Prepare = Callable[[Any, LoraConfig], None]


def nothing(model: Any, config: LoraConfig) -> None:
    """PiSSA and OLoRA need no more than the weights."""


def with_activations(model: Any, config: LoraConfig) -> None:
    preprocess_corda(model, config, run_model=lambda: model(PROMPT))


def with_gradients(model: Any, config: LoraConfig) -> None:
    preprocess_loraga(model, config, lambda: model(PROMPT, labels=PROMPT).loss.backward())


PATTERNS = {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}}
CASES: list[tuple[dict[str, Any], Prepare]] = [
    ({"init_lora_weights": "pissa"}, nothing),
    ({"init_lora_weights": "pissa_niter_4", "lora_alpha": 7}, nothing),
    ({"init_lora_weights": "pissa", "use_rslora": True}, nothing),
    ({"init_lora_weights": "pissa", **PATTERNS}, nothing),
    ({"init_lora_weights": "olora"}, nothing),
    ({"init_lora_weights": "olora", "use_rslora": True}, nothing),
    ({"init_lora_weights": "corda", "corda_config": CordaConfig()}, with_activations),
    ({"init_lora_weights": "lora_ga", "lora_ga_config": LoraGAConfig()}, with_gradients),
]  # fmt: skip


def load(base: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(str(base), dtype=torch.float32)


def trained(base: Path, initial: Path, changes: dict[str, Any], prepare: Prepare) -> Any:
    """Return a model trained a little, with its start saved as PEFT's pages say."""
    model = load(base)
    config = LoraConfig(
        **{"r": 4, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"], **changes}
    )
    prepare(model, config)
    peft_model = get_peft_model(model, config)
    init = config.init_lora_weights
    peft_model.peft_config["default"].init_lora_weights = True
    peft_model.save_pretrained(str(initial))
    peft_model.peft_config["default"].init_lora_weights = init
    random = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn(parameter.shape, generator=random) * 0.05)
    return peft_model


@pytest.mark.parametrize(("changes", "prepare"), CASES)
def test_what_changes_the_base_is_refused_and_converted_it_is_served(
    tiny_base: Path, tmp_path: Path, changes: dict[str, Any], prepare: Prepare
) -> None:
    peft_model = trained(tiny_base, tmp_path / "initial", changes, prepare)
    with torch.inference_mode():
        expected = peft_model(PROMPT).logits
    spec = spec_of(load(tiny_base))
    peft_model.save_pretrained(str(tmp_path / "raw"))
    (problem,) = validate_adapter(*files(tmp_path / "raw"), spec, AdapterLimits()).problems
    assert (problem.code, problem.where) == ("config_unsupported", "init_lora_weights")
    assert "path_initial_model_for_weight_conversion" in problem.hint

    converted = tmp_path / "converted"
    peft_model.save_pretrained(
        str(converted), path_initial_model_for_weight_conversion=str(tmp_path / "initial")
    )
    report = validate_adapter(*files(converted), spec, AdapterLimits())
    assert report.ok, report.problems
    written = json.loads(files(converted)[0].read_text())
    assert (written["r"], written["init_lora_weights"]) == (8, True)
    assert set(report.ranks) == ({4, 8} if written["rank_pattern"] else {8})
    weights = load_weights(*files(converted), spec, DIGEST, torch.float32)
    plain = load(tiny_base)
    with torch.inference_mode():
        before = plain(PROMPT).logits
        for module, pair in weights.pairs.items():
            plain.get_submodule(module).weight += pair.lora_b @ pair.lora_a
        found = plain(PROMPT).logits
    assert (before - expected).abs().max() > 0.1
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=1e-3)
