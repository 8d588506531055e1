"""What the catalog's transactions are made of: reading and changing rows on one connection."""

import json
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any, cast

from sqlalchemy import (
    ColumnElement,
    Connection,
    RowMapping,
    Select,
    and_,
    delete,
    exists,
    insert,
    select,
    update,
)

from quickchange_adapters.catalog_schema import (
    adapters,
    aliases,
    blobs,
    catalog_state,
    desired,
    events,
    reservations,
    tasks,
    version_files,
    versions,
)
from quickchange_adapters.errors import NotInCatalog, RevisionChanged
from quickchange_adapters.names import is_alias
from quickchange_adapters.records import (
    FILE_ORDER,
    AdapterRecord,
    EventRecord,
    FileRecord,
    NewVersion,
    VersionRecord,
)


def is_named(tenant: str, name: str) -> ColumnElement[bool]:
    """Return the condition that an adapter's row is this name's, deleted or not."""
    return and_(adapters.c.tenant == tenant, adapters.c.name == name)


def is_live(tenant: str, name: str) -> ColumnElement[bool]:
    """Return the condition that an adapter's row is this name's and not deleted."""
    return and_(is_named(tenant, name), adapters.c.deleted_at.is_(None))


def read_adapters(connection: Connection, where: ColumnElement[bool]) -> list[AdapterRecord]:
    """Return the adapters that meet a condition on `adapters`, sorted by tenant and name."""
    order = (adapters.c.tenant, adapters.c.name)
    rows = connection.execute(select(adapters).where(where).order_by(*order)).mappings().all()
    versions_of = _versions_by_adapter(connection, where)
    aliases_of: dict[int, dict[str, int]] = defaultdict(dict)
    query = (
        select(aliases.c.adapter_id, aliases.c.alias, versions.c.number)
        .join(versions, versions.c.id == aliases.c.version_id)
        .join(adapters, adapters.c.id == aliases.c.adapter_id)
        .where(where)
        .order_by(aliases.c.alias)
    )
    for adapter_id, alias, number in connection.execute(query):
        aliases_of[adapter_id][alias] = number
    return [
        AdapterRecord(
            tenant=row["tenant"],
            name=row["name"],
            visibility=row["visibility"],
            tags=tuple(json.loads(row["tags"])),
            created_at=row["created_at"],
            revision=row["revision"],
            aliases=aliases_of[row["id"]],
            versions=tuple(versions_of[row["id"]]),
        )
        for row in rows
    ]


def read_adapter(connection: Connection, tenant: str, name: str) -> AdapterRecord | None:
    """Return one adapter that is not deleted."""
    return next(iter(read_adapters(connection, is_live(tenant, name))), None)


def adapter_id_of(
    connection: Connection, tenant: str, name: str, revision: int | None = None
) -> int:
    """Return the id of an adapter that is not deleted.

    Raises: NotInCatalog, RevisionChanged.
    """
    row = connection.execute(
        select(adapters.c.id, adapters.c.revision).where(is_live(tenant, name))
    ).one_or_none()
    if row is None:
        raise NotInCatalog("adapter", name)
    if revision is not None and row.revision != revision:
        raise RevisionChanged(name)
    return cast(int, row.id)


def version_row(connection: Connection, adapter_id: int, number: int) -> RowMapping | None:
    """Return the id, digest and state of a version."""
    return (
        connection.execute(
            select(versions.c.id, versions.c.digest, versions.c.state).where(
                versions.c.adapter_id == adapter_id, versions.c.number == number
            )
        )
        .mappings()
        .one_or_none()
    )


def open_adapter(connection: Connection, new: NewVersion, now: float) -> int:
    """Return the id of the adapter's row; a new name gets one, a deleted name its old one."""
    wanted: dict[str, Any] = {}
    if new.tags is not None:
        wanted["tags"] = json.dumps(new.tags)
    if new.visibility is not None:
        wanted["visibility"] = new.visibility
    fresh = {
        "tags": "[]",
        "visibility": new.default_visibility,
        "created_at": int(now),
    }
    row = connection.execute(
        select(adapters.c.id, adapters.c.deleted_at).where(is_named(new.tenant, new.name))
    ).one_or_none()
    if row is None:
        values = {"tenant": new.tenant, "name": new.name, "next_version": 1, "revision": 0}
        result = connection.execute(insert(adapters).values(**values, **{**fresh, **wanted}))
        assert result.inserted_primary_key is not None
        return cast(int, result.inserted_primary_key[0])
    if row.deleted_at is not None:
        wanted = {**fresh, **wanted, "deleted_at": None}
    if wanted:
        connection.execute(update(adapters).where(adapters.c.id == row.id).values(**wanted))
        event = EventRecord(now, new.tenant, new.name, "describe", new.actor)
        note(connection, event)
    return cast(int, row.id)


