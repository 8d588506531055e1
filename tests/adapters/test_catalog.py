"""Names, versions, aliases and references: rules and transactions."""

import hashlib
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from quickchange_adapters.catalog import RESERVATION_S, Catalog, sqlite_url
from quickchange_adapters.catalog_schema import schema_version
from quickchange_adapters.errors import (
    AliasInUse,
    NotInCatalog,
    RevisionChanged,
    StoreUnavailable,
)
from quickchange_adapters.names import is_adapter_name, is_alias, parse_model
from quickchange_adapters.records import (
    FileRecord,
    NewVersion,
    Published,
    VersionRecord,
    version_digest,
)
from sqlalchemy import update

from tests.adapters.conftest import Clock


def sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def files(text: str, config: str = "config") -> tuple[FileRecord, ...]:
    return (
        FileRecord("adapter_config.json", sha(config), 10),
        FileRecord("adapter_model.safetensors", sha(text), 100),
    )


def publish(catalog: Catalog, name: str, text: str, **changes: Any) -> Published:
    values: dict[str, Any] = {
        "name": name,
        "files": files(text),
        "base_name": "tiny",
        "base_digest": "b" * 64,
        "ranks": (4, 8),
        "target_modules": ("q_proj",),
        "report": {"ok": True, "text": text},
    }
    values.update(changes)
    return catalog.publish(NewVersion(**values))


def meaning(catalog: Catalog, model: str, tenant: str = "default") -> int | None:
    version = catalog.resolve(model, tenant)
    return None if version is None else version.number


def unused(catalog: Catalog) -> set[str]:
    """Collect, and return what was asked to go."""
    gone: set[str] = set()

    def delete_blob(sha256: str) -> int:
        gone.add(sha256)
        return 1

    assert catalog.collect(delete_blob) == len(gone)
    return gone


def test_the_first_version_is_default_and_later_ones_wait(catalog: Catalog) -> None:
    first = publish(catalog, "a", "one")
    second = publish(catalog, "a", "two")
    assert (first.created, first.version.number) == (True, 1)
    assert (second.created, second.version.number) == (True, 2)
    assert second.adapter.aliases == {"default": 1}
    assert second.adapter.versions == (first.version, second.version)
    assert meaning(catalog, "a") == 1


def test_an_alias_moves_in_the_same_transaction(catalog: Catalog) -> None:
    publish(catalog, "a", "one", alias="canary")
    published = publish(catalog, "a", "two", alias="default")
    assert published.adapter.aliases == {"canary": 1, "default": 2}
    assert (meaning(catalog, "a"), meaning(catalog, "a@canary")) == (2, 1)


def test_the_same_bytes_under_the_same_name_are_the_version_that_is_there(
    catalog: Catalog,
) -> None:
    first = publish(catalog, "a", "one")
    publish(catalog, "a", "two", alias="default")
    again = publish(catalog, "a", "one", alias="default")
    assert not again.created
    assert again.version == first.version
    assert again.adapter.aliases == {"default": 1}
    assert [v.number for v in again.adapter.versions] == [1, 2]


def test_the_same_bytes_under_another_name_share_their_blobs(catalog: Catalog) -> None:
    publish(catalog, "a", "one")
    other = publish(catalog, "b", "one")
    assert (other.created, other.version.number) == (True, 1)
    catalog.begin_delete_adapter("a")
    for version in catalog.list_deleting():
        catalog.purge(version)
    assert unused(catalog) == set()
    catalog.begin_delete_adapter("b")
    for version in catalog.list_deleting():
        catalog.purge(version)
    assert unused(catalog) == {sha("one"), sha("config")}
    assert unused(catalog) == set()


