"""`quickchange train RECIPE` and `quickchange train sweep SWEEP`: one word, two commands."""

from typing import Any

import typer
from typer.core import TyperGroup

from quickchange_server.sweep_command import sweep
from quickchange_server.train_command import train

FOLLOW = "recipe"


class _RecipeByDefault(TyperGroup):
    """A group where whatever is no command is the argument of one of them."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put the default command before arguments that name none."""
        is_named = bool(args) and args[0] in self.commands
        return super().parse_args(ctx, args if is_named else [FOLLOW, *(args or ["--help"])])


app = typer.Typer(cls=_RecipeByDefault, add_completion=False, pretty_exceptions_enable=False)
app.command(FOLLOW)(train)
app.command("sweep")(sweep)
