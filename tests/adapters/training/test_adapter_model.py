"""What a recipe's settings become in PEFT, for every method."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from quickchange_adapters.config import read_config
from quickchange_adapters.errors import CannotTrain
from quickchange_adapters.training.adapter_model import (
    adapter_tensors,
    target_names,
    unserved,
    with_adapter,
)
from quickchange_adapters.training.base_model import load_base
from quickchange_adapters.training.recipe import METHODS, AdapterSettings
from quickchange_adapters.training.run import TrainingRun
from quickchange_adapters.training.trainer import held_out_loss
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.adapters.training.training_world import prepared_in, recipe_values
from tests.conftest import LLAMA_LINEARS, save_tiny_base


def trained(folder: Path, base: Path, adapter: dict[str, Any], **training: Any) -> float:
    """Train a few steps and return the best validation loss."""
    values = recipe_values(base, **training)
    values["adapter"] = {"number_format": "float32", "allow_unserved": True, **adapter}
    prepared = prepared_in(folder, base, values)
    result = TrainingRun(prepared, lambda sentence: None, lambda *step: None).run()
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    read_back = PeftModel.from_pretrained(model, str(folder / "adapter"))
    found = held_out_loss(read_back, prepared.validation.rows, 1000)
    assert found == pytest.approx(result.best_loss, rel=1e-3)
    return result.best_loss


@pytest.mark.parametrize("method", METHODS)
def test_every_method_learns_and_is_read_back_by_peft(
    method: str, tiny_base: Path, tmp_path: Path
) -> None:
    loss = trained(
        tmp_path, tiny_base, {"method": method, "rank": 4}, max_steps=30, epochs=9, patience=99
    )
    untrained = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    rows = prepared_in(tmp_path / "base", tiny_base).validation.rows
    assert loss < 0.9 * held_out_loss(untrained, rows, 1000)


@pytest.mark.parametrize("method", METHODS)
def test_the_same_is_learned_in_either_number_format_and_all_of_it_is_written(
    method: str, tiny_base: Path, tmp_path: Path
) -> None:
    learned = []
    for dtype in (torch.float32, torch.bfloat16):
        model = with_adapter(load_base(tiny_base, dtype), AdapterSettings(method=method), 10)
        learned.append(
            {n.replace(".default", "") for n, p in model.named_parameters() if p.requires_grad}
        )
        written = {name.removesuffix(".weight") for name in adapter_tensors(model, dtype)}
        assert {name.removesuffix(".weight") for name in learned[-1]} <= written
    assert learned[0] == learned[1]


def test_adalora_needs_steps_to_choose_its_ranks_in(tiny_base: Path, tmp_path: Path) -> None:
    with pytest.raises(CannotTrain, match="needs 2 steps at least"):
        trained(tmp_path / "one", tiny_base, {"method": "adalora"}, max_steps=1)
    trained(tmp_path / "two", tiny_base, {"method": "adalora"}, max_steps=2)


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_the_root_of_the_rank_scales_and_is_read_back(
    method: str, tiny_base: Path, tmp_path: Path
) -> None:
    losses = [
        trained(tmp_path / str(on), tiny_base, {"method": method, "rank": 4, "rslora": on})
        for on in (False, True)
    ]
    assert losses[0] != losses[1]


@pytest.mark.parametrize(("method", "bits"), [("lora", 8), ("lora", 4), ("dora", 4), ("vera", 4)])
def test_what_was_learned_on_a_rounded_base_is_read_back_onto_one(
    method: str, bits: int, tiny_base: Path, tmp_path: Path
) -> None:
    values = recipe_values(tiny_base, max_steps=2) | {"base_bits": bits}
    values["adapter"] = {"method": method, "number_format": "float32", "allow_unserved": True}
    prepared = prepared_in(tmp_path, tiny_base, values)
    result = TrainingRun(prepared, lambda sentence: None, lambda *step: None).run()
    base = load_base(tiny_base, torch.float32, bits)
    read_back = PeftModel.from_pretrained(base, str(tmp_path / "adapter"))
    found = held_out_loss(read_back, prepared.validation.rows, 1000)
    assert found == pytest.approx(result.best_loss, rel=1e-5)
    whole = PeftModel.from_pretrained(load_base(tiny_base, torch.float32), tmp_path / "adapter")
    assert held_out_loss(whole, prepared.validation.rows, 1000) != found


def test_frozen_a_stays_as_it_began(tiny_base: Path, tmp_path: Path) -> None:
    for name, steps in (("one", 1), ("six", 6)):
        trained(tmp_path / name, tiny_base, {"frozen_a": True}, max_steps=steps)
    one, six = (
        load_file(tmp_path / name / "adapter" / "adapter_model.safetensors")
        for name in ("one", "six")
    )
    same = {key for key in one if torch.equal(one[key], six[key])}
    assert same == {key for key in one if "lora_A" in key}


def test_a_rate_of_its_own_moves_b_further(tiny_base: Path, tmp_path: Path) -> None:
    moved = {}
    for name, rate in (("as a", {}), ("own", {"learning_rate_b": 4e-2})):
        trained(tmp_path / name, tiny_base, {}, max_steps=1, warmup_share=0, **rate)
        tensors = load_file(tmp_path / name / "adapter" / "adapter_model.safetensors")
        moved[name] = {k: t.abs().max().item() for k, t in tensors.items()}
    for key, value in moved["as a"].items():
        expected = 4 * value if "lora_B" in key else value
        assert moved["own"][key] == pytest.approx(expected, rel=1e-3)


def test_gradient_checkpointing_changes_nothing(tiny_base: Path, tmp_path: Path) -> None:
    losses = [
        trained(tmp_path / str(on), tiny_base, {}, gradient_checkpointing=on)
        for on in (False, True)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_base_in_bfloat16_learns_in_float32_steps(tiny_base: Path, tmp_path: Path) -> None:
    losses = [
        trained(tmp_path / name, tiny_base, {}, compute="float32", learning_rate=rate)
        for name, rate in (("normal", 1e-3), ("tiny", 1e-5))
    ]
    assert losses[0] < losses[1]
    values = recipe_values(tiny_base, compute="bfloat16", learning_rate=1e-3)
    prepared = prepared_in(tmp_path / "half", tiny_base, values)
    half = TrainingRun(prepared, lambda sentence: None, lambda *step: None).run()
    assert half.best_loss == pytest.approx(losses[0], rel=0.02)


def test_targets_are_found_in_the_base_itself(tiny_base: Path, tmp_path: Path) -> None:
    llama = load_base(tiny_base, torch.float32, 16)
    assert sorted(target_names(llama, "all-linear")) == sorted(LLAMA_LINEARS)
    assert target_names(llama, "attention") == ["q_proj", "k_proj", "v_proj", "o_proj"]
    with pytest.raises(CannotTrain, match="no linear 'qkv'"):
        target_names(llama, ("qkv",))
    gpt2 = load_base(save_tiny_base(tmp_path / "gpt2", "gpt2"), torch.float32, 16)
    assert target_names(gpt2, "all-linear") == ["c_attn", "c_proj", "c_fc"]


@pytest.mark.parametrize("method", METHODS)
def test_what_serving_cannot_take_is_known_before_it_is_trained(
    method: str, tiny_base: Path, tmp_path: Path
) -> None:
    trained(tmp_path, tiny_base, {"method": method}, max_steps=4)
    written = read_config((tmp_path / "adapter" / "adapter_config.json").read_bytes())
    foreseen = unserved(AdapterSettings(method=method))
    assert {problem.where for problem in foreseen} <= {each.where for each in written.problems}
    assert bool(foreseen) == bool(written.problems)
    assert foreseen == () or method != "lora"
