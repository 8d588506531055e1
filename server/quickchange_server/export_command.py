"""The command `export`: an adapter merged into its base, as a folder for any other program.

What it needs is imported when it runs, so that other commands begin as fast as before.
"""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from quickchange_server.config import OPTIONS, load_config
from quickchange_server.errors import CannotStart, QuickchangeError

DEFAULT_URL = "http://127.0.0.1:8000"
Advance = Callable[[int, int], None]


def export(
    adapter: Annotated[
        str,
        typer.Argument(
            metavar="ADAPTER",
            help="NAME, NAME:3 or NAME@ALIAS of a running server, or a folder that PEFT wrote.",
        ),
    ],
    merged: Annotated[
        Path,
        typer.Option("--merged", metavar="OUT", help="The folder to make.", show_default=False),
    ],
    model: Annotated[
        str | None, typer.Option(metavar=OPTIONS["model"].metavar, help=OPTIONS["model"].help)
    ] = None,
    revision: Annotated[str | None, typer.Option(help=OPTIONS["revision"].help)] = None,
    dtype: Annotated[
        str | None, typer.Option(metavar=OPTIONS["dtype"].metavar, help=OPTIONS["dtype"].help)
    ] = None,
    url: Annotated[
        str,
        typer.Option(envvar="QUICKCHANGE_URL", metavar="URL", help="The server that has ADAPTER."),
    ] = DEFAULT_URL,
    force: Annotated[
        bool, typer.Option("--force", help="Replace OUT, if it is a model's folder or empty.")
    ] = False,
    config: Annotated[
        str | None, typer.Option(metavar="FILE", help="TOML file with any of the settings.")
    ] = None,
) -> None:
    """Merge an adapter into its base, and write that as a Hugging Face folder.

    The folder holds safetensors, configs, tokenizer and generation config, and
    needs neither Quickchange nor PEFT any more. The sum is computed in float32
    from the base's own files, and rounded once; a server's --quantize does not
    touch it. OUT is there when all of it is. A key is read from
    QUICKCHANGE_API_KEY.

    For example:

    quickchange export sentiment --merged ./sentiment-model

    quickchange export legal:3 --merged ./legal --model /models/llama --force

    quickchange export ./my-adapter --merged ./my-model --dtype float32
    """
    given = {"model": model, "revision": revision, "dtype": dtype, "config": config}
    try:
        settings = load_config(given)
        _check(merged, force)
        from quickchange_server.base_folder import resolve_base

        base = resolve_base(settings.model, settings.revision, settings.cache_folder)
        _export(adapter, url, base, settings.dtype, merged, is_forced=force)
    except QuickchangeError as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(error.exit_code if isinstance(error, CannotStart) else 1) from error
    except KeyboardInterrupt:
        print("stopped; nothing was left", file=sys.stderr)
        raise typer.Exit(130) from None


def _check(folder: Path, is_forced: bool) -> None:
    from quickchange_server.new_folder import check_target

    check_target(folder, is_forced=is_forced)


def _export(
    adapter: str, url: str, base: Path, dtype: str, folder: Path, *, is_forced: bool
) -> None:
    from transformers.utils.logging import disable_progress_bar

    from quickchange_server.adapter_source import adapter_files
    from quickchange_server.merged_folder import write_folder
    from quickchange_server.merged_model import load_model, merge_into, read_adapter

    disable_progress_bar()
    with adapter_files(adapter, url, os.environ.get("QUICKCHANGE_API_KEY")) as files:
        model = load_model(base, dtype)
        weights = read_adapter(files, model)
        with _progress("Merging") as advance:
            merge_into(model, weights, advance)
        with _progress("Writing") as advance:
            num_bytes = write_folder(model, base, folder, files.task, advance, is_forced=is_forced)
    print(f"{files.name} merged into {base.name}: {folder}, {num_bytes / 2**20:.1f} MiB")


@contextmanager
def _progress(label: str) -> Iterator[Advance]:
    """Give what draws a bar on stderr, when somebody looks at it."""
    if not sys.stderr.isatty():
        yield lambda done, total: None
        return
    with typer.progressbar(length=1000, label=label, file=sys.stderr) as bar:
        yield lambda done, total: bar.update(1000 * done // max(total, 1) - bar.pos)
