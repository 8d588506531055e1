"""What versions are to be, wherever the catalog is followed: in service or not, pinned, merged.

| wish | kept in | ends with |
|---|---|---|
| out of service (`disabled`) | the version's state | `set_enabled`, or its deletion |
| pinned, merged | a row of `desired` | taking the wish back, or its deletion |

A change that changes nothing leaves revision and audit log alone. Methods block. Knows no engine.
"""

from collections.abc import Callable
from typing import Literal

from sqlalchemy import Connection, RowMapping, delete, insert, select, update

from quickchange_adapters import catalog_rows as rows
from quickchange_adapters.catalog_database import CatalogDatabase
from quickchange_adapters.catalog_schema import desired, versions
from quickchange_adapters.errors import NotInCatalog, VersionDisabled
from quickchange_adapters.records import EventRecord, VersionRecord

Wish = Literal["pin", "merge"]

_COLUMNS = {"pin": desired.c.pinned, "merge": desired.c.merged}
_UNDONE = {"pin": "unpin", "merge": "unmerge"}


class VersionStates:
    """Sets what versions are to be. Every method raises StoreUnavailable, and NotInCatalog."""

    def __init__(self, database: CatalogDatabase, clock: Callable[[], float]) -> None:
        self._database = database
        self._clock = clock

    def set_enabled(
        self,
        version: VersionRecord,
        is_enabled: bool,
        *,
        revision: int | None = None,
        actor: str = "",
    ) -> None:
        """Put a version into service or take it out. `revision`: the adapter's, as it was seen.

        Raises: RevisionChanged.
        """
        wanted = "ready" if is_enabled else "disabled"
        with self._database.writing() as connection:
            row = _row(connection, version, revision)
            if row["state"] != wanted:
                of_version = versions.c.id == row["id"]
                connection.execute(update(versions).where(of_version).values(state=wanted))
                self._note(connection, "enable" if is_enabled else "disable", version, actor)

    def set_wish(
        self, version: VersionRecord, wish: Wish, is_wished: bool, *, actor: str = ""
    ) -> None:
        """Wish that a version is pinned or merged, or take the wish back.

        Raises: VersionDisabled (for a wish; it can be taken back).
        """
        with self._database.writing() as connection:
            row = _row(connection, version)
            if is_wished and row["state"] == "disabled":
                raise VersionDisabled(version.name, version.number)
            if _is_wished(connection, row["id"], wish) != is_wished:
                _put_wish(connection, row["id"], wish, is_wished)
                self._note(connection, wish if is_wished else _UNDONE[wish], version, actor)

    def _note(
        self, connection: Connection, action: str, version: VersionRecord, actor: str
    ) -> None:
        named = version.tenant, version.name, action, actor, version.number, version.digest
        rows.note(connection, EventRecord(self._clock(), *named))


def _row(connection: Connection, version: VersionRecord, revision: int | None = None) -> RowMapping:
    """Return a version's row, unless its deletion was begun."""
    adapter_id = rows.adapter_id_of(connection, version.tenant, version.name, revision)
    row = rows.version_row(connection, adapter_id, version.number)
    if row is None or row["state"] == "deleting":
        raise NotInCatalog("version", f"{version.name}:{version.number}")
    return row


def _is_wished(connection: Connection, version_id: int, wish: Wish) -> bool:
    query = select(_COLUMNS[wish]).where(desired.c.version_id == version_id)
    return bool(connection.scalar(query))


def _put_wish(connection: Connection, version_id: int, wish: Wish, is_wished: bool) -> None:
    """Change one wish; a row without any wish goes."""
    of_version = desired.c.version_id == version_id
    if connection.scalar(select(desired.c.version_id).where(of_version)) is None:
        values = {"version_id": version_id, "pinned": 0, "merged": 0}
        connection.execute(insert(desired).values(**values))
    value = {_COLUMNS[wish].name: int(is_wished)}
    connection.execute(update(desired).where(of_version).values(**value))
    is_empty = (desired.c.pinned == 0) & (desired.c.merged == 0)
    connection.execute(delete(desired).where(of_version, is_empty))