def test_model_strings(catalog: Catalog) -> None:
    digest = publish(catalog, "a", "one").version.digest
    publish(catalog, "a", "two", alias="next")
    assert meaning(catalog, "a") == 1
    assert meaning(catalog, "a@default") == 1
    assert meaning(catalog, "a@next") == 2
    assert meaning(catalog, "a:2") == 2
    assert meaning(catalog, f"a@sha256:{digest}") == 1
    assert meaning(catalog, f"a@sha256:{digest[:12]}") == 1
    nobody = ["b", "a@other", "a:3", "a:0", "a:01", "a:-1", "a:", "a@", f"a@sha256:{digest[:11]}"]
    nobody += [
        f"a@sha256:{digest}0",
        "a@sha256:",
        "a@md5:" + digest[:12],
        "A",
        "",
        "a@next:2",
        "a\n",
    ]
    assert [model for model in nobody if catalog.resolve(model)] == []


def test_numbers_are_never_given_again(catalog: Catalog) -> None:
    publish(catalog, "a", "one")
    gone = publish(catalog, "a", "two").version
    catalog.begin_delete_version("a", 2)
    catalog.purge(gone)
    assert publish(catalog, "a", "three").version.number == 3
    for version in catalog.begin_delete_adapter("a"):
        catalog.purge(version)
    assert catalog.get("a") is None
    again = publish(catalog, "a", "one")
    assert (again.created, again.version.number) == (True, 4)
    assert again.adapter.aliases == {"default": 4}


def test_a_version_that_is_being_deleted_takes_no_requests(catalog: Catalog) -> None:
    publish(catalog, "a", "one")
    digest = publish(catalog, "a", "two").version.digest
    catalog.begin_delete_version("a", 2)
    assert meaning(catalog, "a:2") is None
    assert meaning(catalog, f"a@sha256:{digest}") is None
    adapter = catalog.get("a")
    assert adapter is not None
    assert [v.state for v in adapter.versions] == ["ready", "deleting"]
    # The same bytes come back as a new version, not as the one that goes.
    assert publish(catalog, "a", "two").version.number == 3
    catalog.begin_delete_version("a", 2)
    assert [v.number for v in catalog.list_deleting()] == [2]


def test_a_version_under_an_alias_cannot_go(catalog: Catalog) -> None:
    publish(catalog, "a", "one", alias="prod")
    publish(catalog, "a", "two", alias="default")
    with pytest.raises(AliasInUse) as caught:
        catalog.begin_delete_version("a", 1)
    assert caught.value.aliases == ["prod"]
    assert meaning(catalog, "a:1") == 1
    catalog.delete_alias("a", "prod")
    catalog.begin_delete_version("a", 1)
    assert meaning(catalog, "a:1") is None


def test_deleting_an_adapter_takes_its_name_at_once(catalog: Catalog) -> None:
    publish(catalog, "a", "one")
    publish(catalog, "b", "one")
    gone = catalog.begin_delete_adapter("a")
    assert [v.number for v in gone] == [1]
    assert catalog.get("a") is None
    assert [adapter.name for adapter in catalog.list_adapters()] == ["b"]
    with pytest.raises(NotInCatalog):
        catalog.begin_delete_adapter("a")


def test_what_is_not_there_is_said(catalog: Catalog) -> None:
    version = publish(catalog, "a", "one").version
    nowhere = VersionRecord(**{**_values(version), "number": 9})
    other = VersionRecord(**{**_values(version), "name": "b"})
    calls: list[tuple[Callable[[], object], str]] = [
        (lambda: catalog.begin_delete_version("a", 9), "version"),
        (lambda: catalog.begin_delete_version("b", 1), "adapter"),
        (lambda: catalog.set_alias("x", nowhere), "version"),
        (lambda: catalog.set_alias("x", other), "adapter"),
        (lambda: catalog.delete_alias("a", "x"), "alias"),
        (lambda: catalog.delete_alias("b", "x"), "adapter"),
    ]
    for call, what in calls:
        with pytest.raises(NotInCatalog) as caught:
            call()
        assert caught.value.what == what


def _values(version: VersionRecord) -> dict[str, Any]:
    return {name: getattr(version, name) for name in VersionRecord.__slots__}


