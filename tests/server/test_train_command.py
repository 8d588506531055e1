"""The command `train`: what it says, what it exits with, and where it writes."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

import pytest
from quickchange_adapters.training.adapter_model import unserved
from quickchange_adapters.training.recipe import METHODS, AdapterSettings
from quickchange_adapters.training.stop_signals import Interrupted
from quickchange_server.builtin import known_names
from quickchange_server.cli import app
from quickchange_server.config import load_config
from quickchange_server.train_command import read_with_base_name
from typer.testing import CliRunner, Result

from tests.adapters.training.training_world import ROWS, write_rows

runner = CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"})

RECIPE = """\
base = "{base}"
[data]
train = "train.jsonl"
[task]
prompt = "<{{input}}>"
max_tokens = 4
[training]
batch_rows = 4
max_steps = 2
compute = "float32"
"""


@pytest.fixture
def recipe(tmp_path: Path, tiny_base: Path) -> Path:
    """Return a recipe that can be followed in seconds."""
    write_rows(tmp_path / "train.jsonl", ROWS)
    file = tmp_path / "recipe.toml"
    file.write_text(RECIPE.format(base=tiny_base))
    return file


def train(recipe: Path, *words: str, env: Mapping[str, str] | None = None) -> Result:
    return runner.invoke(app, ["train", str(recipe), *words], env=env)


def test_it_says_how_much_is_trained_and_what_was_written(recipe: Path) -> None:
    done = train(recipe, env={"LORA_RANK": "4"})
    assert done.exit_code == 0, done.stderr
    assert "18 rows to train on, 2 to validate" in done.stderr
    assert "8,192 of 106,624 parameters are trained (7.68 %)" in done.stderr
    folder = recipe.parent / "adapter"
    assert {file.name for file in folder.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "task.json",
    }
    assert json.loads((folder / "adapter_config.json").read_text())["r"] == 4


def test_test_rows_make_it_evaluate_and_losses_are_drawn(recipe: Path) -> None:
    text = recipe.read_text().replace("[data]", '[data]\ntest = "train.jsonl"')
    recipe.write_text(text + '[evaluation]\nmetric = "accuracy"\nmax_rows = 4\n')
    done = train(recipe)
    assert done.exit_code == 0, done.stderr
    assert "warning: 18 of 20 test rows have an input that is trained on too" in done.stderr
    assert "Exactly right: " in done.stderr
    page = recipe.parent / "EVAL.md"
    first = page.read_text()
    assert (recipe.parent / "loss.png").read_bytes().startswith(b"\x89PNG")
    page.unlink()
    assert train(recipe, "--evaluate-only").exit_code == 0
    assert page.read_text() == first
    page.unlink()
    assert train(recipe, "--no-evaluate").exit_code == 0
    assert not page.exists()


def test_what_ends_in_its_evaluation_goes_on_there(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = recipe.read_text().replace("[data]", '[data]\ntest = "train.jsonl"')
    recipe.write_text(text + "[evaluation]\nmax_rows = 2\n")

    def end(*asked: object) -> None:
        raise Interrupted(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr("quickchange_adapters.training.evaluation.evaluate", end)
        assert train(recipe).exit_code == 143
    page = recipe.with_name("EVAL.md")
    assert not page.exists()
    done = train(recipe)
    assert done.exit_code == 0, done.stderr
    assert f"{recipe.parent / 'adapter'} was trained before" in done.stderr
    assert "parameters are trained" not in done.stderr
    assert page.exists()
    assert "parameters are trained" in train(recipe, "--restart", "--no-evaluate").stderr


def test_a_tracker_that_is_told_nothing_is_said(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert train(recipe).exit_code == 0
    monkeypatch.setitem(sys.modules, "mlflow", ModuleType("mlflow"))
    done = train(recipe, "--track", "mlflow")
    assert done.exit_code == 0, done.stderr
    assert "nothing new was trained, so mlflow is told nothing" in done.stderr


def test_without_matplotlib_it_says_so_and_goes_on(tmp_path: Path) -> None:
    broken = tmp_path / "broken" / "matplotlib"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text("raise ImportError('not here')\n")
    (tmp_path / "train_log.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    path = os.pathsep.join([str(broken.parent), os.environ.get("PYTHONPATH", "")])
    program = (
        "import sys; from pathlib import Path\n"
        "from quickchange_server.train_command import draw_losses\n"
        "print(draw_losses(Path(sys.argv[1])).name)\n"
    )
    words = [sys.executable, "-c", program, str(tmp_path)]
    done = subprocess.run(
        words, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, "train_log.jsonl\n"), done.stderr
    assert (
        'no loss.png: it needs matplotlib; pip install "quickchange-server[train]"' in done.stderr
    )
    assert not (tmp_path / "loss.png").exists()


def test_a_tracker_that_is_not_there_is_named_before_anything_is_trained(recipe: Path) -> None:
    done = train(recipe, "--track", "wandb")
    assert done.exit_code == 1
    assert "--track 'wandb' is not known; use mlflow" in done.stderr
    if importlib.util.find_spec("mlflow") is None:
        assert "needs mlflow: pip install mlflow" in train(recipe, "--track", "mlflow").stderr
    assert not (recipe.parent / "adapter").exists()


def test_check_writes_nothing(recipe: Path) -> None:
    before = set(recipe.parent.iterdir())
    assert train(recipe, "--check").exit_code == 0
    assert set(recipe.parent.iterdir()) == before


def test_bad_rows_and_rows_that_are_too_long_end_it_before_it_begins(recipe: Path) -> None:
    file = recipe.parent / "train.jsonl"
    write_rows(file, [*ROWS, {"input": "a"}])
    done = train(recipe)
    assert done.exit_code == 2
    assert f"{file}, line {len(ROWS) + 1}: the field 'answer' is missing" in done.stderr
    write_rows(file, [*ROWS, {"input": "the fox " * 600, "answer": "positive"}])
    done = train(recipe)
    assert done.exit_code == 2
    assert f"{file}, line {len(ROWS) + 1}: the row has " in done.stderr
    assert not (recipe.parent / "adapter").exists()


def test_what_is_trained_on_the_built_in_base_is_known_to_be_of_it(recipe: Path) -> None:
    text = recipe.read_text()
    recipe.write_text('base = "builtin:smollm2-135m"' + text[text.index("\n") :])
    named = read_with_base_name(recipe, None).adapter.base_name
    assert known_names(load_config({}).model) == (named,)
    assert known_names("/models/smollm2-135m") == ()


def test_a_base_that_is_not_there_is_named_as_the_recipe_does(recipe: Path) -> None:
    recipe.write_text(recipe.read_text().replace('base = "', 'base = "./no'))
    done = train(recipe)
    assert done.exit_code == 1
    assert f"{recipe}: base: there is no folder './no" in done.stderr


def test_what_could_not_be_served_is_refused_at_once(recipe: Path) -> None:
    refused = [method for method in METHODS if unserved(AdapterSettings(method=method))]
    if not refused:
        pytest.skip("every method that can be trained can be served")
    recipe.write_text(recipe.read_text() + f'[adapter]\nmethod = "{refused[0]}"\n')
    done = train(recipe)
    assert done.exit_code == 2
    assert "what this trains could not be served: " in done.stderr
    assert not (recipe.parent / "adapter").exists()
    recipe.write_text(recipe.read_text() + "allow_unserved = true\n")
    done = train(recipe)
    assert done.exit_code == 0, done.stderr
    assert "warning: what this trains cannot be served: " in done.stderr


def test_a_sweep_lists_its_cells_and_writes_a_table(recipe: Path) -> None:
    file = recipe.parent / "study.toml"
    file.write_text("[[cell]]\nrank = 2\n[[cell]]\nrank = 3\n")
    done = runner.invoke(app, ["train", "sweep", str(file), "--check"])
    assert (done.exit_code, done.stdout) == (0, "rank-2\nrank-3\n")
    file.write_text("[[cell]]\nrnk = 2\n")
    done = runner.invoke(app, ["train", "sweep", str(file)])
    assert done.exit_code == 2
    assert "cell 1.rnk is not known" in done.stderr


def test_help_has_examples() -> None:
    assert "quickchange train recipe.toml --check" in runner.invoke(app, ["train", "--help"]).output
