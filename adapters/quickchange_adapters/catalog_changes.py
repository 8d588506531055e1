"""What has changed in the catalog since somebody last looked: for pictures of it kept elsewhere."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from sqlalchemy import Connection, select

from quickchange_adapters import catalog_rows as rows
from quickchange_adapters.catalog_schema import adapters
from quickchange_adapters.records import AdapterRecord

BATCH_SIZE = 500

AdapterKey = tuple[str, str]  # tenant and name


@dataclass(frozen=True, slots=True)
class CatalogChanges:
    """Adapters that are new or have grown a revision, and those that are no more."""

    changed: tuple[AdapterRecord, ...]
    gone: tuple[AdapterKey, ...]


def read_changes(connection: Connection, known: Mapping[AdapterKey, int]) -> CatalogChanges:
    """Return what differs from `known`, the revision of each adapter as it was last seen.

    Only what changed is read whole: one narrow row an adapter tells.
    """
    query = select(adapters.c.id, adapters.c.tenant, adapters.c.name, adapters.c.revision).where(
        adapters.c.deleted_at.is_(None)
    )
    changed_ids: list[int] = []
    there: set[AdapterKey] = set()
    for adapter_id, tenant, name, revision in connection.execute(query):
        there.add((tenant, name))
        if known.get((tenant, name)) != revision:
            changed_ids.append(adapter_id)
    changed = tuple(_read_by_id(connection, changed_ids))
    return CatalogChanges(changed, tuple(key for key in known if key not in there))


def _read_by_id(connection: Connection, ids: Sequence[int]) -> Iterator[AdapterRecord]:
    for start in range(0, len(ids), BATCH_SIZE):
        batch = ids[start : start + BATCH_SIZE]
        yield from rows.read_adapters(
            connection, adapters.c.id.in_(batch) & adapters.c.deleted_at.is_(None)
        )
