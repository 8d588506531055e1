"""The command `train`: follows a recipe, shows how far it is, and says what came out.

What it needs is imported when it runs, so that other commands begin as fast as before.
"""

import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from quickchange_adapters.errors import AdapterError, CannotTrain

from quickchange_server.config import load_config
from quickchange_server.errors import CannotStart, ConfigInvalid, QuickchangeError

if TYPE_CHECKING:
    from quickchange_adapters.training.recipe import Recipe
    from quickchange_adapters.training.run import RunResult

HUB_NAMES = {"builtin:smollm2-135m": "HuggingFaceTB/SmolLM2-135M-Instruct"}
"""Under which name other tools find a built-in base."""

RecipeArgument = Annotated[Path, typer.Argument(metavar="RECIPE", help="A TOML file.")]


def train(
    recipe: RecipeArgument,
    output: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Where files go. Default: beside the recipe."),
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Only read recipe and data, and say what is wrong.")
    ] = False,
    restart: Annotated[
        bool, typer.Option("--restart", help="Forget an unfinished run and begin at step 1.")
    ] = False,
    push: Annotated[
        str | None, typer.Option(metavar="URL", help="Upload the adapter to this server.")
    ] = None,
    name: Annotated[
        str | None,
        typer.Option(metavar="N", help="Name to serve it under. Default: the recipe's folder."),
    ] = None,
    alias: Annotated[
        str | None, typer.Option(metavar="A", help="Point this alias at the upload.")
    ] = None,
) -> None:
    """Train an adapter as a recipe says, and write what serving and PEFT load.

    For example:

    quickchange train recipe.toml

    quickchange train recipe.toml --check

    LORA_RANK=16 quickchange train recipe.toml --output runs/rank-16

    quickchange train recipe.toml --push http://127.0.0.1:8000 --name verdict
    """
    with _exit_on_error():
        followed = _read(recipe, output)
        result = _follow(followed, restart, check)
        if result is None:
            return
        _say_result(followed, result)
    if push is not None:
        _push(result.adapter_folder, push, name or followed.output.resolve().name, alias)


def _read(file: Path, output: Path | None) -> "Recipe":
    from quickchange_adapters.training.recipe import read_recipe, with_output

    recipe = with_output(read_recipe(file), output)
    base_name = recipe.adapter.base_name or HUB_NAMES.get(recipe.base, recipe.base)
    return replace(recipe, adapter=replace(recipe.adapter, base_name=base_name))


def _follow(recipe: "Recipe", restart: bool, check: bool) -> "RunResult | None":
    from quickchange_adapters.training.checkpoint import drop_checkpoint
    from quickchange_adapters.training.prepared import prepare
    from quickchange_adapters.training.run import TrainingRun

    prepared = prepare(recipe, _base_folder(recipe), _say)
    _say(
        f"{len(prepared.train.rows)} rows to train on, {len(prepared.validation.rows)} to validate"
        + (f", {len(prepared.test.rows)} to test" if prepared.test else "")
    )
    if check:
        return None
    if restart:
        drop_checkpoint(recipe.output)
    with _progress() as on_step:
        return TrainingRun(prepared, _say, on_step).run()


def _base_folder(recipe: "Recipe") -> Path:
    from quickchange_server.base_folder import resolve_base

    settings = load_config({"model": recipe.base})
    folder = recipe.file.parent / recipe.base
    if folder.is_dir():
        return folder.resolve()
    return resolve_base(settings.model, None, settings.cache_folder)


@contextmanager
def _progress() -> Iterator[Any]:
    """Give what shows each step: a bar for people, else a line at each look at validation."""
    from tqdm import tqdm

    bar: Any = tqdm(unit="step", disable=not sys.stderr.isatty())

    def show(step: int, num_steps: int, values: dict[str, Any]) -> None:
        bar.total = num_steps
        bar.update(step - bar.n)
        shown = {key: values[key] for key in ("loss", "validation_loss") if key in values}
        bar.set_postfix(shown)
        if bar.disable and "validation_loss" in values:
            _say(f"step {step} of {num_steps}: " + ", ".join(f"{k} {v}" for k, v in shown.items()))

    with bar:
        yield show


def _say_result(recipe: "Recipe", result: "RunResult") -> None:
    _say(
        f"best validation loss {result.best_loss:.4f} at step {result.best_step} of "
        f"{result.steps}; {result.seconds:.0f} s"
    )
    _say(f"written: {result.adapter_folder} ({result.adapter_bytes / 1e6:.2f} MB)")


def _push(folder: Path, url: str, name: str, alias: str | None) -> None:
    """Upload with the client's own command: the client stands alone, and nothing imports it."""
    beside = Path(sys.executable).with_name("quickchange")
    command = str(beside) if beside.exists() else shutil.which("quickchange")
    if command is None:
        _say("error: uploading needs the client; get it with: pip install quickchange-client")
        raise typer.Exit(1)
    words = [command, "push", str(folder), "--name", name, "--url", url]
    done = subprocess.run([*words, *(["--alias", alias] if alias else [])])
    if done.returncode != 0:
        raise typer.Exit(done.returncode)


@contextmanager
def _exit_on_error() -> Iterator[None]:
    """Print what a user can cause as one sentence, and exit with 1, or 2 for wrong input."""
    try:
        yield
    except (AdapterError, QuickchangeError, OSError) as error:
        _say(f"error: {error}")
        is_usage = isinstance(error, CannotTrain | CannotStart | ConfigInvalid)
        raise typer.Exit(error.exit_code if is_usage else 1) from error  # type: ignore[union-attr]
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


def _say(sentence: str) -> None:
    print(sentence, file=sys.stderr, flush=True)
