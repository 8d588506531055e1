"""What every command shares: the options for server and output, a client, and how errors end it."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Annotated, Any

import typer

from quickchange_client.cli.output import print_problems, without_controls
from quickchange_client.client import Quickchange
from quickchange_client.errors import (
    ApiError,
    ArgumentInvalid,
    FolderInvalid,
    InvalidApiKey,
    QuickchangeError,
)
from quickchange_client.settings import API_KEY_VARIABLE, DEFAULT_URL, URL_VARIABLE

UrlOption = Annotated[
    str | None,
    typer.Option(
        "--url",
        metavar="URL",
        envvar=URL_VARIABLE,
        show_default=DEFAULT_URL,
        help="The server's address.",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON, for machines.")]


@contextmanager
def session(url: str | None, as_json: bool = False) -> Iterator[Quickchange]:
    """Give a client; end the command with a sentence and an exit code when it raises."""
    try:
        with Quickchange(url) as client:
            yield client
    except QuickchangeError as error:
        _report_as_json(error) if as_json else _report(error)
        is_usage = isinstance(error, ArgumentInvalid) and not isinstance(error, FolderInvalid)
        raise typer.Exit(2 if is_usage else 1) from error


def _report(error: QuickchangeError) -> None:
    say(f"error: {error}")
    if isinstance(error, ApiError) and error.problems:
        print_problems(error.problems, to_stderr=True)
    if isinstance(error, InvalidApiKey):
        say(f"give a key in the variable {API_KEY_VARIABLE}")


def _report_as_json(error: QuickchangeError) -> None:
    body: dict[str, Any] = {"message": str(error), "type": None, "param": None, "code": None}
    problems: list[dict[str, str]] = []
    if isinstance(error, ApiError):
        body |= {"type": error.type, "param": error.param, "code": error.code}
        body |= {"status": error.status, "request_id": error.request_id}
        problems = [asdict(problem) for problem in error.problems]
    print(json.dumps({"error": body, "problems": problems}), file=sys.stderr)


def say(sentence: str) -> None:
    """Print a sentence beside the output."""
    print(without_controls(sentence), file=sys.stderr, flush=True)
