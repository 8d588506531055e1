"""Compares a store with its catalog, and mends what can be mended without losing anything.

| finding | repair |
|---|---|
| `blob_missing`, `blob_unreadable` | none: send the bytes again |
| `blob_damaged` | the blob is put aside; sending the bytes again heals its versions |
| `size_wrong`, `count_wrong` | the row is set to what is true |
| `blob_unused` | the catalog removes row and blob, as its `collect` does |
| `blob_unknown`, `incoming_left` | removed |
| `digest_wrong`, `file_unknown`, `alias_broken`, `catalog_damaged` | none: people decide |

A server may run meanwhile. What is younger than an hour may belong to an upload under way and is
left alone; what is removed or put aside is looked at once more under the catalog's write lock,
without which no upload can begin to count on it. A blob that a version refers to is never removed.
Blocks for as long as it takes to read all blobs.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

from sqlalchemy import Connection

from quickchange_adapters import catalog_check as rows
from quickchange_adapters.blob_check import BlobCheck, OnProgress, check_blob, stamp_of
from quickchange_adapters.catalog import RESERVATION_S, Catalog
from quickchange_adapters.errors import BlobDamaged, BlobMissing
from quickchange_adapters.findings import CheckReport, Finding
from quickchange_adapters.records import VersionRecord
from quickchange_adapters.store import BlobInfo, Store

GRACE_S = 3600.0
SETTLE_S = 1.0
REPAIR = "run fsck with --repair"
WRONG_CATALOG = (
    "most blobs here are unknown to this catalog, so that --repair leaves them: is it the right "
    "one? If its rows are lost, restore them from a backup"
)


@runtime_checkable
class StoreWithFolders(Protocol):
    """A store whose staged files can be listed, and that can put a blob aside."""

    def list_incoming(self, older_than_s: float) -> Sequence[Path]:
        """Return what `sweep_incoming` would remove."""

    def set_aside(self, sha256: str) -> Path:
        """Move a damaged blob out of the way."""


@dataclass(frozen=True, slots=True)
class _Rows:
    """What the catalog said at one moment."""

    versions: list[VersionRecord]
    sizes: dict[str, int]
    unused: set[str]
    findings: list[Finding]
    is_sound: bool = True


class StoreCheck:
    """One check of one store with one catalog; `clock` gives seconds since 1970.

    `settle_s`: how long a server is given to collect what a deletion has just freed.
    """

    def __init__(
        self,
        store: Store,
        catalog: Catalog,
        clock: Callable[[], float] = time.time,
        settle_s: float = SETTLE_S,
    ) -> None:
        self._catalog = catalog
        self._store = store
        self._clock = clock
        self._settle_s = settle_s

    def num_bytes(self) -> int:
        """Return how many bytes `run` will read, by what the catalog says."""
        with self._catalog.database.reading() as connection:
            sizes = rows.known_blobs(connection)
            used = _users(rows.list_versions(connection))
        return sum(sizes.get(sha256, 0) for sha256 in used)

    def run(self, *, repair: bool = False, on_progress: OnProgress | None = None) -> CheckReport:
        """Look at everything.

        Raises: StoreUnavailable.
        """
        with self._catalog.database.reading() as connection:
            said = self._read_rows(connection)
        if not said.is_sound:
            return CheckReport(0, 0, 0, tuple(said.findings))
        users = _users(said.versions)
        checks = [
            check_blob(self._store, sha256, users[sha256], on_progress or _ignore)
            for sha256 in sorted(users)
        ]
        findings = [*said.findings, *self._blob_findings(checks, said, repair)]
        if repair:
            findings = self._fix_rows(findings)
        findings += [*self._unused(said, repair), *self._unknown(repair), *self._incoming(repair)]
        num_bytes = sum(check.num_bytes for check in checks)
        return CheckReport(len(said.versions), len(checks), num_bytes, tuple(findings))

    @property
    def _lapsed_before(self) -> float:
        """Reservations made before this moment protect nothing any more."""
        return self._clock() - RESERVATION_S

    def _read_rows(self, connection: Connection) -> _Rows:
        broken = rows.check_database(connection)
        if broken:
            return _Rows([], {}, set(), broken, is_sound=False)
        versions = rows.list_versions(connection)
        findings = [*rows.check_versions(versions), *rows.check_aliases(connection)]
        for sha256, (found, wanted) in rows.wrong_counts(connection).items():
            message = f"the catalog counts {found} references to this blob; there are {wanted}"
            findings.append(Finding("count_wrong", sha256, message, REPAIR))
        unused = rows.unused_blobs(connection, self._lapsed_before)
        return _Rows(versions, rows.known_blobs(connection), unused, findings)

    def _blob_findings(
        self, checks: Sequence[BlobCheck], said: _Rows, repair: bool
    ) -> Iterator[Finding]:
        for check in checks:
            if check.finding is not None:
                yield from self._damage(check, check.finding, repair)
            elif check.num_bytes != said.sizes[check.sha256]:
                message = f"the catalog says {said.sizes[check.sha256]} bytes, not the blob's "
                message += str(check.num_bytes)
                finding = Finding("size_wrong", check.sha256, message, REPAIR)
                yield self._fix_size(check, finding) if repair else finding

    def _damage(self, check: BlobCheck, finding: Finding, repair: bool) -> Iterator[Finding]:
        """Yield a damage unless its last version went, or its bytes came again, meanwhile."""
        database = self._catalog.database
        with database.writing() if repair else database.reading() as connection:
            if not rows.is_used(connection, check.sha256) or self._is_new(check):
                return
            can_move = isinstance(self._store, StoreWithFolders)
            if not repair or finding.code != "blob_damaged" or not can_move:
                yield finding
            elif rows.is_reserved(connection, check.sha256, self._lapsed_before):
                yield finding  # it is being uploaded again at this moment
            else:
                yield self._put_aside(check, finding)

    def _is_new(self, check: BlobCheck) -> bool:
        """Whether there is another file now than the one that was read."""
        try:
            with self._store.lease(check.sha256) as path:
                return stamp_of(path) != check.stamp
        except (BlobMissing, BlobDamaged, OSError):
            return False

    def _put_aside(self, check: BlobCheck, finding: Finding) -> Finding:
        assert isinstance(self._store, StoreWithFolders)
        moved = self._store.set_aside(check.sha256)
        where = f"{moved.parent.name}/{moved.name}"
        hint = f"it was moved to {where} in the store; {finding.hint}"
        return Finding(finding.code, finding.where, finding.message, hint, finding.used_by)

    def _fix_size(self, check: BlobCheck, finding: Finding) -> Finding:
        with self._catalog.database.writing() as connection:
            rows.set_row(connection, check.sha256, num_bytes=check.num_bytes)
        return finding.repaired("the row was set right")

    def _fix_rows(self, findings: Sequence[Finding]) -> list[Finding]:
        if not any(finding.code == "count_wrong" for finding in findings):
            return list(findings)
        with self._catalog.database.writing() as connection:
            rows.fix_counts(connection)
        return [
            finding.repaired("the count was set right")
            if finding.code == "count_wrong"
            else finding
            for finding in findings
        ]

    def _unused(self, said: _Rows, repair: bool) -> Iterator[Finding]:
        """Yield what a deletion or an upload left; what is gone by now, a server collected."""
        if said.unused and not repair:
            time.sleep(self._settle_s)
        with self._catalog.database.reading() as connection:
            unused = said.unused & rows.unused_blobs(connection, self._lapsed_before)
        message = "no version refers to this blob any more"
        findings = [Finding("blob_unused", sha256, message, REPAIR) for sha256 in sorted(unused)]
        if repair and findings:
            self._catalog.collect(self._store.delete)
            findings = [finding.repaired("it was removed") for finding in findings]
        yield from findings

    def _unknown(self, repair: bool) -> Iterator[Finding]:
        """Yield blobs without a row."""
        listed = list(self._store.list())
        with self._catalog.database.reading() as connection:
            known = rows.known_blobs(connection)
        unknown = [blob for blob in listed if blob.sha256 not in known]
        is_plausible = 2 * len(unknown) <= len(listed)
        for blob in filter(self._is_old, unknown):
            message = f"the catalog knows nothing of this blob of {blob.num_bytes} bytes"
            hint = REPAIR if is_plausible else WRONG_CATALOG
            finding = Finding("blob_unknown", blob.sha256, message, hint)
            yield self._remove(blob, finding) if repair and is_plausible else finding

    def _is_old(self, blob: BlobInfo) -> bool:
        return blob.modified_at is not None and self._clock() - blob.modified_at >= GRACE_S

    def _remove(self, blob: BlobInfo, finding: Finding) -> Finding:
        with self._catalog.database.writing() as connection:
            if rows.is_known(connection, blob.sha256):
                return finding.repaired("it belongs to an upload that has begun since")
            self._store.delete(blob.sha256)
        return finding.repaired("it was removed")

    def _incoming(self, repair: bool) -> Iterator[Finding]:
        if not isinstance(self._store, StoreWithFolders):
            return
        message = "an upload that ended in between left this file"
        findings = [
            Finding("incoming_left", f"{path.parent.name}/{path.name}", message, REPAIR)
            for path in self._store.list_incoming(GRACE_S)
        ]
        if repair and findings:
            self._store.sweep_incoming(GRACE_S)
            findings = [finding.repaired("it was removed") for finding in findings]
        yield from findings


def _users(versions: Sequence[VersionRecord]) -> dict[str, tuple[str, ...]]:
    """Return the versions that need each blob."""
    users: dict[str, list[str]] = defaultdict(list)
    for version in versions:
        for file in version.files:
            users[file.sha256].append(rows.label_of(version))
    return {sha256: tuple(labels) for sha256, labels in users.items()}


def _ignore(num_bytes: int) -> None:
    """Tell nobody."""