def test_revision_is_compare_and_swap(catalog: Catalog) -> None:
    seen = publish(catalog, "a", "one").adapter
    second = publish(catalog, "a", "two")
    with pytest.raises(RevisionChanged):
        catalog.set_alias("default", second.version, revision=seen.revision)
    assert meaning(catalog, "a") == 1
    moved = catalog.set_alias("default", second.version, revision=second.adapter.revision)
    assert moved.aliases == {"default": 2}
    assert moved.revision > second.adapter.revision
    with pytest.raises(RevisionChanged):
        catalog.delete_alias("a", "default", revision=second.adapter.revision)


def test_pointing_an_alias_where_it_points_changes_nothing(catalog: Catalog) -> None:
    published = publish(catalog, "a", "one")
    again = catalog.set_alias("default", published.version)
    assert again.revision == published.adapter.revision
    assert [event.action for event in catalog.list_events("a")] == ["publish"]
    with pytest.raises(RevisionChanged):
        catalog.set_alias("default", published.version, revision=again.revision + 1)


def test_every_change_shows_in_the_revision_of_the_catalog(catalog: Catalog) -> None:
    seen = [catalog.revision()]
    version = publish(catalog, "a", "one").version
    seen.append(catalog.revision())
    catalog.set_alias("x", version)
    seen.append(catalog.revision())
    publish(catalog, "a", "one", tags=("new",))
    seen.append(catalog.revision())
    catalog.begin_delete_adapter("a")
    seen.append(catalog.revision())
    catalog.purge(version)
    seen.append(catalog.revision())
    assert seen == sorted(set(seen))


def test_tags_and_visibility_stay_unless_they_are_sent(catalog: Catalog) -> None:
    first = publish(catalog, "a", "one", tags=("t",), visibility="private").adapter
    second = publish(catalog, "a", "two").adapter
    assert (second.tags, second.visibility) == (first.tags, first.visibility) == (("t",), "private")
    assert publish(catalog, "b", "one").adapter.visibility == "public"


def test_tenants_have_names_of_their_own(catalog: Catalog) -> None:
    publish(catalog, "a", "one", tenant="x")
    publish(catalog, "a", "two", tenant="y", visibility="private")
    publish(catalog, "a", "three", tenant="y")
    assert (meaning(catalog, "a:2", "x"), meaning(catalog, "a:2", "y")) == (None, 2)
    catalog.begin_delete_adapter("a", tenant="x")
    assert meaning(catalog, "a", "y") == 1


def test_the_log_tells_who_did_what(catalog: Catalog, clock: Clock) -> None:
    version = publish(catalog, "a", "one", actor="ann").version
    clock.now += 5
    catalog.set_alias("prod", version, actor="bob")
    catalog.delete_alias("a", "prod", actor="bob")
    catalog.begin_delete_adapter("a", actor="eve")
    catalog.purge(version)
    log = catalog.list_events("a")
    assert catalog.list_events("a", after=1, limit=2) == log[1:3]
    assert [(event.action, event.actor, event.version, event.alias) for event in log] == [
        ("publish", "ann", 1, None),
        ("set_alias", "bob", 1, "prod"),
        ("delete_alias", "bob", 1, "prod"),
        ("delete_version", "eve", 1, None),
        ("delete_adapter", "eve", None, None),
        ("purge", "", 1, None),
    ]
    assert log[1].at - log[0].at == 5
    assert [event.digest for event in log[:3]] == [version.digest] * 3
    assert catalog.list_events("a", tenant="other") == []


def test_reports_are_kept(catalog: Catalog) -> None:
    version = publish(catalog, "a", "one").version
    assert catalog.report(version) == {"ok": True, "text": "one"}
    catalog.begin_delete_adapter("a")
    catalog.purge(version)
    assert catalog.report(version) == {}


def test_reserved_blobs_are_spared_until_the_reservation_lapses(
    catalog: Catalog, clock: Clock
) -> None:
    catalog.reserve("upload", files("one"))
    assert unused(catalog) == set()
    catalog.release("upload")
    assert unused(catalog) == {sha("one"), sha("config")}
    catalog.reserve("upload", files("one"))
    clock.now += RESERVATION_S - 1
    assert unused(catalog) == set()
    clock.now += 1
    assert unused(catalog) == {sha("one"), sha("config")}


