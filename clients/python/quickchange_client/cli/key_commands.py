"""The commands `keys create`, `keys list` and `keys revoke`."""

from typing import Annotated, get_args

import typer

from quickchange_client.api_key import ApiKey, Scope
from quickchange_client.cli.output import format_time, print_json, print_table
from quickchange_client.cli.session import JsonOption, UrlOption, say, session
from quickchange_client.errors import ArgumentInvalid

SCOPES: tuple[Scope, ...] = get_args(Scope)

app = typer.Typer(
    name="keys", help="Make, list and revoke API keys; needs an admin key.", no_args_is_help=True
)


@app.command()
def create(
    name: Annotated[str, typer.Option("--name", metavar="TEXT", help="Who it is for.")] = "",
    scope: Annotated[
        list[str] | None,
        typer.Option(
            "--scope",
            metavar="SCOPE",
            help=f"What it may do: {', '.join(SCOPES)}; may be repeated. Default: generate.",
        ),
    ] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            "--adapter", metavar="NAME", help="Limit it to this adapter; may be repeated."
        ),
    ] = None,
    tenant: Annotated[
        str | None, typer.Option("--tenant", metavar="NAME", help="Whose it is. Default: yours.")
    ] = None,
    url: UrlOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make an API key and print it: this once, and nothing else on standard output.

    Examples:
        quickchange keys create --name "web shop"

        quickchange keys create --scope adapters:write --scope adapters:read

        quickchange keys create --adapter sentiment --tenant acme --json
    """
    with session(url, as_json) as client:
        key = client.keys.create(
            name=name, scopes=_scopes(scope), adapters=adapter or None, tenant=tenant
        )
    if as_json:
        print_json(key)
        return
    say(f"made {key.id} of the tenant {key.tenant}: {', '.join(key.scopes)}")
    say("this is the key; nobody can show it again:")
    print(key.secret)


@app.command("list")
def list_keys(
    include_revoked: Annotated[
        bool, typer.Option("--include-revoked", help="Also those that are no longer good.")
    ] = False,
    url: UrlOption = None,
    as_json: JsonOption = False,
) -> None:
    """List API keys, oldest first, without what their owners send.

    Examples:
        quickchange keys list

        quickchange keys list --include-revoked --json
    """
    with session(url, as_json) as client:
        keys = list(client.keys.iterate(include_revoked=include_revoked))
    if as_json:
        print_json(keys)
    elif keys:
        headings = ("ID", "NAME", "TENANT", "SCOPES", "ADAPTERS", "CREATED", "REVOKED")
        print_table(headings, map(_row, keys))
    else:
        say("no keys in the catalog; make one with: quickchange keys create")


@app.command()
def revoke(
    key_id: Annotated[
        str, typer.Argument(metavar="ID", help="The key's id, as `keys list` shows.")
    ],
    url: UrlOption = None,
    as_json: JsonOption = False,
) -> None:
    """Revoke an API key: nobody gets in with it from then on.

    Examples:
        quickchange keys revoke 0f3c9a51d27be840
    """
    with session(url, as_json) as client:
        key = client.keys.revoke(key_id)
    print_json(key) if as_json else print(f"revoked {key.id} {key.name}".rstrip())


def _scopes(given: list[str] | None) -> list[Scope]:
    """Return the scopes; a key as a whole may be pasted, so an unknown word is not repeated."""
    if not given:
        return ["generate"]
    known: list[Scope] = [scope for scope in SCOPES if scope in given]
    if len(known) < len(set(given)):
        raise ArgumentInvalid(f"--scope takes one of {', '.join(SCOPES)}")
    return known


def _row(key: ApiKey) -> tuple[object, ...]:
    adapters = "all" if key.adapters is None else ", ".join(key.adapters)
    times = (key.created_at, key.revoked_at)
    return (key.id, key.name, key.tenant, ", ".join(key.scopes), adapters, *map(format_time, times))