def number_of(connection: Connection, adapter_id: int, digest: str) -> int | None:
    """Return the number of an adapter's live version with these bytes."""
    return connection.scalar(
        select(versions.c.number).where(
            versions.c.adapter_id == adapter_id,
            versions.c.digest == digest,
            versions.c.state != "deleting",
        )
    )


def has_version(connection: Connection, adapter_id: int) -> bool:
    """Whether an adapter has a version whose deletion was not begun."""
    of_adapter = select(versions.c.id).where(
        versions.c.adapter_id == adapter_id, versions.c.state != "deleting"
    )
    return connection.scalar(of_adapter.limit(1)) is not None


def point_alias(connection: Connection, adapter_id: int, alias: str, version_id: int) -> None:
    """Make an alias mean a version."""
    connection.execute(
        delete(aliases).where(aliases.c.adapter_id == adapter_id, aliases.c.alias == alias)
    )
    connection.execute(
        insert(aliases).values(adapter_id=adapter_id, alias=alias, version_id=version_id)
    )


def meant_by(connection: Connection, adapter_id: int, alias: str) -> RowMapping | None:
    """Return the id, number and digest of the version that an alias means."""
    if not is_alias(alias):
        return None
    query = (
        select(versions.c.id, versions.c.number, versions.c.digest)
        .join(aliases, aliases.c.version_id == versions.c.id)
        .where(aliases.c.adapter_id == adapter_id, aliases.c.alias == alias)
    )
    return connection.execute(query).mappings().one_or_none()


def remove_alias(connection: Connection, adapter_id: int, alias: str) -> None:
    """Remove an alias."""
    connection.execute(
        delete(aliases).where(aliases.c.adapter_id == adapter_id, aliases.c.alias == alias)
    )


def add_blob(connection: Connection, sha256: str, num_bytes: int) -> None:
    """Make sure that a blob has a row."""
    if connection.scalar(select(blobs.c.sha256).where(blobs.c.sha256 == sha256)) is None:
        connection.execute(insert(blobs).values(sha256=sha256, num_bytes=num_bytes, num_refs=0))


def add_files(
    connection: Connection, version_id: int, files: Iterable[FileRecord], task_text: str | None
) -> None:
    """Attach files to a version; each counts as one reference to its blob."""
    for file in files:
        add_blob(connection, file.sha256, file.num_bytes)
        _count_reference(connection, file.sha256, 1)
        connection.execute(
            insert(version_files).values(version_id=version_id, file=file.file, sha256=file.sha256)
        )
    if task_text is not None:
        connection.execute(insert(tasks).values(version_id=version_id, text=task_text))


def remove_version(connection: Connection, version_id: int) -> None:
    """Remove a version's row, its task's and its files' rows, and their references to blobs."""
    of_version = version_files.c.version_id == version_id
    for sha256 in connection.scalars(select(version_files.c.sha256).where(of_version)).all():
        _count_reference(connection, sha256, -1)
    connection.execute(delete(version_files).where(of_version))
    connection.execute(delete(tasks).where(tasks.c.version_id == version_id))
    connection.execute(delete(desired).where(desired.c.version_id == version_id))
    connection.execute(delete(versions).where(versions.c.id == version_id))


def is_reserved(connection: Connection, upload_id: str, files: Iterable[FileRecord]) -> bool:
    """Whether an upload's blobs were spared from its reservation until now."""
    reserved = connection.scalars(
        select(reservations.c.sha256).where(reservations.c.upload_id == upload_id)
    )
    return {file.sha256 for file in files} <= set(reserved)


