"""API keys in the catalog: made once, revoked once, never changed or removed.

Either there is no key at all, or there is somebody who can make and revoke keys: an admin key of
the default tenant, or a key outside of the catalog (`has_other_admin`). Each change keeps that, in
its own transaction; writers take one lock. Methods block, and raise StoreUnavailable when the
database does not answer.
"""

import json
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

from sqlalchemy import ColumnElement, Connection, RowMapping, insert, select, update

from quickchange_adapters.api_keys import KeyRecord, is_key_id
from quickchange_adapters.catalog_database import CatalogDatabase
from quickchange_adapters.catalog_schema import api_keys, catalog_state
from quickchange_adapters.errors import AdminKeyNeeded, LastAdminKey, NotInCatalog
from quickchange_adapters.names import DEFAULT_TENANT


class KeyCatalog:
    """The rows of all keys. `clock` gives seconds since 1970."""

    def __init__(self, database: CatalogDatabase, clock: Callable[[], float] = time.time) -> None:
        self._database = database
        self._clock = clock

    def list_keys(self) -> list[KeyRecord]:
        """Return all keys of all tenants, revoked ones too, oldest first."""
        query = select(api_keys).order_by(api_keys.c.created_at, api_keys.c.id)
        with self._database.reading() as connection:
            return [_record(row) for row in connection.execute(query).mappings()]

    def create(self, record: KeyRecord, *, has_other_admin: bool) -> KeyRecord:
        """Keep a new key; return it with its time.

        Raises: AdminKeyNeeded.
        """
        made = replace(record, created_at=int(self._clock()))
        with self._database.writing() as connection:
            if not (has_other_admin or _can_manage(made) or _managers(connection)):
                raise AdminKeyNeeded
            connection.execute(insert(api_keys).values(**_values(made)))
            _let_revision_grow(connection)
        return made

    def revoke(
        self, key_id: str, *, tenant: str | None, actor: str, has_other_admin: bool
    ) -> KeyRecord:
        """End a key for good. `tenant`: look only among this tenant's; None: among all.

        A repeat is no error, and changes nothing.

        Raises: NotInCatalog, LastAdminKey.
        """
        if not is_key_id(key_id):  # not every database can be asked for any text
            raise NotInCatalog("key", key_id[:80])
        is_key = api_keys.c.id == key_id
        with self._database.writing() as connection:
            record = _find(connection, is_key)
            if record is None or tenant not in (None, record.tenant):
                raise NotInCatalog("key", key_id)
            if record.revoked_at is not None:
                return record
            if not has_other_admin and _managers(connection) == {key_id}:
                raise LastAdminKey(key_id)
            gone = replace(record, revoked_at=int(self._clock()), revoked_by=actor)
            connection.execute(update(api_keys).where(is_key).values(**_values(gone)))
            _let_revision_grow(connection)
        return gone


def _can_manage(record: KeyRecord) -> bool:
    """Whether a key can make and revoke the keys of every tenant."""
    is_good = record.revoked_at is None
    return is_good and record.tenant == DEFAULT_TENANT and "admin" in record.scopes


def _managers(connection: Connection) -> set[str]:
    good = select(api_keys).where(api_keys.c.revoked_at.is_(None))
    records = map(_record, connection.execute(good).mappings())
    return {record.id for record in records if _can_manage(record)}


def _find(connection: Connection, where: ColumnElement[bool]) -> KeyRecord | None:
    row = connection.execute(select(api_keys).where(where)).mappings().one_or_none()
    return None if row is None else _record(row)


def _let_revision_grow(connection: Connection) -> None:
    """Tell other processes that there is news."""
    connection.execute(update(catalog_state).values(revision=catalog_state.c.revision + 1))


def _values(record: KeyRecord) -> dict[str, Any]:
    adapters = None if record.adapters is None else json.dumps(record.adapters)
    return {**asdict(record), "scopes": json.dumps(record.scopes), "adapters": adapters}


def _record(row: RowMapping) -> KeyRecord:
    adapters = None if row["adapters"] is None else tuple(json.loads(row["adapters"]))
    return KeyRecord(**{**row, "scopes": tuple(json.loads(row["scopes"])), "adapters": adapters})
