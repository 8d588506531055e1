"""Names, versions and aliases, in transactions; a committed row is what makes an upload real.

| step of an upload | if the process dies after it |
|---|---|
| `reserve` names the blobs to come | a later `collect` removes what is there |
| the store puts the blobs | the same |
| `publish` commits the version | the version is there, whole |

Other servers' clocks may be wrong, so `publish` looks whether what it reserved is still reserved.

A blob is removed only inside a write transaction that finds no reference and no fresh reservation;
reserving takes the same lock, so an upload never counts on bytes that are about to go.
Methods block; call them off the event loop. Knows no files and no engine.
"""

import json
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, cast

from sqlalchemy import Connection, delete, insert, select, update

from quickchange_adapters import catalog_rows as rows
from quickchange_adapters.catalog_changes import AdapterKey, CatalogChanges, read_changes
from quickchange_adapters.catalog_database import CatalogDatabase
from quickchange_adapters.catalog_engine import DEFAULT_TIMEOUTS, CatalogTimeouts
from quickchange_adapters.catalog_schema import (
    adapters,
    aliases,
    blobs,
    catalog_state,
    desired,
    reservations,
    versions,
)
from quickchange_adapters.errors import (
    AliasInUse,
    NotInCatalog,
    StoreUnavailable,
    VersionDisabled,
)
from quickchange_adapters.event_log import EventLog
from quickchange_adapters.names import (
    DEFAULT_ALIAS,
    DEFAULT_TENANT,
    is_adapter_name,
    parse_model,
)
from quickchange_adapters.publication_rules import check_publication
from quickchange_adapters.records import (
    AdapterRecord,
    EventRecord,
    FileRecord,
    NewVersion,
    Published,
    VersionRecord,
)
from quickchange_adapters.version_states import VersionStates

RESERVATION_S = 2 * 3600.0
"""Longer than the slowest upload to an object store that is not given up."""


def sqlite_url(path: Path) -> str:
    """Return the URL of a catalog in a file."""
    return f"sqlite:///{path}"


