"""Commands between an adapter's folder and the server: have it checked, and get it back."""

from pathlib import Path
from typing import Annotated

import typer

from quickchange_client.cli.adapter_commands import ReferenceArgument, check_folder
from quickchange_client.cli.adapter_reference import AdapterReference
from quickchange_client.cli.adapter_source import SourceArgument, adapter_source
from quickchange_client.cli.byte_progress import byte_progress
from quickchange_client.cli.output import format_bytes, print_json
from quickchange_client.cli.session import JsonOption, UrlOption, session
from quickchange_client.client import Quickchange
from quickchange_client.errors import ArgumentInvalid

NAME_OF_NOBODY = "to-be-named"
"""A dry run needs a name; this one stands for all that are still free."""


def validate(
    source: SourceArgument,
    name: Annotated[
        str, typer.Option("--name", "-n", metavar="N", help="Also ask whether it may be called so.")
    ] = NAME_OF_NOBODY,
    allow_noop: Annotated[
        bool, typer.Option("--allow-noop", help="Accept an adapter that changes nothing.")
    ] = False,
    strict_base: Annotated[
        bool, typer.Option("--strict-base", help="Refuse one whose config names another base.")
    ] = False,
    url: UrlOption = None,
    as_json: JsonOption = False,
) -> None:
    """Have the server check an adapter, with its task.json, and keep nothing.

    All problems are listed. Exit code 0: it can be served; 1: it would be refused.

    Examples:
        quickchange validate ./my-adapter

        quickchange validate ./my-adapter --name sentiment --json

        quickchange validate hf:some-org/some-lora@v1.0
    """
    checks = {"allow_noop": allow_noop, "strict_base": strict_base}
    with (
        session(url, as_json) as client,
        adapter_source(source, is_shown=not as_json) as found,
    ):
        check_folder(client, found.folder, name, checks, as_json)


def pull(
    adapter: ReferenceArgument,
    folder: Annotated[
        Path | None,
        typer.Argument(metavar="DIR", help="A new or empty folder; default: the adapter's name."),
    ] = None,
    url: UrlOption = None,
    as_json: JsonOption = False,
) -> None:
    """Download a version's files, byte for byte as they were uploaded.

    They are compared with the version's digest; the folder is there when all of
    them are. A bare name means its alias default.

    Examples:
        quickchange pull sentiment

        quickchange pull sentiment:2 ./old

        quickchange pull sentiment@canary ./canary --json
    """
    with session(url, as_json) as client:
        reference = AdapterReference.resolve(client, adapter)
        number = reference.version or _default_version(client, reference.name)
        target = folder or Path(reference.name)
        with byte_progress("downloading", is_shown=not as_json) as progress:
            version = client.adapters.download(reference.name, number, target, progress=progress)
    if as_json:
        print_json(version)
    else:
        size = format_bytes(version.bytes.file)
        print(f"{version.name}:{version.version} ({size}) is in {target}")


def _default_version(client: Quickchange, name: str) -> int:
    number = client.adapters.get(name).aliases.get("default")
    if number is None:
        raise ArgumentInvalid(f"{name!r} has no alias default; say which version, as {name}:1")
    return number
