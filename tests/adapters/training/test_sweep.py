"""Studies: which cells there are, that none is done twice, and what the table says."""

import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from quickchange_adapters.errors import CannotTrain, RecipeInvalid
from quickchange_adapters.training.sweep import read_sweep
from quickchange_adapters.training.sweep_page import sweep_page, write_sweep_picture
from quickchange_adapters.training.sweep_run import RESULTS, in_own_process, run_cell, run_sweep

from tests.adapters.training.training_world import ROWS, write_rows, write_world

RECIPE = """\
base = "{base}"
[data]
train = "train.jsonl"
validation = "valid.jsonl"
[adapter]
rank = 4
alpha = 12
[training]
batch_rows = 4
max_steps = 2
compute = "float32"
"""
WRONG = {
    "nothing": ("", "has no cells"),
    "key": ("[grid]\nrnk = [1]\nrank = [1]", "grid.rnk is not known (nearest: rank)"),
    "no list": ("[grid]\nrank = 3", "grid.rank must be a list"),
    "cell key": ("[[cell]]\nrnk = 1", "cell 1.rnk is not known"),
    "cell": ("cell = 3", "cell must be tables"),
    "value": ("[grid]\nrank = [0]", "adapter.rank is 0"),
    "change": (
        "[grid]\nrank = [1]\n[set.training]\nmax_step = 3",
        "training.max_step is not known",
    ),
}


@pytest.fixture
def folder(tmp_path: Path, tiny_base: Path) -> Path:
    """Folder of a recipe that can be followed in seconds."""
    write_world(tmp_path).write_text(RECIPE.format(base=tiny_base))
    return tmp_path


def sweep_file(folder: Path, text: str) -> Path:
    file = folder / "study.toml"
    file.write_text(text)
    return file


def test_a_grid_is_all_combinations_and_cells_are_added(folder: Path) -> None:
    text = '[grid]\nrank = [2, 8]\ntargets = ["attention", ["q_proj"]]\n[[cell]]\nbase_bits = 4\n'
    study = read_sweep(sweep_file(folder, text + "[set.training]\nmax_steps = 9\n"))
    assert [cell.name for cell in study.cells] == [
        "rank-2_targets-attention",
        "rank-2_targets-q_proj",
        "rank-8_targets-attention",
        "rank-8_targets-q_proj",
        "base_bits-4",
    ]
    assert {cell.recipe.loop.max_steps for cell in study.cells} == {9}
    assert [cell.recipe.base_bits for cell in study.cells] == [16] * 4 + [4]
    assert len({cell.recipe.output for cell in study.cells}) == 5


def test_alpha_keeps_its_ratio_to_the_rank(folder: Path) -> None:
    study = read_sweep(sweep_file(folder, "[grid]\nrank = [2, 8]\n"))
    assert [cell.recipe.adapter.alpha for cell in study.cells] == [6, 24]


def test_test_rows_can_be_left_aside(folder: Path) -> None:
    recipe = folder / "recipe.toml"
    recipe.write_text(recipe.read_text().replace("[data]", '[data]\ntest = "valid.jsonl"'))
    for line, is_tested in (("", True), ("evaluate = true\n", True), ("evaluate = false\n", False)):
        (cell,) = read_sweep(sweep_file(folder, line + "[grid]\nrank = [2]\n")).cells
        assert (cell.recipe.data.test is not None) == is_tested


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_said_before_any_cell_is_run(name: str, folder: Path) -> None:
    text, sentence = WRONG[name]
    with pytest.raises(RecipeInvalid) as caught:
        read_sweep(sweep_file(folder, text))
    assert sentence in str(caught.value)


def test_a_cell_is_done_once_and_a_changed_one_again(folder: Path, tiny_base: Path) -> None:
    said: list[str] = []
    text = "[grid]\nbase_bits = [16, 4]\n"
    study = read_sweep(sweep_file(folder, text))
    first = run_sweep(study, tiny_base, said.append, run_cell)
    assert [result["settings"] for result in first] == [{"base_bits": 16}, {"base_bits": 4}]
    assert first[0]["validation_loss"] != first[1]["validation_loss"]
    with (study.output / RESULTS).open("a") as stream:
        stream.write('\n{"name": "cut o')
    assert run_sweep(study, tiny_base, said.append, run_cell) == first
    assert said[-2:] == ["1 of 2: base_bits-16: done before", "2 of 2: base_bits-4: done before"]
    changed = read_sweep(sweep_file(folder, "[[cell]]\nbase_bits = 4\n[set]\nseed = 3\n"))
    (again,) = run_sweep(changed, tiny_base, said.append, run_cell)
    assert said[-1] == "1 of 1: base_bits-4"
    assert again["validation_loss"] != first[1]["validation_loss"]