def release_blobs(connection: Connection, upload_id: str) -> None:
    """Remove the reservations of an upload."""
    connection.execute(delete(reservations).where(reservations.c.upload_id == upload_id))


def release_lapsed(connection: Connection, made_until: float) -> None:
    """Remove the reservations of uploads that did not end in time."""
    connection.execute(delete(reservations).where(reservations.c.created_at <= made_until))


def unused_blobs(made_until: float) -> Select[str]:
    """Return the query for blobs with no reference and no reservation made after a moment."""
    is_reserved = exists().where(
        reservations.c.sha256 == blobs.c.sha256, reservations.c.created_at > made_until
    )
    # A count that is wrong, by a bug or by hand, must not cost a version its bytes.
    is_used = exists().where(version_files.c.sha256 == blobs.c.sha256)
    return select(blobs.c.sha256).where(blobs.c.num_refs == 0, ~is_used, ~is_reserved)


def note(connection: Connection, event: EventRecord) -> None:
    """Append to the audit log, and let the adapter's and the catalog's revision grow."""
    connection.execute(insert(events).values(**asdict(event)))
    connection.execute(
        update(adapters)
        .where(is_named(event.tenant, event.name))
        .values(revision=adapters.c.revision + 1)
    )
    connection.execute(update(catalog_state).values(revision=catalog_state.c.revision + 1))


def _count_reference(connection: Connection, sha256: str, change: int) -> None:
    connection.execute(
        update(blobs).where(blobs.c.sha256 == sha256).values(num_refs=blobs.c.num_refs + change)
    )


def _versions_by_adapter(
    connection: Connection, where: ColumnElement[bool]
) -> dict[int, list[VersionRecord]]:
    columns = [column for column in versions.c if column.name != "report"]
    query = (
        select(*columns, adapters.c.tenant, adapters.c.name, desired.c.pinned, desired.c.merged)
        .join(adapters, adapters.c.id == versions.c.adapter_id)
        .outerjoin(desired, desired.c.version_id == versions.c.id)
        .where(where)
        .order_by(versions.c.number)
    )
    files_of = _files_by_version(connection, where)
    task_of = _tasks_by_version(connection, where)
    found: dict[int, list[VersionRecord]] = defaultdict(list)
    for row in connection.execute(query).mappings():
        found[row["adapter_id"]].append(
            _version_record(row, files_of[row["id"]], task_of.get(row["id"]))
        )
    return found


def _files_by_version(
    connection: Connection, where: ColumnElement[bool]
) -> dict[int, list[FileRecord]]:
    query = (
        select(
            version_files.c.version_id,
            version_files.c.file,
            version_files.c.sha256,
            blobs.c.num_bytes,
        )
        .join(blobs, blobs.c.sha256 == version_files.c.sha256)
        .join(versions, versions.c.id == version_files.c.version_id)
        .join(adapters, adapters.c.id == versions.c.adapter_id)
        .where(where)
    )
    found: dict[int, list[FileRecord]] = defaultdict(list)
    for version_id, file, sha256, num_bytes in connection.execute(query):
        found[version_id].append(FileRecord(file, sha256, num_bytes))
    return found


def _tasks_by_version(connection: Connection, where: ColumnElement[bool]) -> dict[int, str]:
    query = (
        select(tasks.c.version_id, tasks.c.text)
        .join(versions, versions.c.id == tasks.c.version_id)
        .join(adapters, adapters.c.id == versions.c.adapter_id)
        .where(where)
    )
    return {row.version_id: row.text for row in connection.execute(query)}


def _version_record(
    row: RowMapping, files: list[FileRecord], task_text: str | None
) -> VersionRecord:
    values: dict[str, Any] = {
        key: row[key]
        for key in ("tenant", "name", "number", "digest", "state", "base_name", "peft_type")
    }
    return VersionRecord(
        **values,
        ranks=tuple(json.loads(row["ranks"])),
        target_modules=tuple(json.loads(row["target_modules"])),
        files=tuple(sorted(files, key=lambda file: FILE_ORDER.index(file.file))),
        created_at=row["created_at"],
        task_text=task_text,
        wants_pin=bool(row["pinned"]),
        wants_merge=bool(row["merged"]),
    )
