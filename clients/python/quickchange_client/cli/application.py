"""The table of commands. Knows which there are, not what they do."""

import importlib.metadata
from typing import Annotated

import typer

from quickchange_client.cli import (
    action_commands,
    adapter_commands,
    bench_command,
    compare_command,
    folder_commands,
    generate_command,
    key_commands,
    memory_command,
    prune_command,
)
from quickchange_client.cli.plugins import add_plugins

ADAPTERS = "Adapters"
SERVER = "Server"

app = typer.Typer(
    name="quickchange",
    help=(
        "Talk to a Quickchange server: one base model, many LoRA adapters.\n\n"
        "The server's address is --url or QUICKCHANGE_URL (default: http://127.0.0.1:8000); "
        "a key is read from QUICKCHANGE_API_KEY. Exit codes: 0 done, 1 refused or failed, "
        "2 wrong usage."
    ),
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

app.command("generate")(generate_command.generate)
app.command("push", rich_help_panel=ADAPTERS)(adapter_commands.push)
app.command("validate", rich_help_panel=ADAPTERS)(folder_commands.validate)
app.command("list", rich_help_panel=ADAPTERS)(adapter_commands.list_adapters)
app.command("show", rich_help_panel=ADAPTERS)(adapter_commands.show)
app.command("pull", rich_help_panel=ADAPTERS)(folder_commands.pull)
app.command("alias", rich_help_panel=ADAPTERS)(adapter_commands.alias)
app.command("rollback", rich_help_panel=ADAPTERS)(adapter_commands.rollback)
app.command("compare", rich_help_panel=ADAPTERS)(compare_command.compare)
app.command("prune", rich_help_panel=ADAPTERS)(prune_command.prune)
app.command("rm", rich_help_panel=ADAPTERS)(adapter_commands.rm)
app.command("load", rich_help_panel=ADAPTERS)(action_commands.load)
app.command("unload", rich_help_panel=ADAPTERS)(action_commands.unload)
app.command("pin", rich_help_panel=ADAPTERS)(action_commands.pin)
app.command("unpin", rich_help_panel=ADAPTERS)(action_commands.unpin)
app.command("merge", rich_help_panel=ADAPTERS)(action_commands.merge)
app.command("unmerge", rich_help_panel=ADAPTERS)(action_commands.unmerge)
app.command("disable", rich_help_panel=ADAPTERS)(action_commands.disable)
app.command("enable", rich_help_panel=ADAPTERS)(action_commands.enable)
app.command("memory", rich_help_panel=SERVER)(memory_command.memory)
app.command("bench", rich_help_panel=SERVER)(bench_command.bench)
app.add_typer(key_commands.app, rich_help_panel=SERVER)
add_plugins(app, rich_help_panel=SERVER)


def _print_version(is_asked: bool) -> None:
    if is_asked:
        typer.echo(importlib.metadata.version("quickchange-client"))
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", is_eager=True, callback=_print_version, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """Take the options that stand before a command."""


def main() -> None:
    """Run `quickchange`."""
    app()
