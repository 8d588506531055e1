"""Which adapters exist now, in memory, so that a request never waits for the catalog.

Holds the catalog's last known records and this process's static adapters, which shadow them. Lives
on the event loop. Knows no bytes and no engine.
"""

from collections.abc import Iterable, Iterator

from quickchange_adapters.catalog_changes import AdapterKey
from quickchange_adapters.names import DEFAULT_ALIAS, DEFAULT_TENANT, parse_model
from quickchange_adapters.records import AdapterRecord, VersionRecord


class AdapterDirectory:
    """Records by name and tenant. A tenant sees its own, then those that are public."""

    def __init__(self) -> None:
        self._records: dict[str, dict[str, AdapterRecord]] = {}
        self._public: dict[str, AdapterRecord] = {}
        self._static: dict[str, AdapterRecord] = {}

    def replace(self, tenant: str, name: str, record: AdapterRecord | None) -> None:
        """Take one adapter's new record; None: it is gone. An older state is not taken."""
        of_name = self._records.setdefault(name, {})
        known = of_name.get(tenant)
        if known is not None and record is not None and record.revision < known.revision:
            return
        if record is not None:
            of_name[tenant] = record
        else:
            of_name.pop(tenant, None)
        if not of_name:
            del self._records[name]
        self._choose_public(name, of_name.values())

    def revisions(self) -> dict[AdapterKey, int]:
        """Return the revision of each of the catalog's adapters, as it was last seen here."""
        return {
            (tenant, name): record.revision
            for name, of_name in self._records.items()
            for tenant, record in of_name.items()
        }

    def add_static(self, record: AdapterRecord) -> None:
        """Add an adapter that shadows the catalog's of that name."""
        self._static[record.name] = record

    def get_static(self, name: str) -> AdapterRecord | None:
        """Return the static adapter of a name."""
        return self._static.get(name)

    def static_names(self) -> tuple[str, ...]:
        """Return the names that are served from folders, and so not to be changed over REST."""
        return tuple(self._static)

    def get(self, name: str, tenant: str) -> AdapterRecord | None:
        """Return what a tenant gets under a name.

        What other tenants keep to themselves costs the same look-ups as what is not there.
        """
        static = self._static.get(name)
        own = self._records.get(name, {}).get(tenant)
        public = self._public.get(name)
        return static or own or public

    def find(self, model: str, tenant: str) -> VersionRecord | None:
        """Return the version that a model string means now, if it takes requests."""
        ref = parse_model(model)
        if ref is None:
            return None
        adapter = self.get(ref.name, tenant)
        return None if adapter is None else adapter.find(ref)

    def visible(self, tenant: str) -> list[AdapterRecord]:
        """Return everything a tenant may see, sorted by name."""
        names = sorted(self._records.keys() | self._static.keys())
        found = (self.get(name, tenant) for name in names)
        return [record for record in found if record is not None]

    def is_served(self, digest: str) -> bool:
        """Whether any adapter has a version with these bytes that takes requests."""
        return any(v.digest == digest and v.state == "ready" for v in self._all_versions())

    def model_names(self, tenant: str) -> Iterator[tuple[str, VersionRecord]]:
        """Yield every bare name and `name@alias` with what it means."""
        for adapter in self.visible(tenant):
            for alias, number in sorted(adapter.aliases.items()):
                version = adapter.version(number)
                if version is not None:
                    if alias == DEFAULT_ALIAS:
                        yield adapter.name, version
                    yield f"{adapter.name}@{alias}", version

    def owned(self, tenant: str) -> list[VersionRecord]:
        """Return all versions of a tenant's adapters, static ones aside."""
        found = (of_name.get(tenant) for of_name in self._records.values())
        return [version for adapter in found if adapter for version in adapter.versions]

    def _choose_public(self, name: str, records: Iterable[AdapterRecord]) -> None:
        """Say which record a name means to tenants that have none of their own.

        The default tenant's, else the oldest: nobody can put their own in its place later.
        """
        public = [record for record in records if record.visibility == "public"]
        if public:
            self._public[name] = min(public, key=_precedence)
        else:
            self._public.pop(name, None)

    def _all_versions(self) -> Iterator[VersionRecord]:
        for adapter in self._static.values():
            yield from adapter.versions
        for of_name in self._records.values():
            for adapter in of_name.values():
                yield from adapter.versions


def _precedence(record: AdapterRecord) -> tuple[bool, int, str]:
    return record.tenant != DEFAULT_TENANT, record.created_at, record.tenant
