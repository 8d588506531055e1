"""What an alias has meant, read from the audit log of its adapter. Sends nothing."""

from collections.abc import Iterable

from quickchange_client.adapter import Adapter, AdapterEvent
from quickchange_client.errors import ArgumentInvalid

DEFAULT_ALIAS = "default"
FIRST = "1"
"""The id of a name's first event of all: its place in the log."""


def meanings(events: Iterable[AdapterEvent], alias: str) -> list[int]:
    """Return the versions that an alias has meant since the adapter was made, oldest first.

    The first version of a name becomes `default` without an event of its own. Where the log's
    beginning is gone, what it would have told is not guessed.
    """
    meant: list[int] = []
    present: set[int] = set()
    is_whole = False
    for event in events:
        is_whole = is_whole or event.id == FIRST or event.action == "delete_adapter"
        if event.action == "delete_adapter":
            meant, present = [], set()
        elif event.version is None:
            continue
        elif event.action == "publish":
            if alias == DEFAULT_ALIAS and is_whole and not present:
                meant.append(event.version)
            present.add(event.version)
        elif event.action == "delete_version":
            present.discard(event.version)
        elif event.action == "set_alias" and event.alias == alias:
            meant.append(event.version)
    return meant


def version_before(adapter: Adapter, events: Iterable[AdapterEvent], alias: str) -> int:
    """Return the version that an alias meant last before what it means now, if it can be served.

    Raises: ArgumentInvalid.
    """
    now = adapter.aliases.get(alias)
    usable = {version.version for version in adapter.versions if version.state == "ready"}
    for version in reversed(meanings(events, alias)):
        if version != now and version in usable:
            return version
    raise ArgumentInvalid(
        f"{adapter.name}@{alias} has meant no other version that could be served now; "
        f"point it at one: quickchange alias {adapter.name} {alias} VERSION"
    )
