"""The command line of the server. Knows how settings look, not what they do.

The options of `serve` are made from the settings in config.py, so that a flag, a variable and a
TOML key cannot drift apart. Nothing heavy is imported before a command runs.
"""

import inspect
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Annotated, Any

import typer

from quickchange_server.config import OPTIONS, load_config, unknown_variables
from quickchange_server.early_signal import end_at_sigterm
from quickchange_server.errors import CannotStart, ConfigInvalid, QuickchangeError
from quickchange_server.export_command import export
from quickchange_server.fsck_command import fsck
from quickchange_server.option import Option
from quickchange_server.train_app import app as train
from quickchange_server.vllm_flags import VLLM_FLAGS, VllmFlag, translate, unread_variables

app = typer.Typer(
    name="quickchange-server",
    help="Serve one resident base model and many LoRA adapters.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
base = typer.Typer(help="The base model that adapters are trained for.", no_args_is_help=True)
app.add_typer(base, name="base")

AsJson = Annotated[bool | None, typer.Option("--json", help="Print the findings as JSON.")]
ConfigFile = Annotated[
    str | None, typer.Option("--config", metavar="FILE", help="TOML file with any of the settings.")
]


def serve(**flags: Any) -> None:
    """Serve a base model and its adapters over HTTP.

    Every option, such as --max-queue, can also be given as a variable
    (QUICKCHANGE_MAX_QUEUE), or as a key (max_queue) in the file that --config
    names. Options win over variables, and variables over the file.

    For example:

    quickchange serve --adapter sentiment=adapters/examples/sentiment/adapter

    quickchange serve --model /models/llama --kv-cache-bytes 2GiB --port 8001

    QUICKCHANGE_MAX_QUEUE=64 quickchange serve --config serve.toml
    """
    end_at_sigterm()
    with _exit_on_error():
        meant, notes = translate(_with_bare_modules(flags))
        config = load_config(meant)
        for sentence in (*unknown_variables(), *unread_variables(os.environ), *notes):
            _say(f"warning: {sentence}")
        from quickchange_server.startup_keys import open_keyring

        keyring = open_keyring(config)
        from quickchange_server.thread_affinity import prepare_threads

        prepare_threads()
        from quickchange_server.base_folder import resolve_base

        base_folder = resolve_base(config.model, config.revision, config.cache_folder)
        from quickchange_server.serving import DRAINED_EXIT_S, bound_exit, run_server

        run_server(config, base_folder, keyring, partial(bound_exit, DRAINED_EXIT_S))
        bound_exit()


def doctor(as_json: bool | None = None, **flags: Any) -> None:
    """Show what a server with these settings would see: versions, device, memory, base, store.

    Takes the settings of `serve`, from the same places, and changes nothing. Its
    output is what a bug report needs; passwords in addresses are left out.

    Exit codes: 0 nothing would keep a server from serving; 1 something would.

    For example:

    quickchange doctor

    quickchange doctor --model /models/llama --device cuda --json
    """
    with _exit_on_error():
        meant, _ = translate(_with_bare_modules(flags))
        config = load_config(meant)
        from quickchange_server.doctor_command import run

        if run(config, is_json=bool(as_json)):
            raise typer.Exit(1)


@base.callback()
def base_commands() -> None:
    """Keep `path` a word of its own, although it is the only command yet."""


@base.command("path")
def base_path(
    model: Annotated[
        str | None, typer.Option("--model", metavar=OPTIONS["model"].metavar, help="The base.")
    ] = None,
    revision: Annotated[
        str | None, typer.Option("--revision", help=OPTIONS["revision"].help)
    ] = None,
    config: ConfigFile = None,
) -> None:
    """Print the folder of the base, to train adapters against. Fetches it if need be.

    For example:

    quickchange base path --model builtin:smollm2-135m
    """
    with _exit_on_error():
        settings = load_config({"model": model, "revision": revision, "config": config})
        from quickchange_server.base_folder import resolve_base

        typer.echo(resolve_base(settings.model, settings.revision, settings.cache_folder))


def main() -> None:
    """Run `quickchange-server`."""
    app()


@contextmanager
def _exit_on_error() -> Iterator[None]:
    """Print what a user can cause as one sentence, and exit with 1, or 2 for a wrong setting."""
    try:
        yield
    except QuickchangeError as error:
        _say(f"error: {error}")
        raise typer.Exit(error.exit_code if isinstance(error, CannotStart) else 1) from error
    except KeyboardInterrupt:
        _say("stopped")
        raise typer.Exit(130) from None


def _say(sentence: str) -> None:
    print(sentence, file=sys.stderr, flush=True)


def _with_bare_modules(flags: dict[str, Any]) -> dict[str, Any]:
    """Accept vLLM's `--lora-modules a=x b=y`, whose second pair arrives as an argument."""
    bare = flags.pop("bare_modules", None)
    if not bare:
        return flags
    if not flags["lora_modules"]:
        raise ConfigInvalid(f"unexpected argument {bare[0]!r}; see `quickchange serve --help`")
    return flags | {"lora_modules": [*flags["lora_modules"], *bare]}


def _serve_parameters() -> Iterator[inspect.Parameter]:
    """Yield one keyword parameter for each setting, so that typer shows and reads it."""
    yield _parameter("config", ConfigFile)
    for each in OPTIONS.values():
        yield _parameter(each.name, _annotation(each))
    for vllm_flag in VLLM_FLAGS:
        yield _parameter(vllm_flag.name, _vllm_annotation(vllm_flag))
    modules = typer.Argument(hidden=True, metavar="NAME=FOLDER")
    yield _parameter("bare_modules", Annotated[list[str] | None, modules])


def _parameter(name: str, annotation: Any) -> inspect.Parameter:
    kind = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(name, kind, default=None, annotation=annotation)


def _annotation(each: Option) -> Any:
    flag = f"{each.flag}/--no-{each.flag[2:]}" if each.kind == "switch" else each.flag
    shape = {"text": str | None, "switch": bool | None, "list": list[str] | None}[each.kind]
    metavar = None if each.kind == "switch" else each.metavar
    help, panel = each.help_with_default, each.group
    return Annotated[shape, typer.Option(flag, metavar=metavar, help=help, rich_help_panel=panel)]


def _vllm_annotation(each: VllmFlag) -> Any:
    """Return a flag that is read and not shown: --help is about our own."""
    spelling = f"{each.flag}/--no-{each.flag[2:]}" if each.is_switch else each.flag
    shape = bool | None if each.is_switch else str | None
    return Annotated[shape, typer.Option(spelling, hidden=True)]


serve.__signature__ = inspect.Signature(list(_serve_parameters()))  # type: ignore[attr-defined]
doctor.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
    [_parameter("as_json", AsJson), *_serve_parameters()]
)
app.command("serve")(serve)
app.command("doctor")(doctor)
app.command("fsck")(fsck)
app.command("export")(export)
app.add_typer(train, name="train", help="Train adapters, and compare settings.")

if __name__ == "__main__":
    main()
