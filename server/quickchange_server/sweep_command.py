"""The command `train sweep`: runs a study, and writes its table and picture."""

from pathlib import Path
from typing import Annotated

import typer

from quickchange_server.train_command import base_folder
from quickchange_server.train_exit import exit_on_error, say


def sweep(
    file: Annotated[Path, typer.Argument(metavar="SWEEP", help="A TOML file.")],
    output: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Where files go. Default: sweep/ beside SWEEP."),
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Only list the cells, and say what is wrong.")
    ] = False,
) -> None:
    """Train a recipe with some of its settings varied, and compare what comes out.

    SWEEP names a recipe, and the values to try: [grid] has lists of rank, targets,
    method, learning_rate, base_bits and seed, all of whose combinations are tried;
    each [[cell]] is one more; [set] changes the recipe for all of them. With
    evaluate = false the test rows are left aside, which saves their time.

    Writes results.jsonl, SWEEP.md and sweep.png. A cell that is done is not done
    again; one that was interrupted goes on.

    For example:

    quickchange train sweep study.toml --check

    quickchange train sweep study.toml
    """
    with exit_on_error():
        from quickchange_adapters.training.sweep import read_sweep

        study = read_sweep(file, output)
        if check:
            for cell in study.cells:
                typer.echo(cell.name)
            return
        from quickchange_adapters.training import sweep_page
        from quickchange_adapters.training.sweep_run import run_sweep

        try:
            results = run_sweep(study, base_folder(study.cells[0].recipe), say)
        except KeyboardInterrupt:
            say("stopped; the same command goes on from there")
            raise
        page = sweep_page.sweep_page(study.recipe_file.name, results)
        (study.output / sweep_page.TABLE).write_text(page, encoding="utf-8")
        typer.echo(page.split("\n\n")[2], nl=False)
        try:
            sweep_page.write_sweep_picture(results, study.output / sweep_page.PICTURE)
        except ImportError:
            say('no picture: it needs matplotlib; pip install "quickchange-server[train]"')
        say(f"written: {study.output}")
