"""Where an adapter that is to be sent comes from: a folder, or the Hub."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from quickchange_client.cli.byte_progress import byte_progress
from quickchange_client.client import Quickchange
from quickchange_client.errors import ArgumentInvalid, Forbidden, NotFound
from quickchange_client.hub import COMMIT_CHARS, PREFIX, Hub, HubSource
from quickchange_client.settings import HubSettings

MAX_TAGS = 32
SOURCE_HELP = "What save_pretrained() of a PEFT model wrote, or hf:ORG/NAME@REVISION."

SourceArgument = Annotated[str, typer.Argument(metavar="DIR", help=SOURCE_HELP)]


@dataclass(frozen=True, slots=True)
class AdapterSource:
    """A folder on this machine; `tag` says which commit of the Hub it is, if it is one."""

    folder: Path
    tag: str | None = None


@contextmanager
def adapter_source(text: str, *, is_shown: bool) -> Iterator[AdapterSource]:
    """Give the folder that is meant; what comes from the Hub is there until the block ends.

    Raises: ArgumentInvalid, HubFetchFailed.
    """
    if not text.startswith(PREFIX):
        if not Path(text).expanduser().is_dir():
            raise ArgumentInvalid(
                f"{text!r} is not a folder; give the one that PEFT wrote, or {PREFIX}ORG/NAME"
            )
        yield AdapterSource(Path(text))
        return
    source = HubSource.parse(text)
    settings = HubSettings.read()
    with tempfile.TemporaryDirectory(prefix="quickchange-hub-") as folder:
        with (
            Hub(settings) as hub,
            byte_progress("fetching", is_shown=is_shown) as progress,
        ):
            commit = hub.fetch(source, Path(folder), progress)
        place = f"{source.repo}/{source.folder}" if source.folder else source.repo
        yield AdapterSource(Path(folder), f"{PREFIX}{place}@{commit[:COMMIT_CHARS]}")


def tags_with(client: Quickchange, name: str, tag: str | None) -> tuple[str, ...] | None:
    """Return an adapter's tags and one more, the newest of many; None to leave them as they are.

    A key that may not read, or a name that is new: the one alone.
    """
    if tag is None:
        return None
    try:
        present = client.adapters.get(name).tags
    except (NotFound, Forbidden):
        present = []
    return (*(each for each in present if each != tag), tag)[-MAX_TAGS:]