class Catalog:
    """The rows of all adapters. `clock` gives seconds since 1970.

    `states` holds what is wished, `event_log` what was done. Every method raises StoreUnavailable
    when the database does not answer.
    """

    def __init__(
        self,
        url: str,
        clock: Callable[[], float] = time.time,
        timeouts: CatalogTimeouts = DEFAULT_TIMEOUTS,
    ) -> None:
        self._clock = clock
        self.database = CatalogDatabase(url, timeouts)
        self.states = VersionStates(self.database, clock)
        self.event_log = EventLog(self.database, clock)

    def close(self) -> None:
        """Close all connections."""
        self.database.close()

    def revision(self) -> int:
        """Return a number that grows with every change of any adapter."""
        with self.database.reading() as connection:
            return cast(int, connection.scalar(select(catalog_state.c.revision)))

    def list_adapters(self) -> list[AdapterRecord]:
        """Return all adapters of all tenants, sorted by tenant and name."""
        with self.database.reading() as connection:
            return rows.read_adapters(connection, adapters.c.deleted_at.is_(None))

    def changes_since(self, known: Mapping[AdapterKey, int]) -> CatalogChanges:
        """Return what differs from `known`, each adapter's revision as the caller last saw it."""
        with self.database.reading() as connection:
            return read_changes(connection, known)

    def get(self, name: str, tenant: str = DEFAULT_TENANT) -> AdapterRecord | None:
        """Return one adapter."""
        if not is_adapter_name(name):
            return None
        with self.database.reading() as connection:
            return rows.read_adapter(connection, tenant, name)

    def resolve(self, model: str, tenant: str = DEFAULT_TENANT) -> VersionRecord | None:
        """Return the version that a model string means now."""
        ref = parse_model(model)
        adapter = None if ref is None else self.get(ref.name, tenant)
        return None if adapter is None or ref is None else adapter.find(ref)

    def report(self, version: VersionRecord) -> dict[str, Any]:
        """Return the report of a version's upload; empty when the version is gone."""
        query = (
            select(versions.c.report)
            .join(adapters)
            .where(rows.is_named(version.tenant, version.name))
            .where(versions.c.number == version.number)
        )
        with self.database.reading() as connection:
            text = connection.scalar(query)
        report: dict[str, Any] = json.loads(text) if text else {}
        return report

    def list_events(
        self, name: str, tenant: str = DEFAULT_TENANT, *, after: int = 0, limit: int | None = None
    ) -> list[EventRecord]:
        """Return a part of a name's audit log behind a place in it, oldest first."""
        return list(self.event_log.read(name, tenant, after, limit).events)

    def list_deleting(self) -> list[VersionRecord]:
        """Return all versions whose deletion was begun and not ended by `purge`."""
        ids = select(versions.c.adapter_id).where(versions.c.state == "deleting")
        with self.database.reading() as connection:
            found = rows.read_adapters(connection, adapters.c.id.in_(ids))
        return [v for adapter in found for v in adapter.versions if v.state == "deleting"]

    def reserve(self, upload_id: str, files: Iterable[FileRecord]) -> None:
        """Protect blobs from `collect` while an upload puts them; lapses after two hours."""
        with self.database.writing("reserve") as connection:
            for sha256, num_bytes in {f.sha256: f.num_bytes for f in files}.items():
                rows.add_blob(connection, sha256, num_bytes)
                connection.execute(
                    insert(reservations).values(
                        upload_id=upload_id, sha256=sha256, created_at=self._clock()
                    )
                )

    def release(self, upload_id: str) -> None:
        """Give up an upload's reservation; a repeat is a no-op."""
        with self.database.writing("release") as connection:
            rows.release_blobs(connection, upload_id)

    def publish(self, new: NewVersion) -> Published:
        """Make an upload a version and move its alias, in one transaction.

        The first version of a name becomes its alias `default`. The same bytes under the same name
        are the version that is there. The upload's reservation ends.

        Raises: QuotaExceeded, PublicNameTaken; StoreUnavailable also when it took so long that its
        reservation lapsed, and its blobs with it.
        """
        with self.database.writing("publish") as connection:
            if new.upload_id and not rows.is_reserved(connection, new.upload_id, new.files):
                raise StoreUnavailable("the upload took too long and was given up: send it again")
            adapter_id = rows.open_adapter(connection, new, self._clock())
            number = rows.number_of(connection, adapter_id, new.digest)
            created = number is None
            if number is None:
                number = self._add_version(connection, adapter_id, new)
            if new.alias is not None:
                self._move_alias(connection, adapter_id, number, new)
            check_publication(connection, new, is_new_version=created)
            rows.release_blobs(connection, new.upload_id)
            adapter = _existing(connection, new.tenant, new.name)
        version = adapter.version(number)
        assert version is not None
        return Published(created, adapter, version)

    def set_alias(
        self, alias: str, version: VersionRecord, *, revision: int | None = None, actor: str = ""
    ) -> AdapterRecord:
        """Point an alias at a version. `revision`: the adapter's, as the caller saw it.

        An alias that means this version already is left alone, and so is the revision.

        Raises: NotInCatalog, VersionDisabled, RevisionChanged.
        """
        tenant, name, number = version.tenant, version.name, version.number
        with self.database.writing("set_alias") as connection:
            adapter_id = rows.adapter_id_of(connection, tenant, name, revision)
            row = rows.version_row(connection, adapter_id, number)
            if row is None or row["state"] == "deleting":
                raise NotInCatalog("version", f"{name}:{number}")
            if row["state"] == "disabled":
                raise VersionDisabled(name, number)
            meant = rows.meant_by(connection, adapter_id, alias)
            if meant is None or meant["id"] != row["id"]:
                rows.point_alias(connection, adapter_id, alias, row["id"])
                self._note(connection, "set_alias", version, number, actor=actor, alias=alias)
            return _existing(connection, tenant, name)

    def delete_alias(
        self,
        name: str,
        alias: str,
        *,
        tenant: str = DEFAULT_TENANT,
        revision: int | None = None,
        actor: str = "",
    ) -> AdapterRecord:
        """Remove an alias; its version stays.

        Raises: NotInCatalog, RevisionChanged.
        """
        with self.database.writing("delete_alias") as connection:
            adapter_id = rows.adapter_id_of(connection, tenant, name, revision)
            meant = rows.meant_by(connection, adapter_id, alias)
            if meant is None:
                raise NotInCatalog("alias", f"{name}@{alias}")
            rows.remove_alias(connection, adapter_id, alias)
            number, digest, now = meant["number"], meant["digest"], self._clock()
            event = EventRecord(now, tenant, name, "delete_alias", actor, number, digest, alias)
            rows.note(connection, event)
            return _existing(connection, tenant, name)

    def begin_delete_version(
        self,
        name: str,
        number: int,
        *,
        tenant: str = DEFAULT_TENANT,
        revision: int | None = None,
        actor: str = "",
    ) -> VersionRecord:
        """Mark a version as deleting: it takes no requests from now on. A repeat is a no-op.

        Raises: NotInCatalog, AliasInUse, RevisionChanged.
        """
        with self.database.writing("begin_delete") as connection:
            rows.adapter_id_of(connection, tenant, name, revision)
            adapter = _existing(connection, tenant, name)
            version = adapter.version(number)
            if version is None:
                raise NotInCatalog("version", f"{name}:{number}")
            used_by = [alias for alias, target in adapter.aliases.items() if target == number]
            if used_by:
                raise AliasInUse(name, number, used_by)
            if version.state != "deleting":
                self._mark_deleting(connection, version, actor)
        return version

    def begin_delete_adapter(
        self,
        name: str,
        *,
        tenant: str = DEFAULT_TENANT,
        revision: int | None = None,
        actor: str = "",
    ) -> tuple[VersionRecord, ...]:
        """Take a name away with its aliases; its versions are deleting. Returns them.

        Raises: NotInCatalog, RevisionChanged.
        """
        with self.database.writing("begin_delete") as connection:
            adapter_id = rows.adapter_id_of(connection, tenant, name, revision)
            adapter = _existing(connection, tenant, name)
            connection.execute(delete(aliases).where(aliases.c.adapter_id == adapter_id))
            for version in adapter.versions:
                self._mark_deleting(connection, version, actor)
            rows.note(
                connection,
                EventRecord(self._clock(), tenant, name, "delete_adapter", actor=actor),
            )
            connection.execute(
                update(adapters)
                .where(adapters.c.id == adapter_id)
                .values(deleted_at=int(self._clock()))
            )
        return adapter.versions

    def purge(self, version: VersionRecord) -> None:
        """End a deletion: the version's row goes, and its references to blobs. May be repeated."""
        of_version = (
            select(versions.c.id)
            .join(adapters)
            .where(rows.is_named(version.tenant, version.name))
            .where(versions.c.number == version.number, versions.c.state == "deleting")
        )
        with self.database.writing("purge") as connection:
            version_id = connection.scalar(of_version)
            if version_id is not None:
                rows.remove_version(connection, version_id)
                self._note(connection, "purge", version, version.number)

    def collect(self, delete_blob: Callable[[str], int]) -> int:
        """Remove every blob that nothing refers to; return the bytes that `delete_blob` freed.

        Each goes in a transaction of its own, so that a slow store holds up no writer for long.
        """
        with self.database.reading() as connection:
            found = connection.scalars(rows.unused_blobs(self._lapsed_before)).all()
        return sum(self._collect_blob(sha256, delete_blob) for sha256 in found)

    def _collect_blob(self, sha256: str, delete_blob: Callable[[str], int]) -> int:
        """Remove one blob, unless something refers to it by now."""
        with self.database.writing("collect") as connection:
            rows.release_lapsed(connection, self._lapsed_before)
            still_unused = rows.unused_blobs(self._lapsed_before).where(blobs.c.sha256 == sha256)
            if connection.scalar(still_unused) is None:
                return 0
            num_bytes = delete_blob(sha256)
            connection.execute(delete(blobs).where(blobs.c.sha256 == sha256))
        return num_bytes

    @property
    def _lapsed_before(self) -> float:
        """Reservations made before this moment protect nothing any more."""
        return self._clock() - RESERVATION_S

    def _add_version(self, connection: Connection, adapter_id: int, new: NewVersion) -> int:
        """Insert the version under the next number, and return that."""
        of_adapter = adapters.c.id == adapter_id
        number = connection.scalars(select(adapters.c.next_version).where(of_adapter)).one()
        connection.execute(update(adapters).where(of_adapter).values(next_version=number + 1))
        is_first = not rows.has_version(connection, adapter_id)
        result = connection.execute(
            insert(versions).values(
                adapter_id=adapter_id,
                number=number,
                digest=new.digest,
                state="ready",
                base_name=new.base_name,
                base_digest=new.base_digest,
                peft_type=new.peft_type,
                ranks=json.dumps(new.ranks),
                target_modules=json.dumps(new.target_modules),
                report=json.dumps(new.report),
                created_at=int(self._clock()),
            )
        )
        assert result.inserted_primary_key is not None
        version_id = result.inserted_primary_key[0]
        rows.add_files(connection, version_id, new.files, new.task_text)
        if is_first:
            rows.point_alias(connection, adapter_id, DEFAULT_ALIAS, version_id)
        self._note(connection, "publish", new, number, actor=new.actor)
        return cast(int, number)

    def _move_alias(
        self, connection: Connection, adapter_id: int, number: int, new: NewVersion
    ) -> None:
        row = rows.version_row(connection, adapter_id, number)
        assert row is not None
        assert new.alias is not None
        if row["state"] == "disabled":
            raise VersionDisabled(new.name, number)
        rows.point_alias(connection, adapter_id, new.alias, row["id"])
        self._note(connection, "set_alias", new, number, actor=new.actor, alias=new.alias)

    def _mark_deleting(self, connection: Connection, version: VersionRecord, actor: str) -> None:
        adapter_id = rows.adapter_id_of(connection, version.tenant, version.name)
        row = rows.version_row(connection, adapter_id, version.number)
        assert row is not None
        connection.execute(
            update(versions).where(versions.c.id == row["id"]).values(state="deleting")
        )
        connection.execute(delete(desired).where(desired.c.version_id == row["id"]))
        self._note(connection, "delete_version", version, version.number, actor=actor)

    def _note(
        self,
        connection: Connection,
        action: str,
        what: VersionRecord | NewVersion,
        number: int,
        *,
        actor: str = "",
        alias: str | None = None,
    ) -> None:
        """Append a line about one version to the audit log."""
        event = EventRecord(
            self._clock(), what.tenant, what.name, action, actor, number, what.digest, alias
        )
        rows.note(connection, event)


def _existing(connection: Connection, tenant: str, name: str) -> AdapterRecord:
    adapter = rows.read_adapter(connection, tenant, name)
    if adapter is None:
        raise NotInCatalog("adapter", name)
    return adapter
