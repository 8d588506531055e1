"""Commands that other distributions add, under the entry-point group `quickchange.commands`.

An entry point is a function that typer can read, or a `typer.Typer`. It is imported only when its
command runs, so that what the server needs never slows the client down.
"""

import sys
from importlib.metadata import EntryPoint, entry_points
from typing import Any, NoReturn

import typer

GROUP = "quickchange.commands"
SERVER_DISTRIBUTION = "quickchange-server"

# Words go to the command as they are; even --help is its own to answer.
PASS_THROUGH: dict[str, Any] = {
    "allow_extra_args": True,
    "ignore_unknown_options": True,
    "help_option_names": [],
}


def add_plugins(app: typer.Typer, *, rich_help_panel: str) -> None:
    """Add a command for each entry point, without importing any."""
    taken = {command.name for command in app.registered_commands}
    found = {point.name: point for point in entry_points(group=GROUP) if point.name not in taken}
    for name, point in sorted(found.items()):
        _add(app, name, f"Provided by {_provider(point)}.", rich_help_panel, point)
    if "serve" not in found:
        _add(app, "serve", f"Needs {SERVER_DISTRIBUTION}.", rich_help_panel, None)


def _add(
    app: typer.Typer, name: str, help: str, rich_help_panel: str, point: EntryPoint | None
) -> None:
    def forward(context: typer.Context) -> None:
        if point is None:
            _say_how_to_get(name)
        else:
            _load(point)(list(context.args), prog_name=f"quickchange {name}")

    app.command(
        name,
        help=help,
        rich_help_panel=rich_help_panel,
        context_settings=PASS_THROUGH,
        add_help_option=False,
    )(forward)


def _load(point: EntryPoint) -> typer.Typer:
    try:
        target = point.load()
    except ImportError as error:
        _exit(f"`{point.name}` of {_provider(point)} cannot be loaded: {error}")
    if isinstance(target, typer.Typer):
        return target
    app = typer.Typer(add_completion=False)
    app.command()(target)
    return app


def _provider(point: EntryPoint) -> str:
    return point.dist.name if point.dist is not None else point.module.partition(".")[0]


def _say_how_to_get(name: str) -> None:
    _exit(
        f"`quickchange {name}` is part of {SERVER_DISTRIBUTION}, which is not installed here; "
        f"get it with: pip install {SERVER_DISTRIBUTION}"
    )


def _exit(sentence: str) -> NoReturn:
    print(f"error: {sentence}", file=sys.stderr)
    raise typer.Exit(1)
