"""A training run: it learns, ends by itself, goes on after any end, and writes what PEFT loads."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from quickchange_adapters.errors import CannotTrain
from quickchange_adapters.task import read_task_file
from quickchange_adapters.training.checkpoint import NAME as CHECKPOINT
from quickchange_adapters.training.run import RunResult, TrainingRun
from quickchange_adapters.training.run_log import read_log
from quickchange_adapters.training.trainer import held_out_loss
from transformers import AutoModelForCausalLM

from tests.adapters.training.training_world import prepared_in, recipe_values, write_world


def run_in(
    folder: Path, base: Path, values: Mapping[str, Any] | None = None, stop_after: int | None = None
) -> RunResult:
    """Run a recipe; as if Ctrl-C were pressed after a step, if one is given."""

    def on_step(step: int, num_steps: int, logged: dict[str, Any]) -> None:
        if step == stop_after:
            raise KeyboardInterrupt

    return TrainingRun(prepared_in(folder, base, values), lambda sentence: None, on_step).run()


def weights_of(folder: Path) -> bytes:
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes()


def test_it_learns_and_writes_what_peft_loads(tiny_base: Path, tmp_path: Path) -> None:
    values = recipe_values(tiny_base, max_steps=30, epochs=10, validate_every=10)
    values["adapter"] = {"number_format": "float32", "rank": 4, "alpha": 8}
    result = run_in(tmp_path, tiny_base, values)
    log = read_log(tmp_path / "train_log.jsonl")
    assert [line["step"] for line in log] == list(range(1, 31))
    assert log[-1]["loss"] < log[0]["loss"] / 2
    assert result.best_loss == pytest.approx(
        min(line["validation_loss"] for line in log if "validation_loss" in line), abs=1e-4
    )
    base = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, str(tmp_path / "adapter"))
    rows = prepared_in(tmp_path, tiny_base, values).validation.rows
    assert held_out_loss(model, rows, 1000) == pytest.approx(result.best_loss, rel=1e-4)
    assert result.parameters.trainable == sum(
        p.numel() for n, p in model.named_parameters() if "lora_" in n
    )


def test_task_json_is_the_recipes_task(tiny_base: Path, tmp_path: Path) -> None:
    run_in(tmp_path, tiny_base)
    task = read_task_file(tmp_path / "adapter" / "task.json").task
    assert task is not None
    assert (task.prompt, task.max_tokens) == ("<{input}>", 4)


def test_validation_that_gets_no_better_ends_the_run(tiny_base: Path, tmp_path: Path) -> None:
    values = recipe_values(
        tiny_base, max_steps=50, epochs=20, validate_every=1, patience=3, learning_rate=1.0
    )
    result = run_in(tmp_path, tiny_base, values)
    assert result.steps < 50
    assert result.steps == result.best_step + 3


@pytest.mark.parametrize("stop_after", [1, 3, 5])
def test_a_stopped_run_ends_as_if_it_never_had_been(
    tiny_base: Path, tmp_path: Path, stop_after: int
) -> None:
    values = recipe_values(tiny_base)
    values["adapter"] = {"dropout": 0.1}
    whole = run_in(tmp_path / "whole", tiny_base, values)
    with pytest.raises(KeyboardInterrupt):
        run_in(tmp_path / "parts", tiny_base, values, stop_after)
    assert not (tmp_path / "parts" / "adapter").exists()
    parts = run_in(tmp_path / "parts", tiny_base, values)
    assert weights_of(tmp_path / "parts") == weights_of(tmp_path / "whole")
    assert (parts.steps, parts.best_loss) == (whole.steps, whole.best_loss)
    logs = [read_log(tmp_path / each / "train_log.jsonl") for each in ("parts", "whole")]
    assert [line["loss"] for line in logs[0]] == [line["loss"] for line in logs[1]]
    assert not (tmp_path / "parts" / CHECKPOINT).exists()


def test_a_checkpoint_of_another_recipe_is_refused(tiny_base: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run_in(tmp_path, tiny_base, stop_after=2)
    other = recipe_values(tiny_base, learning_rate=2e-2)
    with pytest.raises(CannotTrain, match="another recipe"):
        run_in(tmp_path, tiny_base, other)


def test_a_folder_is_for_one_run_at_a_time(tiny_base: Path, tmp_path: Path) -> None:
    refused: list[str] = []

    def on_step(step: int, num_steps: int, logged: dict[str, Any]) -> None:
        with pytest.raises(CannotTrain, match="another run writes to") as caught:
            run_in(tmp_path, tiny_base)
        refused.append(str(caught.value))

    values = recipe_values(tiny_base, max_steps=1)
    TrainingRun(prepared_in(tmp_path, tiny_base, values), lambda sentence: None, on_step).run()
    assert len(refused) == 1
    assert {each.name for each in tmp_path.iterdir()} == {
        "adapter",
        "train.jsonl",
        "train_log.jsonl",
        "valid.jsonl",
    }
    run_in(tmp_path, tiny_base)


def test_kill_9_loses_no_more_than_what_came_after_the_last_look(
    tiny_base: Path, tmp_path: Path
) -> None:
    values = recipe_values(tiny_base, max_steps=40, epochs=20, patience=40, validate_every=1)
    file = write_world(tmp_path / "killed")
    program = (
        "import json, sys; from pathlib import Path\n"
        "from tests.adapters.training.test_run import run_in\n"
        "run_in(Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3]))\n"
    )
    words = [sys.executable, "-c", program, str(file.parent), str(tiny_base), json.dumps(values)]
    with subprocess.Popen(words, stderr=subprocess.DEVNULL) as process:
        deadline_s = time.monotonic() + 120
        while not (file.parent / CHECKPOINT).exists() and time.monotonic() < deadline_s:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    assert (file.parent / CHECKPOINT).exists()
    assert not (file.parent / "adapter").exists()
    again = run_in(file.parent, tiny_base, values)
    run_in(tmp_path / "whole", tiny_base, values)
    assert again.steps == 40
    assert weights_of(file.parent) == weights_of(tmp_path / "whole")
    steps = [line["step"] for line in read_log(file.parent / "train_log.jsonl")]
    assert steps == list(range(1, 41))
