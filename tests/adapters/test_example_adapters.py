"""The shipped examples' adapters: small, what their recipes ask for, and fit for their base."""

import json
from pathlib import Path

import pytest
from quickchange_adapters.base_spec import BaseSpec, ModuleSpec
from quickchange_adapters.limits import AdapterLimits
from quickchange_adapters.task import read_task_file
from quickchange_adapters.training.recipe import read_recipe
from quickchange_adapters.validate import validate_adapter

EXAMPLES = Path(__file__).parents[2] / "adapters" / "examples"
NAMES = ("product", "sentiment", "shakespeare")
MAX_BYTES = 3_000_000
NUM_LAYERS = 30
LINEARS = {
    "self_attn.q_proj": (576, 576),
    "self_attn.k_proj": (576, 192),
    "self_attn.v_proj": (576, 192),
    "self_attn.o_proj": (576, 576),
    "mlp.gate_proj": (576, 1536),
    "mlp.up_proj": (576, 1536),
    "mlp.down_proj": (1536, 576),
}  # of SmolLM2-135M: inputs, outputs


def smollm2_spec() -> BaseSpec:
    """What the checks know of the built-in base."""
    modules = {
        f"model.layers.{layer}.{name}": ModuleSpec("linear", *shape)
        for layer in range(NUM_LAYERS)
        for name, shape in LINEARS.items()
    }
    return BaseSpec("SmolLM2-135M-Instruct", "0" * 64, "llama", NUM_LAYERS, modules)


@pytest.mark.parametrize("example", NAMES)
def test_an_adapter_is_three_small_files(example: str) -> None:
    files = list((EXAMPLES / example / "adapter").iterdir())
    assert {path.name for path in files} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "task.json",
    }
    assert sum(path.stat().st_size for path in files) <= MAX_BYTES


@pytest.mark.parametrize("example", NAMES)
def test_an_adapter_passes_the_check_of_uploads(example: str) -> None:
    folder = EXAMPLES / example / "adapter"
    report = validate_adapter(
        folder / "adapter_config.json",
        folder / "adapter_model.safetensors",
        smollm2_spec(),
        AdapterLimits(),
        strict_base=True,
    )
    assert report.ok, report.problems
    assert not report.warnings
    assert len(report.modules) == NUM_LAYERS * len(LINEARS)


@pytest.mark.parametrize("example", NAMES)
def test_an_adapter_is_what_its_recipe_asks_for(example: str) -> None:
    recipe = read_recipe(EXAMPLES / example / "recipe.toml", {})
    folder = EXAMPLES / example / "adapter"
    assert read_task_file(folder / "task.json").task == recipe.task
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["r"] == recipe.adapter.rank
    assert config["lora_alpha"] == recipe.adapter.alpha
    assert config["lora_dropout"] == recipe.adapter.dropout
    assert config["base_model_name_or_path"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert {name.rpartition(".")[2] for name in LINEARS} == set(config["target_modules"])
