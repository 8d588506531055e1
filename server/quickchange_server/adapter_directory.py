"""Which adapters exist now, in memory, so that a request never waits for the catalog.

Holds the catalog's last known records and this process's static adapters, which shadow them; and
versions that this process alone has in or out of service. Lives on the event loop. Knows no bytes
and no engine.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

from quickchange_adapters.catalog_changes import AdapterKey
from quickchange_adapters.names import DEFAULT_ALIAS, DEFAULT_TENANT, parse_model
from quickchange_adapters.records import AdapterRecord, VersionRecord, VersionState

from quickchange_server.adapter_names import AdapterNames

VersionKey = tuple[str, str, int]


class AdapterDirectory:
    """Records by name and tenant. A tenant sees its own, then those that are public.

    `generation` grows with every change. Each of `on_gone` is called with tenant and name of an
    adapter of the catalog once nobody finds it: from then on the name may be somebody else's.
    `names`: the same by digest, for other threads.
    """

    def __init__(self) -> None:
        self.generation = 0
        self.on_gone: list[Callable[[str, str], None]] = []
        self.names = AdapterNames()
        self._records: dict[str, dict[str, AdapterRecord]] = {}
        self._public: dict[str, AdapterRecord] = {}
        self._seen: dict[AdapterKey, AdapterRecord] = {}
        self._static: dict[str, AdapterRecord] = {}
        self._states_here: dict[VersionKey, tuple[VersionState, VersionState]] = {}
        self._served: tuple[int, frozenset[str]] = (-1, frozenset())

    def replace(self, tenant: str, name: str, record: AdapterRecord | None) -> None:
        """Take one adapter's new record; None: it is gone. An older state is not taken."""
        known = self._seen.get((tenant, name))
        if known is not None and record is not None and record.revision < known.revision:
            return
        self.generation += 1
        of_name = self._records.setdefault(name, {})
        if record is not None:
            self._seen[tenant, name] = record
            of_name[tenant] = self._as_here(record)
        else:
            self._seen.pop((tenant, name), None)
            of_name.pop(tenant, None)
        self.names.note(tenant, name, of_name.get(tenant))
        if not of_name:
            del self._records[name]
        self._choose_public(name, of_name.values())
        if known is not None and record is None:
            for tell in self.on_gone:
                tell(tenant, name)

    def revisions(self) -> dict[AdapterKey, int]:
        """Return the revision of each of the catalog's adapters, as it was last seen here."""
        return {key: record.revision for key, record in self._seen.items()}

    def set_state_here(self, version: VersionRecord, state: VersionState) -> None:
        """Have a version in or out of service here, until its state in the catalog changes.

        One that has gone is left alone.
        """
        record = self._seen.get((version.tenant, version.name))
        known = None if record is None else record.version(version.number)
        if record is not None and known is not None:
            self._states_here[_key(known)] = (known.state, state)
            self.replace(record.tenant, record.name, record)

    def forget_state_here(self, version: VersionRecord) -> None:
        """Have a version be what the catalog says."""
        self._states_here.pop(_key(version), None)

    def add_static(self, record: AdapterRecord) -> None:
        """Add an adapter that shadows the catalog's of that name."""
        self.generation += 1
        self._static[record.name] = record
        self.names.note_static(record)

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
        generation, served = self._served
        if generation != self.generation:
            served = frozenset(version.digest for version in self.served_versions())
            self._served = self.generation, served
        return digest in served

    def served_versions(self) -> Iterator[VersionRecord]:
        """Yield every version that takes requests, of all tenants: none that a folder shadows."""
        return (version for version in self._all_versions() if version.state == "ready")

    def model_names(self, tenant: str) -> Iterator[tuple[str, VersionRecord]]:
        """Yield every bare name and `name@alias` that takes requests, with what it means."""
        for adapter in self.visible(tenant):
            for alias, number in sorted(adapter.aliases.items()):
                version = adapter.version(number)
                if version is not None and version.state == "ready":
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

    def _as_here(self, record: AdapterRecord) -> AdapterRecord:
        """Return a record with the states that hold in this process alone."""
        versions = tuple(map(self._version_as_here, record.versions))
        return record if versions == record.versions else replace(record, versions=versions)

    def _version_as_here(self, version: VersionRecord) -> VersionRecord:
        then, here = self._states_here.get(_key(version), (version.state, version.state))
        if then != version.state:
            self.forget_state_here(version)
            return version
        return version if here == then else replace(version, state=here)

    def _all_versions(self) -> Iterator[VersionRecord]:
        for adapter in self._static.values():
            yield from adapter.versions
        for name, of_name in self._records.items():
            if name not in self._static:
                for adapter in of_name.values():
                    yield from adapter.versions


def _precedence(record: AdapterRecord) -> tuple[bool, int, str]:
    return record.tenant != DEFAULT_TENANT, record.created_at, record.tenant


def _key(version: VersionRecord) -> VersionKey:
    return version.tenant, version.name, version.number
