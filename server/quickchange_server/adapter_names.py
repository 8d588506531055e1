"""Which adapters have which bytes, by digest: for the thread that renders metrics.

The event loop writes, one adapter at a time; any thread reads, and nobody waits: every value is
replaced as a whole. Knows no engine and no catalog.
"""

from collections import Counter
from collections.abc import Iterator

from quickchange_adapters.names import DEFAULT_ALIAS
from quickchange_adapters.records import AdapterRecord, VersionRecord

from quickchange_server.adapter_views import adapter_label


class AdapterNames:
    """Adapters by label and by digest. A folder's adapter shadows the catalog's of its label."""

    def __init__(self) -> None:
        self._records: dict[str, AdapterRecord] = {}
        self._labels: dict[str, tuple[str, ...]] = {}
        self._tenants: Counter[str] = Counter()
        self._static: set[str] = set()

    def note_static(self, record: AdapterRecord) -> None:
        """Take an adapter that is served from a folder."""
        self._static.add(record.name)
        self._put(record.name, record)

    def note(self, tenant: str, name: str, record: AdapterRecord | None) -> None:
        """Take the new state of one of the catalog's adapters; None: it is gone."""
        label = adapter_label(name, tenant)
        if label not in self._static:
            self._put(label, record)

    @property
    def tenants(self) -> frozenset[str]:
        """Whose adapters there are."""
        return frozenset(tenant for tenant, number in list(self._tenants.items()) if number)

    def get(self, label: str) -> AdapterRecord | None:
        """Return the adapter that metrics call so."""
        return self._records.get(label)

    def models(self, digest: str, *, only_public: bool) -> Iterator[str]:
        """Yield by which model strings a version with these bytes is asked for.

        The bare name where it is the default, and each alias; `NAME:3` where there is neither.
        """
        for label in self._labels.get(digest, ()):
            record = self._records.get(label)
            if record is not None and not (only_public and record.visibility != "public"):
                for version in record.versions:
                    if version.digest == digest and version.state == "ready":
                        yield from _models_of(record, version)

    def _put(self, label: str, record: AdapterRecord | None) -> None:
        known = self._records.pop(label, None)
        if known is not None:
            self._tenants[known.tenant] -= 1
            for digest in _digests_of(known):
                self._unlabel(digest, label)
        if record is not None:
            self._records[label] = record
            self._tenants[record.tenant] += 1
            for digest in _digests_of(record):
                self._labels[digest] = (*self._labels.get(digest, ()), label)

    def _unlabel(self, digest: str, label: str) -> None:
        left = tuple(other for other in self._labels[digest] if other != label)
        if left:
            self._labels[digest] = left
        else:
            del self._labels[digest]


def _digests_of(record: AdapterRecord) -> frozenset[str]:
    return frozenset(version.digest for version in record.versions)


def _models_of(record: AdapterRecord, version: VersionRecord) -> Iterator[str]:
    aliases = [alias for alias, number in record.aliases.items() if number == version.number]
    for alias in sorted(aliases):
        yield record.name if alias == DEFAULT_ALIAS else f"{record.name}@{alias}"
    if not aliases:
        yield f"{record.name}:{version.number}"
