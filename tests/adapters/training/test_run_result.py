"""A run that came to its end is not trained again, as long as nothing of it was changed."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from quickchange_adapters.task import read_task_file
from quickchange_adapters.training.run import TrainingRun
from quickchange_adapters.training.run_result import NAME as RECORD
from quickchange_adapters.training.run_result import RunResult

from tests.adapters.training.training_world import prepared_in, recipe_values

ALL_STEPS = [1, 2, 3, 4, 5, 6]


class World:
    """A folder with a recipe; remembers what its last run said, and which steps it did."""

    def __init__(self, folder: Path, base: Path) -> None:
        self.folder = folder
        self.values = recipe_values(base)
        self.base = base
        self.said: list[str] = []
        self.steps: list[int] = []

    def run(self, restart: bool = False) -> RunResult:
        """Run the recipe."""
        self.said, self.steps = [], []
        prepared = prepared_in(self.folder, self.base, self.values)

        def on_step(step: int, num_steps: int, logged: dict[str, Any]) -> None:
            self.steps.append(step)

        return TrainingRun(prepared, self.said.append, on_step).run(restart)

    def files(self) -> dict[str, bytes]:
        """Return the adapter's files."""
        return {file.name: file.read_bytes() for file in (self.folder / "adapter").iterdir()}


@pytest.fixture
def world(tmp_path: Path, tiny_base: Path) -> World:
    return World(tmp_path, tiny_base)


def test_what_was_trained_to_its_end_is_found_and_said_in_one_line(world: World) -> None:
    first = world.run()
    assert (first.is_new, world.steps) == (True, ALL_STEPS)
    files = world.files()
    assert RECORD not in files
    again = world.run()
    assert (again.is_new, world.steps) == (False, [])
    assert replace(again, is_new=True) == first
    adapter = world.folder / "adapter"
    assert world.said == [
        f"{adapter} was trained before, from the same recipe, rows and base; "
        "--restart trains it again"
    ]
    assert world.files() == files


def test_another_task_is_written_without_training(world: World) -> None:
    world.run()
    world.values["task"] |= {"temperature": 0.5}
    world.run()
    assert world.steps == []
    task = read_task_file(world.folder / "adapter" / "task.json").task
    assert task is not None
    assert task.temperature == 0.5


def change_weights(world: World) -> None:
    file = world.folder / "adapter" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"?")


def remove_config(world: World) -> None:
    (world.folder / "adapter" / "adapter_config.json").unlink()


def cut_record(world: World) -> None:
    record = world.folder / RECORD
    record.write_bytes(record.read_bytes()[:-30])


def empty_record(world: World) -> None:
    (world.folder / RECORD).write_text("[]")


def remove_record(world: World) -> None:
    (world.folder / RECORD).unlink()


def change_recipe(world: World) -> None:
    world.values["seed"] = 3


@pytest.mark.parametrize(
    "change",
    [change_weights, remove_config, cut_record, empty_record, remove_record, change_recipe],
)
def test_what_was_changed_is_trained_again(change: Callable[[World], None], world: World) -> None:
    world.run()
    change(world)
    assert world.run().is_new
    assert world.steps == ALL_STEPS
    assert not world.run().is_new


def test_restart_trains_it_again(world: World) -> None:
    world.run()
    assert world.run(restart=True).is_new
    assert world.steps == ALL_STEPS
