"""What a publication must keep to: the tenant's quota, and one owner for each public name.

Looked at inside the publication's own transaction; as writers take one lock, no two pass together.
"""

from sqlalchemy import Connection, func, select

from quickchange_adapters.catalog_schema import (
    adapters,
    blobs,
    version_files,
    versions,
)
from quickchange_adapters.errors import PublicNameTaken
from quickchange_adapters.records import NewVersion


def check_publication(connection: Connection, new: NewVersion, *, is_new_version: bool) -> None:
    """Look at a publication that is written and not yet committed.

    Raises: QuotaExceeded (never for bytes that were there before), PublicNameTaken.
    """
    _check_public_name(connection, new)
    if is_new_version and new.quota is not None:
        new.quota.check(new.tenant, *_usage(connection, new.tenant))


def _check_public_name(connection: Connection, new: NewVersion) -> None:
    """Refuse a second public adapter of a name: nobody could say which one it means."""
    public = select(adapters.c.tenant).where(
        adapters.c.name == new.name,
        adapters.c.visibility == "public",
        adapters.c.deleted_at.is_(None),
    )
    owners = set(connection.scalars(public))
    if new.tenant in owners and len(owners) > 1:
        raise PublicNameTaken(new.name)


def _usage(connection: Connection, tenant: str) -> tuple[int, int]:
    """Return how many versions a tenant has, and their bytes; each counts whole."""
    of_tenant = select(versions.c.id).join(adapters).where(adapters.c.tenant == tenant)
    num_versions = select(func.count()).select_from(of_tenant.subquery())
    num_bytes = (
        select(func.coalesce(func.sum(blobs.c.num_bytes), 0))
        .join(version_files, version_files.c.sha256 == blobs.c.sha256)
        .where(version_files.c.version_id.in_(of_tenant))
    )
    return connection.scalar(num_versions) or 0, int(connection.scalar(num_bytes) or 0)
