"""The command `train`: follows a recipe, shows how far it is, and says what came out.

What it needs is imported when it runs, so that other commands begin as fast as before.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from quickchange_adapters.errors import CannotTrain

from quickchange_server.builtin import known_names
from quickchange_server.config import load_config
from quickchange_server.train_exit import exit_on_error, say
from quickchange_server.train_push import push_target

if TYPE_CHECKING:
    from quickchange_adapters.training.prepared import Prepared
    from quickchange_adapters.training.recipe import Recipe
    from quickchange_adapters.training.run_result import RunResult
    from quickchange_adapters.training.stop_signals import StopSignals
    from quickchange_adapters.training.tracking import Tracker

Output = Annotated[
    Path | None,
    typer.Option(metavar="FOLDER", help="Where files go. Default: beside the recipe."),
]
Check = Annotated[
    bool, typer.Option("--check", help="Only read recipe and data, and say what is wrong.")
]
Restart = Annotated[
    bool, typer.Option("--restart", help="Forget what was trained and begin at step 1.")
]
Evaluate = Annotated[
    bool | None,
    typer.Option(
        "--evaluate/--no-evaluate",
        help="Write EVAL.md at the end. Default: if the recipe names test rows.",
    ),
]
EvaluateOnly = Annotated[
    bool, typer.Option("--evaluate-only", help="Write EVAL.md for the adapter that is there.")
]
Track = Annotated[
    str | None, typer.Option(metavar="TRACKER", help="Also log to a tracker: mlflow.")
]
Push = Annotated[str | None, typer.Option(metavar="URL", help="Upload the adapter to this server.")]
Name = Annotated[
    str | None,
    typer.Option(metavar="N", help="Name to serve it under. Default: the output's folder."),
]
Alias = Annotated[str | None, typer.Option(metavar="A", help="Point this alias at the upload.")]


def train(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="A TOML file.")],
    output: Output = None,
    check: Check = False,
    restart: Restart = False,
    evaluate: Evaluate = None,
    evaluate_only: EvaluateOnly = False,
    track: Track = None,
    push: Push = None,
    name: Name = None,
    alias: Alias = None,
) -> None:
    """Train an adapter as a recipe says, and write what serving and PEFT load.

    A run that was ended in any way goes on where it was when the same command is
    given again; one that was trained to its end goes on with EVAL.md and upload.
    LORA_RANK and LORA_ALPHA in the environment override the recipe.

    Writes, beside the recipe: adapter/ (two files of PEFT and task.json),
    train_log.jsonl, loss.png, and EVAL.md if the recipe names test rows.

    To compare settings, see: quickchange train sweep --help

    For example:

    quickchange train recipe.toml --check

    quickchange train recipe.toml

    LORA_RANK=16 quickchange train recipe.toml --output runs/rank-16

    quickchange train recipe.toml --push http://127.0.0.1:8000 --name verdict
    """
    with exit_on_error() as signals:
        followed = read_with_base_name(recipe, output)
        target = push_target(push, name, alias, followed.output)
        prepared = _prepare(followed)
        if check:
            return
        if not evaluate_only:
            _train(prepared, restart, track, signals)
        has_test = prepared.test is not None if evaluate is None else evaluate
        if has_test or evaluate_only:
            _evaluate(prepared)
        if target is not None:
            target.push(adapter_folder(followed))


def read_with_base_name(file: Path, output: Path | None) -> "Recipe":
    """Read a recipe; name the base in the adapter's config as other tools know it."""
    from quickchange_adapters.training.recipe import read_recipe, with_output

    recipe = with_output(read_recipe(file), output)
    base_name = recipe.adapter.base_name or next(iter(known_names(recipe.base)), recipe.base)
    return replace(recipe, adapter=replace(recipe.adapter, base_name=base_name))


def adapter_folder(recipe: "Recipe") -> Path:
    """Return where the adapter's files go."""
    from quickchange_adapters.training.run import ADAPTER_FOLDER

    return recipe.output / ADAPTER_FOLDER


def _prepare(recipe: "Recipe") -> "Prepared":
    from quickchange_adapters.training.prepared import prepare

    _hush()
    prepared = prepare(recipe, base_folder(recipe), say)
    counts = [f"{len(prepared.train.rows)} rows to train on"]
    counts.append(f"{len(prepared.validation.rows)} to validate")
    if prepared.test is not None:
        counts.append(f"{len(prepared.test.rows)} to test")
    say(", ".join(counts))
    return prepared