def test_other_test_rows_make_a_cell_be_done_again(folder: Path, tiny_base: Path) -> None:
    recipe = folder / "recipe.toml"
    recipe.write_text(recipe.read_text().replace("[data]", '[data]\ntest = "test.jsonl"'))
    test = write_rows(folder / "test.jsonl", ROWS[:3])
    file = sweep_file(folder, "[[cell]]\nrank = 2\n")
    said: list[str] = []
    run_sweep(read_sweep(file), tiny_base, said.append, run_cell)
    run_sweep(read_sweep(file), tiny_base, said.append, run_cell)
    assert said[2:] == ["1 of 2: base alone: done before", "2 of 2: rank-2: done before"]
    write_rows(test, ROWS[3:6])
    run_sweep(read_sweep(file), tiny_base, said.append, run_cell)
    assert said[4:] == ["1 of 2: base alone", "2 of 2: rank-2"]


def test_a_cell_whose_test_was_interrupted_is_not_trained_again(
    folder: Path, tiny_base: Path
) -> None:
    (cell,) = read_sweep(sweep_file(folder, "[[cell]]\nrank = 2\n")).cells
    first = run_cell(cell, tiny_base)
    weights = cell.recipe.output / "adapter" / "adapter_model.safetensors"
    written_ns = weights.stat().st_mtime_ns
    assert run_cell(cell, tiny_base) == first
    assert weights.stat().st_mtime_ns == written_ns
    (changed,) = read_sweep(sweep_file(folder, "[[cell]]\nrank = 2\n[set]\nseed = 3\n")).cells
    assert run_cell(changed, tiny_base)["validation_loss"] != first["validation_loss"]
    again = run_cell(cell, tiny_base)
    assert again["validation_loss"] == first["validation_loss"]
    assert weights.stat().st_mtime_ns != written_ns


def test_a_process_of_its_own_comes_to_the_same(folder: Path, tiny_base: Path) -> None:
    (cell,) = read_sweep(sweep_file(folder, "[[cell]]\nrank = 2\n")).cells
    beside = replace(cell, recipe=replace(cell.recipe, output=folder / "beside"))
    alone, here = in_own_process(cell, tiny_base), run_cell(beside, tiny_base)
    assert alone["peak_bytes"] > 100 << 20
    varies = {"seconds", "cpu_seconds", "peak_bytes"}
    assert {k: v for k, v in alone.items() if k not in varies} == {
        k: v for k, v in here.items() if k not in varies
    }


def test_a_cell_that_cannot_write_says_so(folder: Path, tiny_base: Path) -> None:
    (cell,) = read_sweep(sweep_file(folder, "[[cell]]\nrank = 2\n")).cells
    cell.recipe.output.mkdir(parents=True)
    (cell.recipe.output / "adapter").write_text("no folder")
    with pytest.raises(CannotTrain, match="File exists: .*adapter"):
        in_own_process(cell, tiny_base)


class Ending:
    """What makes the process that reads it call a function."""

    def __init__(self, function: Callable[[int], object], number: int) -> None:
        self._call = function, (number,)

    def __reduce__(self) -> tuple[Callable[[int], object], tuple[int]]:
        """Return the call as what this is made by."""
        return self._call


@pytest.mark.parametrize(
    ("function", "number", "sentence"),
    [
        (chr, -1, r"^'rank-2' failed \(see above\)"),
        (sys.exit, 128 + signal.SIGTERM, "ended from outside"),
        (signal.raise_signal, signal.SIGKILL, "ended from outside"),
    ],
)
def test_a_process_that_says_nothing_is_judged_by_its_exit_code(
    function: Callable[[int], object], number: int, sentence: str, folder: Path, tiny_base: Path
) -> None:
    (cell,) = read_sweep(sweep_file(folder, "[[cell]]\nrank = 2\n")).cells
    recipe: Any = Ending(function, number)
    with pytest.raises(CannotTrain, match=sentence):
        in_own_process(replace(cell, recipe=recipe), tiny_base)


def test_the_table_and_the_picture_have_every_cell(tmp_path: Path) -> None:
    cell: dict[str, Any] = {
        "name": "a",
        "settings": {"rank": 8, "targets": ["q_proj", "v_proj"]},
        "parameters": 1234567,
        "adapter_bytes": 2_500_000,
        "steps": 30,
        "validation_loss": 1.23456,
        "test_loss": 1.5,
        "figure": "exactly right",
        "value": 0.875,
        "cpu_seconds": 61.4,
        "peak_bytes": 1 << 30,
    }
    base = {"name": "base alone", "settings": {}, "test_loss": 9.0, "figure": "exactly right"}
    page = sweep_page("recipe.toml", [base | {"value": 0.0}, cell])
    row = "| rank 8, targets q_proj+v_proj | 1,234,567 | 2.50 MB | 30 | 1.235 | 1.500 | 87.5 % |"
    assert f"{row} 61 s | 1.00 GiB |" in page
    assert "| base alone | - | - | - | - | 9.000 | 0.0 % | - | - |" in page
    write_sweep_picture([base, cell], tmp_path / "sweep.png")
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")
