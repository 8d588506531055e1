"""Commands about adapters: what is there, what its names mean, and where its bytes are."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, get_args

import typer

from quickchange_client.call import UploadOptions, Visibility
from quickchange_client.cli.adapter_reference import AdapterReference
from quickchange_client.cli.adapter_source import (
    AdapterSource,
    SourceArgument,
    adapter_source,
    tags_with,
)
from quickchange_client.cli.adapter_tables import (
    print_adapter,
    print_adapters,
    print_report,
    print_version,
)
from quickchange_client.cli.byte_progress import byte_progress
from quickchange_client.cli.output import format_bytes, print_json, print_problems
from quickchange_client.cli.session import JsonOption, UrlOption, say, session
from quickchange_client.client import Quickchange
from quickchange_client.errors import ArgumentInvalid, Forbidden

REFERENCE_HELP = "NAME, NAME:3, NAME@ALIAS or NAME@sha256:DIGEST."

NameArgument = Annotated[str, typer.Argument(metavar="NAME", help="The adapter's name.")]
ReferenceArgument = Annotated[str, typer.Argument(metavar="ADAPTER", help=REFERENCE_HELP)]


def push(
    source: SourceArgument,
    name: Annotated[str, typer.Option("--name", "-n", metavar="N", help="Name to serve it under.")],
    alias: Annotated[
        str | None, typer.Option("--alias", metavar="A", help="Point this alias at it.")
    ] = None,
    visibility: Annotated[
        str | None,
        typer.Option(
            "--visibility", metavar="public|private", help="Whether other tenants may use it."
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only have it checked.")] = False,
    allow_noop: Annotated[
        bool, typer.Option("--allow-noop", help="Accept an adapter that changes nothing.")
    ] = False,
    strict_base: Annotated[
        bool, typer.Option("--strict-base", help="Refuse one whose config names another base.")
    ] = False,
    url: UrlOption = None,
    as_json: JsonOption = False,
) -> None:
    """Upload an adapter and print the server's report on it.

    The first version of a name is live at once; a later one when an alias is
    moved to it. The same bytes under the same name: the version that is there.

    hf:ORG/NAME@REVISION is fetched from the Hugging Face Hub to this machine
    first (HF_ENDPOINT, HF_TOKEN), and its commit becomes a tag of the adapter.

    Examples:
        quickchange push ./my-adapter --name sentiment

        quickchange push ./my-adapter --name sentiment --alias default

        quickchange push ./my-adapter --name sentiment --visibility public

        quickchange push ./my-adapter --name sentiment --dry-run

        quickchange push hf:some-org/some-lora@main --name from-the-hub
    """
    checks = {"allow_noop": allow_noop, "strict_base": strict_base}
    with (
        session(url, as_json) as client,
        adapter_source(source, is_shown=not as_json) as found,
    ):
        seen_by = _visibility(visibility)
        if dry_run:
            check_folder(client, found.folder, name, checks, as_json)
        else:
            options = UploadOptions(name, alias, allow_noop, strict_base, seen_by)
            _upload(client, found, options, as_json)


def list_adapters(url: UrlOption = None, as_json: JsonOption = False) -> None:
    """List adapters with their versions, aliases, tiers, bytes and use.

    Tier, rank and bytes are those of what the bare name means. Requests and
    last use are those of the server that answers, since it started.

    Examples:
        quickchange list

        quickchange list --json
    """
    with session(url, as_json) as client:
        adapters = list(client.adapters.iterate())
    if as_json:
        print_json(adapters)
    elif adapters:
        print_adapters(adapters)
    else:
        say("no adapters yet; add one with: quickchange push DIR --name NAME")


def show(adapter: ReferenceArgument, url: UrlOption = None, as_json: JsonOption = False) -> None:
    """Show an adapter with all its versions, or one version with its report.

    Examples:
        quickchange show sentiment

        quickchange show sentiment:2

        quickchange show sentiment@default --json
    """
    with session(url, as_json) as client:
        reference = AdapterReference.resolve(client, adapter)
        if reference.version is None:
            found = client.adapters.get(reference.name)
            print_json(found) if as_json else print_adapter(found)
        else:
            version = client.adapters.get_version(reference.name, reference.version)
            print_json(version) if as_json else print_version(version)


def alias(
    name: NameArgument,
    alias: Annotated[str, typer.Argument(metavar="ALIAS", help="The alias.")],
    version: Annotated[
        int | None, typer.Argument(metavar="VERSION", min=1, help="The version it is to mean.")
    ] = None,
    delete: Annotated[bool, typer.Option("--delete", help="Remove the alias.")] = False,
    url: UrlOption = None,
    as_json: JsonOption = False,
) -> None:
    """Point an alias at a version, at once for all new requests; or remove it.

    The alias default is what the bare name means. See also: rollback.

    Examples:
        quickchange alias sentiment default 2

        quickchange alias sentiment canary 3

        quickchange alias sentiment canary --delete
    """
    with session(url, as_json) as client:
        if delete == (version is not None):
            raise ArgumentInvalid("give a VERSION to point the alias at, or --delete")
        if version is None:
            changed = client.adapters.delete_alias(name, alias)
        else:
            changed = client.adapters.set_alias(name, alias, version)
        print_json(changed) if as_json else print_adapter(changed)


def rollback(
    name: NameArgument,
    alias: Annotated[str, typer.Option("--alias", metavar="A", help="The alias.")] = "default",
    url: UrlOption = None,
    as_json: JsonOption = False,
) -> None:
    """Point an alias at the version that it meant before; a second time, back.

    Versions that were deleted or disabled since are passed over.

    Examples:
        quickchange rollback sentiment

        quickchange rollback sentiment --alias canary
    """
    with session(url, as_json) as client:
        changed = client.adapters.rollback(name, alias)
        print_json(changed) if as_json else print_adapter(changed)


def rm(
    adapter: ReferenceArgument,
    timeout_s: Annotated[
        float | None,
        typer.Option("--timeout", metavar="SECONDS", help="How long to wait for running requests."),
    ] = None,
    url: UrlOption = None,
    as_json: JsonOption = False,
) -> None:
    """Delete an adapter with all its versions, or one version.

    New requests do not find it from then on; running ones finish. A version
    that an alias points at is refused: move the alias first.

    Examples:
        quickchange rm sentiment:1

        quickchange rm sentiment
    """
    with session(url, as_json) as client:
        target = AdapterReference.resolve(client, adapter)
        deletion = client.adapters.delete(target.name, target.version, timeout_s=timeout_s)
    if as_json:
        print_json(deletion)
    elif deletion.deleted:
        freed = [f"{format_bytes(n)} {tier}" for tier, n in deletion.freed_bytes.items() if n]
        print(f"deleted {adapter}; freed {', '.join(freed) or 'nothing'}")
    else:
        print(f"{adapter} is closed to new requests and goes when the running ones have finished")


def check_folder(
    client: Quickchange, folder: Path, name: str, checks: dict[str, bool], as_json: bool
) -> None:
    """Have a folder checked and print the report. Raises: Exit(1) when it would be refused."""
    with byte_progress("uploading", "checking", is_shown=not as_json) as progress:
        report = client.adapters.dry_run(folder, name=name, progress=progress, **checks)
    if as_json:
        print_json(report)
    else:
        print_report(report)
        print_problems(report.problems) if report.problems else print("it can be served")
    if not report.ok:
        raise typer.Exit(1)


def _visibility(text: str | None) -> Visibility | None:
    known: dict[str | None, Visibility | None] = {each: each for each in get_args(Visibility)}
    if text is not None and text not in known:
        raise ArgumentInvalid(f"--visibility is {text!r}, but must be public or private")
    return known.get(text)


def _upload(
    client: Quickchange, source: AdapterSource, options: UploadOptions, as_json: bool
) -> None:
    name = options.name
    options = replace(options, tags=tags_with(client, name, source.tag))
    with byte_progress("uploading", "checking", is_shown=not as_json) as progress:
        version = client.adapters.upload(source.folder, progress=progress, **asdict(options))
    if as_json:
        print_json(version)
        return
    print_version(version)
    what = "uploaded" if version.meta.status == 201 else "these bytes were there already:"
    try:
        aliases = client.adapters.get(name).aliases
    except Forbidden:
        print(f"{what} {name}:{version.version}")  # the key may write and not read
        return
    meaning = sorted(alias for alias, number in aliases.items() if number == version.version)
    print(f"{what} {name}:{version.version}; aliases: {', '.join(meaning) or 'none'}")
    if "default" not in meaning:
        print(f"make {name!r} mean it with: quickchange alias {name} default {version.version}")