def test_an_upload_that_outlasts_its_reservation_is_refused(catalog: Catalog, clock: Clock) -> None:
    catalog.reserve("late", files("one"))
    clock.now += RESERVATION_S
    publish(catalog, "a", "one", upload_id="late")  # nobody has collected its blobs
    catalog.reserve("too late", files("two"))
    clock.now += RESERVATION_S
    assert unused(catalog) == {sha("two")}
    with pytest.raises(StoreUnavailable, match="send it again"):
        publish(catalog, "b", "two", upload_id="too late")
    assert catalog.get("b") is None


def test_publishing_ends_the_reservation(catalog: Catalog) -> None:
    catalog.reserve("one", files("one"))
    version = publish(catalog, "a", "one", upload_id="one").version
    assert unused(catalog) == set()
    catalog.begin_delete_adapter("a")
    catalog.purge(version)
    assert unused(catalog) == {sha("one"), sha("config")}


def test_a_collect_that_fails_half_way_is_done_again(catalog: Catalog) -> None:
    catalog.reserve("upload", files("one"))
    catalog.release("upload")

    def no_answer(sha256: str) -> int:
        raise StoreUnavailable("the disk is gone")

    with pytest.raises(StoreUnavailable):
        catalog.collect(no_answer)
    assert unused(catalog) == {sha("one"), sha("config")}


def test_all_is_there_after_opening_again(catalog: Catalog, catalog_url: str) -> None:
    publish(catalog, "a", "one")
    publish(catalog, "a", "two", alias="prod", tags=("x", "y"))
    before = catalog.list_adapters()
    catalog.close()
    again = Catalog(catalog_url)
    assert again.list_adapters() == before
    again.close()


def test_a_catalog_of_the_future_is_refused(catalog: Catalog, catalog_url: str) -> None:
    with catalog.database.writing() as connection:
        connection.execute(update(schema_version).values(version=99))
    with pytest.raises(StoreUnavailable, match="schema 99"):
        Catalog(catalog_url)


def test_a_file_that_is_no_database_is_unavailable(tmp_path: Path) -> None:
    (tmp_path / "catalog.db").write_bytes(b"not a database at all" * 1000)
    with pytest.raises(StoreUnavailable):
        Catalog(sqlite_url(tmp_path / "catalog.db"))


def test_many_threads_get_distinct_numbers(catalog: Catalog) -> None:
    numbers: list[int] = []

    def upload(worker: int) -> None:
        for n in range(5):
            numbers.append(publish(catalog, "a", f"{worker}/{n}").version.number)

    threads = [threading.Thread(target=upload, args=(worker,)) for worker in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(numbers) == list(range(1, 31))


def test_the_digest_is_that_of_the_files_in_their_fixed_order() -> None:
    config, weights = files("one")
    raw = bytes.fromhex(config.sha256) + bytes.fromhex(weights.sha256)
    assert version_digest((config, weights)) == hashlib.sha256(raw).hexdigest()
    assert version_digest((weights, config)) == version_digest((config, weights))
    task = FileRecord("task.json", sha("task"), 5)
    with_task = hashlib.sha256(raw + bytes.fromhex(task.sha256)).hexdigest()
    assert version_digest((task, weights, config)) == with_task


@pytest.mark.parametrize("name", ["a", "0", "a.b_c-d", "a" * 63, "legal-summary"])
def test_adapter_names(name: str) -> None:
    assert is_adapter_name(name)


@pytest.mark.parametrize(
    "name",
    ["", "A", "-a", "a-", ".a", "a.", "a" * 64, "a/b", "a b", "ä", "a\n", "..", "a:b", "a@b"],
)
def test_names_that_are_refused(name: str) -> None:
    assert not is_adapter_name(name)
    assert parse_model(name) is None or ":" in name or "@" in name


def test_aliases() -> None:
    assert [a for a in ["default", "a", "a-1", "a" * 32] if not is_alias(a)] == []
    refused = ["sha256", "1", "-a", "A", "a.b", "a" * 33, "", "a\n", "a_b"]
    assert [alias for alias in refused if is_alias(alias)] == []
