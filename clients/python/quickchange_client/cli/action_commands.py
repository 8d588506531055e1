"""Commands about versions: where their bytes are, and what they are to be."""

from typing import Annotated, Any, get_args

import typer

from quickchange_client.call import LoadTier
from quickchange_client.cli.adapter_reference import AdapterReference
from quickchange_client.cli.adapter_tables import print_action
from quickchange_client.cli.output import print_json
from quickchange_client.cli.session import JsonOption, UrlOption, session
from quickchange_client.errors import ArgumentInvalid

REFERENCE_HELP = "NAME, NAME:3, NAME@ALIAS or NAME@sha256:DIGEST."
TIERS: tuple[LoadTier, ...] = get_args(LoadTier)
HERE_HELP = "Only on the server that answers, until it stops; others are not told."

ReferenceArgument = Annotated[str, typer.Argument(metavar="ADAPTER", help=REFERENCE_HELP)]
HereOption = Annotated[bool, typer.Option("--here", help=HERE_HELP)]


def load(
    adapter: ReferenceArgument,
    tier: Annotated[
        str | None,
        typer.Option("--tier", metavar="host|device", help="How far. Default: host memory."),
    ] = None,
    url: UrlOption = None,
    as_json: JsonOption = False,
) -> None:
    """Bring an adapter into memory before the first request needs it.

    Examples:
        quickchange load sentiment

        quickchange load sentiment:2 --tier device
    """
    with session(url, as_json) as client:
        if tier not in (None, *TIERS):
            raise ArgumentInvalid(f"--tier is {tier!r}, but must be {' or '.join(TIERS)}")
        target = AdapterReference.resolve(client, adapter)
        wanted: LoadTier | None = next((each for each in TIERS if each == tier), None)
        action = client.adapters.load(target.name, target.version, tier=wanted)
    print_json(action) if as_json else print_action(action)


def unload(adapter: ReferenceArgument, url: UrlOption = None, as_json: JsonOption = False) -> None:
    """Give an adapter's memory back; the next request loads it again.

    Examples:
        quickchange unload sentiment
    """
    _act("unload", adapter, url, as_json)


def pin(
    adapter: ReferenceArgument,
    here: HereOption = False,
    url: UrlOption = None,
    as_json: JsonOption = False,
) -> None:
    """Load an adapter now and keep it loaded, whoever else needs room.

    Every server on the catalog does so, also after a restart.

    Examples:
        quickchange pin sentiment

        quickchange pin sentiment:2 --here
    """
    _act("pin", adapter, url, as_json, here_only=here)


def unpin(
    adapter: ReferenceArgument,
    here: HereOption = False,
    url: UrlOption = None,
    as_json: JsonOption = False,
) -> None:
    """Let an adapter go like any other when room is needed.

    Examples:
        quickchange unpin sentiment
    """
    _act("unpin", adapter, url, as_json, here_only=here)


def merge(
    adapter: ReferenceArgument,
    here: HereOption = False,
    url: UrlOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make a merged copy of the weights for an adapter, beside the base.

    Steps that serve only this adapter then run at the base's speed. Every
    server on the catalog does so, also after a restart.

    Examples:
        quickchange merge sentiment

        quickchange merge sentiment:2 --json
    """
    _act("merge", adapter, url, as_json, here_only=here)


def unmerge(
    adapter: ReferenceArgument,
    here: HereOption = False,
    url: UrlOption = None,
    as_json: JsonOption = False,
) -> None:
    """Drop an adapter's merged copy and give its memory back.

    Examples:
        quickchange unmerge sentiment
    """
    _act("unmerge", adapter, url, as_json, here_only=here)


def disable(
    adapter: ReferenceArgument,
    here: HereOption = False,
    url: UrlOption = None,
    as_json: JsonOption = False,
) -> None:
    """Take a version out of service: new requests do not find it.

    Running requests finish, the files stay, and nothing else is forgotten.

    Examples:
        quickchange disable sentiment:2

        quickchange disable sentiment
    """
    _act("disable", adapter, url, as_json, here_only=here)


def enable(
    adapter: ReferenceArgument,
    here: HereOption = False,
    url: UrlOption = None,
    as_json: JsonOption = False,
) -> None:
    """Put a version back into service.

    Examples:
        quickchange enable sentiment:2
    """
    _act("enable", adapter, url, as_json, here_only=here)


def _act(verb: str, adapter: str, url: str | None, as_json: bool, **options: Any) -> None:
    with session(url, as_json) as client:
        target = AdapterReference.resolve(client, adapter)
        action = getattr(client.adapters, verb)(target.name, target.version, **options)
    print_json(action) if as_json else print_action(action)
