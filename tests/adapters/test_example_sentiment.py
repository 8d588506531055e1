"""The shipped sentiment example: what is in its folder fits together and repeats nothing."""

import json
from pathlib import Path

import pytest
from quickchange_adapters.task import read_task_file
from safetensors import safe_open

from tests.adapters.example_scripts import load_example

FOLDER = Path(__file__).parents[2] / "adapters" / "examples" / "sentiment"
ADAPTER = FOLDER / "adapter"
LINEARS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
NUM_LAYERS = 30  # SmolLM2-135M

Row = dict[str, str]


def read_split(name: str) -> list[Row]:
    lines = (FOLDER / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    rows: list[Row] = [json.loads(line) for line in lines]
    return rows


def test_the_adapter_is_three_small_files() -> None:
    assert {path.name for path in ADAPTER.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "task.json",
    }
    assert (ADAPTER / "adapter_model.safetensors").stat().st_size <= 3_000_000


def test_the_task_is_what_training_writes() -> None:
    chat_form = load_example("chat_form")
    assert read_task_file(ADAPTER / "task.json").task == chat_form.TASK
    text = json.dumps(chat_form.TASK.to_json(), indent=2) + "\n"
    assert (ADAPTER / "task.json").read_text(encoding="utf-8") == text


def test_the_config_is_plain_lora_and_names_no_local_path() -> None:
    config = json.loads((ADAPTER / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["peft_type"] == "LORA"
    assert set(config["target_modules"]) == LINEARS
    assert config["bias"] == "none"
    assert config["base_model_name_or_path"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    for field in ("use_dora", "use_rslora", "modules_to_save", "rank_pattern", "alpha_pattern"):
        assert not config[field], field


def test_the_weights_hold_a_pair_for_every_linear_at_the_configs_rank() -> None:
    config = json.loads((ADAPTER / "adapter_config.json").read_text(encoding="utf-8"))
    with safe_open(str(ADAPTER / "adapter_model.safetensors"), framework="pt") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    assert len(shapes) == NUM_LAYERS * len(LINEARS) * 2
    assert {shape[0] for name, shape in shapes.items() if "lora_A" in name} == {config["r"]}
    assert {shape[1] for name, shape in shapes.items() if "lora_B" in name} == {config["r"]}


@pytest.mark.parametrize(("split", "at_least"), [("train", 1500), ("valid", 40), ("test", 100)])
def test_a_split_is_large_enough_and_balanced(split: str, at_least: int) -> None:
    labels = [row["label"] for row in read_split(split)]
    assert len(labels) >= at_least
    assert set(labels) == {"positive", "negative"}
    assert 0.45 <= labels.count("positive") / len(labels) <= 0.55
