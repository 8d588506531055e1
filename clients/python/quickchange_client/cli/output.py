"""How values look on a terminal. What the server sends never reaches it with control characters."""

import json
import sys
import time
from collections.abc import Iterable, Sequence
from typing import Any

from pydantic import BaseModel
from rich.console import Console
from rich.table import Table
from rich.text import Text

from quickchange_client.errors import Problem

WIDTH_WITHOUT_TERMINAL = 160
MAX_PROBLEMS = 10
_CONTROLS = {code: "\ufffd" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


def without_controls(text: str) -> str:
    """Return text that cannot steer a terminal: escape codes show as replacement characters."""
    return text.translate(_CONTROLS)


def print_json(value: BaseModel | Sequence[BaseModel]) -> None:
    """Print what the server sent, no more and no less, as indented JSON."""
    print_json_value(
        _sent(value) if isinstance(value, BaseModel) else [_sent(each) for each in value]
    )


def print_json_value(value: Any) -> None:
    """Print a value as indented JSON."""
    print(json.dumps(value, indent=2, ensure_ascii=False))


def print_table(
    headings: Sequence[str],
    rows: Iterable[Sequence[object]],
    *,
    to_stderr: bool = False,
    is_spaced: bool = False,
) -> None:
    """Print rows under headings; a heading that begins with `>` is for a column of numbers.

    `is_spaced`: an empty line between rows, for cells of several lines.
    """
    table = Table(box=None, pad_edge=False, header_style="bold", leading=int(is_spaced))
    for heading in headings:
        is_number = heading.startswith(">")
        table.add_column(heading.lstrip(">"), justify="right" if is_number else "left")
    for row in rows:
        table.add_row(*(Text(without_controls(str(cell))) for cell in row))
    _console(to_stderr).print(table)


def print_pairs(pairs: Iterable[tuple[str, object]]) -> None:
    """Print names and values in two columns; None is left out."""
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="bold")
    table.add_column()
    for name, value in pairs:
        if value is not None:
            table.add_row(name, Text(without_controls(str(value))))
    _console(False).print(table)


def print_problems(problems: Sequence[Problem], *, to_stderr: bool = False) -> None:
    """Print why an upload is refused, a row for each reason, the first few of many."""
    shown = problems[:MAX_PROBLEMS]
    rows = [(each.code, _what(each), each.hint) for each in shown]
    print_table(("PROBLEM", "WHAT", "WHAT TO DO"), rows, to_stderr=to_stderr)
    if len(problems) > len(shown):
        more = f"and {len(problems) - len(shown)} more; --json shows all"
        print(more, file=sys.stderr if to_stderr else sys.stdout)


def _what(problem: Problem) -> str:
    """Return the message, with the place before it unless it names that itself."""
    if not problem.where or problem.where in problem.message:
        return problem.message
    return f"{problem.where}: {problem.message}"


def format_bytes(num_bytes: int) -> str:
    """Return bytes as people read them, and as the server's own flags take them: `1.5 MiB`."""
    value = float(num_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def format_time(seconds_since_1970: int | None) -> str:
    """Return a time in the reader's own zone; `-` for never."""
    if seconds_since_1970 is None:
        return "-"
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds_since_1970))


def _sent(value: BaseModel) -> dict[str, Any]:
    return value.model_dump(mode="json", exclude_unset=True)


def _console(to_stderr: bool) -> Console:
    console = Console(stderr=to_stderr)
    if not console.is_terminal:
        console.width = max(console.width, WIDTH_WITHOUT_TERMINAL)
    return console
