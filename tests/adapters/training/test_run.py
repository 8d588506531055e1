"""A training run: it learns, ends by itself, goes on after any end, and writes what PEFT loads."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from quickchange_adapters.errors import CannotTrain
from quickchange_adapters.task import read_task_file
from quickchange_adapters.training.checkpoint import NAME as CHECKPOINT
from quickchange_adapters.training.run import TrainingRun
from quickchange_adapters.training.run_log import RunLog, read_log
from quickchange_adapters.training.run_result import NAME as RECORD
from quickchange_adapters.training.run_result import RunResult
from quickchange_adapters.training.stop_signals import Stopped, StopSignals
from quickchange_adapters.training.trainer import held_out_loss
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.adapters.training.training_world import prepared_in, recipe_values, write_world
from tests.conftest import save_tiny_base


def run_in(
    folder: Path,
    base: Path,
    values: Mapping[str, Any] | None = None,
    stop_in: int | None = None,
    number: int = signal.SIGINT,
) -> RunResult:
    """Run a recipe; get a signal in the step that is given, if one is."""

    def on_step(step: int, num_steps: int, logged: dict[str, Any]) -> None:
        if step == stop_in:
            os.kill(os.getpid(), number)

    signals = StopSignals()
    with signals.obeyed():
        prepared = prepared_in(folder, base, values)
        return TrainingRun(prepared, lambda sentence: None, on_step, signals).run()


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


@pytest.mark.parametrize(
    ("stop_in", "number"), [(2, signal.SIGINT), (4, signal.SIGTERM), (6, signal.SIGHUP)]
)
def test_a_stopped_run_ends_as_if_it_never_had_been(
    tiny_base: Path, tmp_path: Path, stop_in: int, number: int
) -> None:
    values = recipe_values(tiny_base)
    values["adapter"] = {"dropout": 0.1}
    whole = run_in(tmp_path / "whole", tiny_base, values)
    with pytest.raises(Stopped) as stopped:
        run_in(tmp_path / "parts", tiny_base, values, stop_in, number)
    assert stopped.value.exit_code == 128 + number
    log = read_log(tmp_path / "parts" / "train_log.jsonl")
    assert [line["step"] for line in log] == list(range(1, stop_in + 1))
    assert not (tmp_path / "parts" / "adapter").exists()
    parts = run_in(tmp_path / "parts", tiny_base, values)
    assert weights_of(tmp_path / "parts") == weights_of(tmp_path / "whole")
    assert (parts.steps, parts.best_loss) == (whole.steps, whole.best_loss)
    logs = [read_log(tmp_path / each / "train_log.jsonl") for each in ("parts", "whole")]
    assert [line["loss"] for line in logs[0]] == [line["loss"] for line in logs[1]]
    assert not (tmp_path / "parts" / CHECKPOINT).exists()


def test_a_stopped_run_of_adalora_keeps_the_ranks_it_would_have_kept(
    tiny_base: Path, tmp_path: Path
) -> None:
    values = recipe_values(tiny_base, max_steps=12, epochs=9, patience=99)
    values["adapter"] = {"method": "adalora", "rank": 4, "allow_unserved": True}
    run_in(tmp_path / "whole", tiny_base, values)
    for stop_in in (5, 10):  # before the ranks are final, and after
        with pytest.raises(Stopped):
            run_in(tmp_path / "parts", tiny_base, values, stop_in)
    run_in(tmp_path / "parts", tiny_base, values)
    assert weights_of(tmp_path / "parts") == weights_of(tmp_path / "whole")
    configs = [(tmp_path / each / "adapter" / "adapter_config.json") for each in ("parts", "whole")]
    assert configs[0].read_bytes() == configs[1].read_bytes()


def test_the_best_ranks_of_adalora_are_those_of_the_best_step(
    tiny_base: Path, tmp_path: Path
) -> None:
    values = recipe_values(
        tiny_base, max_steps=20, epochs=20, validate_every=1, patience=99, learning_rate=10.0
    )
    values["adapter"] = {"method": "adalora", "allow_unserved": True, "number_format": "float32"}
    result = run_in(tmp_path, tiny_base, values)
    assert result.best_step < 13  # before the ranks are final
    base = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, str(tmp_path / "adapter"))
    rows = prepared_in(tmp_path, tiny_base, values).validation.rows
    assert held_out_loss(model, rows, 1000) == pytest.approx(result.best_loss, rel=1e-4)


def test_restart_begins_at_step_1_but_drops_no_file_of_somebody_else(
    tiny_base: Path, tmp_path: Path
) -> None:
    with pytest.raises(Stopped):
        run_in(tmp_path, tiny_base, stop_in=3)
    prepared = prepared_in(tmp_path, tiny_base)
    steps: list[int] = []
    run = TrainingRun(prepared, lambda sentence: None, lambda step, *more: steps.append(step))
    run.run(restart=True)
    assert steps[0] == 1
    foreign = tmp_path / CHECKPOINT
    foreign.write_bytes(b"somebody's own")
    for restart in (False, True):
        with pytest.raises(CannotTrain, match="is no checkpoint of this program"):
            TrainingRun(prepared, lambda sentence: None, lambda *step: None).run(restart)
    assert foreign.read_bytes() == b"somebody's own"


@contextmanager
def no_file_larger_than(max_bytes: int) -> Iterator[None]:
    """Make the operating system refuse to write more than that to a file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (max_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_that_takes_no_more_ends_it_and_leaves_the_checkpoint_before(
    tiny_base: Path, tmp_path: Path
) -> None:
    with pytest.raises(Stopped):
        run_in(tmp_path / "full", tiny_base, stop_in=2)
    before = (tmp_path / "full" / CHECKPOINT).read_bytes()
    with no_file_larger_than(len(before) // 2), pytest.raises(CannotTrain) as caught:
        run_in(tmp_path / "full", tiny_base)
    assert f"{CHECKPOINT} cannot be written: " in str(caught.value)
    assert "make room there, and the same command goes on" in str(caught.value)
    assert (tmp_path / "full" / CHECKPOINT).read_bytes() == before
    assert not list((tmp_path / "full").glob(".*"))
    run_in(tmp_path / "full", tiny_base)
    run_in(tmp_path / "whole", tiny_base)
    assert weights_of(tmp_path / "full") == weights_of(tmp_path / "whole")
    log = read_log(tmp_path / "full" / "train_log.jsonl")
    assert [line["step"] for line in log] == list(range(1, 7))


def test_a_log_that_the_disk_does_not_take_is_named(tmp_path: Path) -> None:
    with closing(RunLog(tmp_path, 0)) as log:
        log.write(step=1)
        with no_file_larger_than(20), pytest.raises(CannotTrain, match=r"train_log\.jsonl cannot"):
            fill(log)
    assert read_log(tmp_path / "train_log.jsonl")[0] == {"step": 1}


def fill(log: RunLog) -> None:
    for step in range(2, 9):
        log.write(step=step)


def test_a_loss_that_is_no_number_ends_it_and_writes_no_adapter(tmp_path: Path) -> None:
    base = save_tiny_base(tmp_path / "base")
    change_weights(base, torch.nan)
    with pytest.raises(CannotTrain, match=r"step 1: the loss is nan; try a lower"):
        run_in(tmp_path / "run", base, recipe_values(base))
    assert not (tmp_path / "run" / "adapter").exists()


def change_weights(base: Path, by: float) -> None:
    tensors = load_file(base / "model.safetensors")
    changed = {name: tensor + by for name, tensor in tensors.items()}
    save_file(changed, base / "model.safetensors", metadata={"format": "pt"})


def test_a_checkpoint_of_another_recipe_is_refused(tiny_base: Path, tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        run_in(tmp_path, tiny_base, stop_in=3)
    other = recipe_values(tiny_base, learning_rate=2e-2)
    with pytest.raises(CannotTrain, match="another recipe"):
        run_in(tmp_path, tiny_base, other)


def test_a_checkpoint_of_another_base_of_the_same_shape_is_refused(tmp_path: Path) -> None:
    base = save_tiny_base(tmp_path / "base")
    with pytest.raises(Stopped):
        run_in(tmp_path / "run", base, recipe_values(base), stop_in=3)
    change_weights(base, 1e-3)
    with pytest.raises(CannotTrain, match="another base"):
        run_in(tmp_path / "run", base, recipe_values(base))


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
        RECORD,
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
