"""What versions are to be: rules in the catalog, whoever reads them."""

import sqlite3
from pathlib import Path

import pytest
from quickchange_adapters.catalog import Catalog, sqlite_url
from quickchange_adapters.errors import NotInCatalog, RevisionChanged, VersionDisabled
from quickchange_adapters.records import AdapterRecord, VersionRecord

from tests.adapters.test_catalog import publish


@pytest.fixture
def version(catalog: Catalog) -> VersionRecord:
    """Version 1 of `a`."""
    return publish(catalog, "a", "one").version


def read(catalog: Catalog) -> tuple[AdapterRecord, VersionRecord]:
    adapter = catalog.get("a")
    assert adapter is not None
    return adapter, adapter.versions[0]


def test_wishes_are_kept_apart_and_a_repeat_changes_nothing(
    catalog: Catalog, version: VersionRecord
) -> None:
    catalog.states.set_wish(version, "pin", True, actor="me")
    adapter, shown = read(catalog)
    assert (shown.wants_pin, shown.wants_merge) == (True, False)
    catalog.states.set_wish(version, "pin", True)
    catalog.states.set_wish(version, "merge", False)
    assert read(catalog)[0].revision == adapter.revision
    catalog.states.set_wish(version, "merge", True)
    catalog.states.set_wish(version, "pin", False)
    assert (read(catalog)[1].wants_pin, read(catalog)[1].wants_merge) == (False, True)
    catalog.states.set_wish(version, "merge", False)
    assert read(catalog)[1] == version
    logged = [(e.action, e.actor, e.version) for e in catalog.list_events("a")]
    assert logged[1:] == [
        ("pin", "me", 1),
        ("merge", "", 1),
        ("unpin", "", 1),
        ("unmerge", "", 1),
    ]


def test_a_disabled_version_keeps_its_number_bytes_and_wishes(
    catalog: Catalog, version: VersionRecord
) -> None:
    catalog.states.set_wish(version, "pin", True)
    before = catalog.revision()
    catalog.states.set_enabled(version, False)
    catalog.states.set_enabled(version, False)
    assert catalog.revision() == before + 1
    assert catalog.resolve("a") is None
    with pytest.raises(VersionDisabled):
        catalog.states.set_wish(version, "merge", True)
    with pytest.raises(VersionDisabled):
        catalog.set_alias("canary", version)
    again = publish(catalog, "a", "one")
    assert (again.created, again.version.state, again.version.wants_pin) == (
        False,
        "disabled",
        True,
    )
    catalog.states.set_enabled(version, True)
    assert catalog.resolve("a") == read(catalog)[1]
    assert read(catalog)[1].wants_pin


def test_a_deletion_takes_the_wishes_along(catalog: Catalog, version: VersionRecord) -> None:
    catalog.states.set_wish(version, "pin", True)
    catalog.begin_delete_adapter("a")
    with pytest.raises(NotInCatalog):
        catalog.states.set_wish(version, "merge", True)
    with pytest.raises(NotInCatalog):
        catalog.states.set_enabled(version, True)
    catalog.purge(version)
    published = publish(catalog, "a", "one")
    assert (published.version.number, published.version.wants_pin) == (2, False)


def test_state_changes_and_deletions_compare_the_revision(
    catalog: Catalog, version: VersionRecord
) -> None:
    seen = read(catalog)[0].revision
    catalog.states.set_wish(version, "pin", True)
    with pytest.raises(RevisionChanged):
        catalog.states.set_enabled(version, False, revision=seen)
    with pytest.raises(RevisionChanged):
        catalog.begin_delete_version("a", 1, revision=seen)
    with pytest.raises(RevisionChanged):
        catalog.begin_delete_adapter("a", revision=seen)
    assert read(catalog)[1].state == "ready"
    catalog.begin_delete_adapter("a", revision=read(catalog)[0].revision)
    assert catalog.get("a") is None


def test_changes_since_names_what_is_new_what_changed_and_what_is_gone(
    catalog: Catalog, version: VersionRecord
) -> None:
    publish(catalog, "b", "two")
    publish(catalog, "c", "three")
    known = {(a.tenant, a.name): a.revision for a in catalog.list_adapters()}
    assert catalog.changes_since(known).changed == ()
    catalog.states.set_enabled(version, False)
    catalog.begin_delete_adapter("b")
    publish(catalog, "d", "four")
    changes = catalog.changes_since(known)
    assert [(a.name, a.versions[0].state) for a in changes.changed] == [
        ("a", "disabled"),
        ("d", "ready"),
    ]
    assert changes.gone == (("default", "b"),)
    assert len(catalog.changes_since({}).changed) == 3


def test_an_older_catalog_gets_the_table_of_wishes(tmp_path: Path) -> None:
    path = tmp_path / "catalog.db"
    catalog = Catalog(sqlite_url(path))
    version = publish(catalog, "a", "one").version
    catalog.close()
    with sqlite3.connect(path) as connection:
        connection.execute("DROP TABLE desired")
    catalog = Catalog(sqlite_url(path))
    assert catalog.resolve("a") == version
    catalog.states.set_wish(version, "pin", True)
    assert read(catalog)[1].wants_pin
