"""What the catalog's rows say that cannot be, and how it is put right. Knows no files.

Every function works on the connection of a transaction that its caller began.
"""

from collections.abc import Collection

from sqlalchemy import Connection, and_, exists, func, select, true, update
from sqlalchemy.exc import DatabaseError
from sqlalchemy.sql import Select

from quickchange_adapters import catalog_rows as rows
from quickchange_adapters.catalog_schema import (
    adapters,
    aliases,
    blobs,
    reservations,
    version_files,
    versions,
)
from quickchange_adapters.findings import Finding
from quickchange_adapters.names import DEFAULT_TENANT
from quickchange_adapters.records import CONFIG_FILE, WEIGHTS_FILE, VersionRecord, version_digest

UPLOAD_AGAIN = "delete this version and upload it again"


def list_versions(connection: Connection) -> list[VersionRecord]:
    """Return every version that is not being deleted, of all tenants."""
    found = rows.read_adapters(connection, true())
    return [v for adapter in found for v in adapter.versions if v.state != "deleting"]


def label_of(version: VersionRecord) -> str:
    """Return what people call a version."""
    return f"{name_of(version.tenant, version.name)}:{version.number}"


def name_of(tenant: str, name: str) -> str:
    """Return an adapter's name, with its tenant unless that is everybody's."""
    return name if tenant == DEFAULT_TENANT else f"{tenant}/{name}"


def check_database(connection: Connection) -> list[Finding]:
    """Ask SQLite whether its file is sound; other databases check themselves."""
    if connection.dialect.name != "sqlite":
        return []
    try:
        said = _said_by_sqlite(connection)
    except DatabaseError as error:
        said = [str(error.orig)]
    hint = "stop the server and restore the catalog from a backup"
    return [Finding("catalog_damaged", "catalog", text, hint) for text in dict.fromkeys(said)]


def _said_by_sqlite(connection: Connection) -> list[str]:
    checked = connection.exec_driver_sql("PRAGMA integrity_check(5)")
    said = [text for row in checked for text in str(row[0]).splitlines() if text != "ok"]
    broken = connection.exec_driver_sql("PRAGMA foreign_key_check").all()
    return said + [f"a row of {r[0]} refers to a row of {r[2]} that is not there" for r in broken]


def check_versions(found: Collection[VersionRecord]) -> list[Finding]:
    """Compare each version's digest with its files and its task; both files must have rows."""
    findings = []
    for version in found:
        missing = [name for name in (CONFIG_FILE, WEIGHTS_FILE) if version.file(name) is None]
        label = label_of(version)
        if missing:
            message = f"{label} has no row for {', '.join(missing)}"
            findings.append(Finding("file_unknown", label, message, UPLOAD_AGAIN, (label,)))
        elif version_digest(version.files) != version.digest:
            message = f"{label} has the digest {version.digest[:12]}…, which its files do not have"
            findings.append(Finding("digest_wrong", label, message, UPLOAD_AGAIN, (label,)))
        elif not version.has_its_task:
            message = f"{label} has a task in the catalog that is not its task.json"
            findings.append(Finding("digest_wrong", label, message, UPLOAD_AGAIN, (label,)))
    return findings


def check_aliases(connection: Connection) -> list[Finding]:
    """Find aliases that point at nothing that could answer."""
    target = versions.alias("target")
    query = (
        select(adapters.c.tenant, adapters.c.name, aliases.c.alias)
        .join(adapters, adapters.c.id == aliases.c.adapter_id)
        .outerjoin(
            target,
            and_(target.c.id == aliases.c.version_id, target.c.adapter_id == aliases.c.adapter_id),
        )
        .where(target.c.id.is_(None) | (target.c.state == "deleting"))
    )
    hint = "move the alias to another version, or delete it"
    return [
        Finding(
            "alias_broken", f"{name_of(row.tenant, row.name)}@{row.alias}", _broken(row.alias), hint
        )
        for row in connection.execute(query)
    ]


def _broken(alias: str) -> str:
    return f"the alias {alias!r} points at no version that takes requests"


def wrong_counts(connection: Connection) -> dict[str, tuple[int, int]]:
    """Return sha256 of each blob whose reference count is wrong, with what is and should be."""
    return {row.sha256: (row.num_refs, row.wanted) for row in connection.execute(_counts())}


def _counts() -> Select[tuple[str, int, int]]:
    wanted = func.count(version_files.c.version_id).label("wanted")
    return (
        select(blobs.c.sha256, blobs.c.num_refs, wanted)
        .outerjoin(version_files, version_files.c.sha256 == blobs.c.sha256)
        .group_by(blobs.c.sha256, blobs.c.num_refs)
        .having(wanted != blobs.c.num_refs)
    )


def fix_counts(connection: Connection) -> list[str]:
    """Set each reference count to the number of files that refer to the blob."""
    wrong = wrong_counts(connection)
    for sha256, (_, wanted) in wrong.items():
        set_row(connection, sha256, num_refs=wanted)
    return list(wrong)


def set_row(connection: Connection, sha256: str, **values: int) -> None:
    """Change a blob's row."""
    connection.execute(update(blobs).where(blobs.c.sha256 == sha256).values(**values))


def known_blobs(connection: Connection) -> dict[str, int]:
    """Return the size of every blob that has a row."""
    found = connection.execute(select(blobs.c.sha256, blobs.c.num_bytes))
    return {row.sha256: row.num_bytes for row in found}


def unused_blobs(connection: Connection, before_s: float) -> set[str]:
    """Return the blobs that no version refers to, and no upload that reserved them since then."""
    is_reserved = exists().where(
        reservations.c.sha256 == blobs.c.sha256, reservations.c.created_at > before_s
    )
    is_used = exists().where(version_files.c.sha256 == blobs.c.sha256)
    return set(connection.scalars(select(blobs.c.sha256).where(~is_used, ~is_reserved)))


def is_used(connection: Connection, sha256: str) -> bool:
    """Whether a version refers to a blob."""
    query = select(version_files.c.sha256).where(version_files.c.sha256 == sha256)
    return connection.scalar(query.limit(1)) is not None


def is_known(connection: Connection, sha256: str) -> bool:
    """Whether a blob has a row."""
    return connection.scalar(select(blobs.c.sha256).where(blobs.c.sha256 == sha256)) is not None


def is_reserved(connection: Connection, sha256: str, before_s: float) -> bool:
    """Whether an upload that began since a time may be putting this blob."""
    query = select(reservations.c.sha256).where(
        reservations.c.sha256 == sha256, reservations.c.created_at > before_s
    )
    return connection.scalar(query.limit(1)) is not None