def _hush() -> None:
    """Keep libraries from drawing bars of their own, and from warnings that no user can act on."""
    import logging as standard
    import warnings

    from transformers.utils import logging

    logging.disable_progress_bar()
    standard.getLogger("bitsandbytes").setLevel(standard.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    # Its kernel for one row has no gradient; it is only used where none is needed.
    warnings.filterwarnings("ignore", message="bitsandbytes::gemv_4bit")


def base_folder(recipe: "Recipe") -> Path:
    """Return the folder of the base: beside the recipe, built in, or from the Hub.

    Raises: CannotTrain; BaseUnavailable.
    """
    from quickchange_server.base_folder import resolve_base

    folder = recipe.file.parent / Path(recipe.base).expanduser()
    if folder.is_dir():
        return folder.resolve()
    if recipe.base.startswith((".", "/", "~")):
        raise CannotTrain(f"{recipe.file}: base: there is no folder {recipe.base!r} beside it")
    settings = load_config({"model": recipe.base})
    return resolve_base(settings.model, None, settings.cache_folder)


def _train(prepared: "Prepared", restart: bool, track: str | None, signals: "StopSignals") -> None:
    from quickchange_adapters.training.loss_plot import NAME as PLOT
    from quickchange_adapters.training.run import TrainingRun
    from quickchange_adapters.training.tracking import tracked, tracker_of

    with tracked(tracker_of(track, prepared.recipe, say)) as tracker:
        with _step_bar(tracker) as on_step:
            result = TrainingRun(prepared, say, on_step, signals).run(restart)
        if result.is_new:
            _say_result(result)
        log = draw_losses(prepared.recipe.output)
        files = [log, log.with_name(PLOT), *sorted(result.adapter_folder.iterdir())]
        if result.is_new or tracker.is_begun:
            tracker.finish(_figures(result), files)
        elif track is not None:
            say(f"nothing new was trained, so {track} is told nothing; --restart trains and logs")


def _say_result(result: "RunResult") -> None:
    say(
        f"best validation loss {result.best_loss:.4f} at step {result.best_step} of "
        f"{result.steps}; {result.seconds:.0f} s"
    )
    say(f"written: {result.adapter_folder} ({result.adapter_bytes / 1e6:.2f} MB)")


def _figures(result: "RunResult") -> dict[str, float]:
    return {
        "best_validation_loss": result.best_loss,
        "best_step": float(result.best_step),
        "trainable_parameters": float(result.parameters.trainable),
    }


def draw_losses(folder: Path) -> Path:
    """Draw what a run's log holds, if that can be done here; return the log."""
    from quickchange_adapters.training import loss_plot, run_log

    log, picture = folder / run_log.NAME, folder / loss_plot.NAME
    try:
        loss_plot.write_loss_plot(run_log.read_log(log), picture)
    except ImportError:
        say(f'no {picture.name}: it needs matplotlib; pip install "quickchange-server[train]"')
    else:
        say(f"written: {log.name}, {picture.name}")
    return log


def _evaluate(prepared: "Prepared") -> None:
    from quickchange_adapters.training.evaluation import evaluate
    from quickchange_adapters.training.evaluation_page import NAME, evaluation_page

    folder = adapter_folder(prepared.recipe)
    try:
        found = evaluate(prepared, folder, row_bar)
    except KeyboardInterrupt:
        say(f"stopped; {folder} is whole, and --evaluate-only writes {NAME} for it")
        raise
    page = evaluation_page(prepared.recipe, found)
    file = prepared.recipe.output / NAME
    file.write_text(page, encoding="utf-8")
    say(page.split("\n\n")[2].replace("**", ""))
    say(f"written: {file}")


def row_bar(title: str, num_rows: int) -> Any:
    """Return what shows how many rows were answered."""
    from tqdm import tqdm

    is_seen = sys.stderr.isatty()
    if not is_seen:
        say(f"asking {title}: {num_rows} rows")
    bar = tqdm(total=num_rows, desc=f"asking {title}", unit="row", disable=not is_seen)

    def advance(num_done: int) -> None:
        bar.update(num_done)
        if bar.n >= num_rows:
            bar.close()

    return advance


@contextmanager
def _step_bar(tracker: "Tracker") -> Iterator[Any]:
    """Give what shows each step: a bar for people, else a line at each look at validation."""
    from tqdm import tqdm

    bar: Any = tqdm(unit="step", disable=not sys.stderr.isatty())

    def show(step: int, num_steps: int, values: dict[str, Any]) -> None:
        tracker.log(step, values)
        bar.total = num_steps
        bar.update(step - bar.n)
        shown = {key: values[key] for key in ("loss", "validation_loss") if key in values}
        bar.set_postfix(shown)
        if bar.disable and "validation_loss" in values:
            say(f"step {step} of {num_steps}: " + ", ".join(f"{k} {v}" for k, v in shown.items()))

    with bar:
        yield show
