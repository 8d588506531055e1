"""Transactions of the catalog in either database: many processes, outages, and what errors say."""

import logging
import signal
import sqlite3
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from quickchange_adapters.catalog import Catalog, sqlite_url
from quickchange_adapters.catalog_engine import WRITER_LOCK, CatalogTimeouts
from quickchange_adapters.catalog_rows import read_adapters
from quickchange_adapters.catalog_schema import adapters
from quickchange_adapters.errors import NotInCatalog, StoreUnavailable
from quickchange_adapters.records import FileRecord, NewVersion
from sqlalchemy import text, true
from sqlalchemy.exc import IntegrityError

from tests.postgres_server import ENCODED_PASSWORD, PASSWORD, PostgresServer

PATIENT = CatalogTimeouts(connect_s=60, lock_s=60, statement_s=60, reply_s=90)
"""For several writers at once on a machine whose disk is busy."""
SHORT = CatalogTimeouts(connect_s=1, lock_s=0.3, statement_s=0.7, reply_s=1.2, idle_s=2)


def publish(catalog: Catalog, name: str, digit: str = "1") -> int:
    files = (FileRecord("adapter_config.json", digit * 64, 10),)
    new = NewVersion(name, files, "tiny", "b" * 64, (4,), ("q_proj",), {})
    return catalog.publish(new).version.number


def together(count: int, work: Callable[[int], int]) -> list[int]:
    """Run a function in many threads that begin at once."""
    barrier = threading.Barrier(count)

    def begin(index: int) -> int:
        barrier.wait()
        return work(index)

    with ThreadPoolExecutor(count) as threads:
        return list(threads.map(begin, range(count)))


def test_replicas_that_start_at_once_make_the_tables_once(catalog_url: str) -> None:
    def start(index: int) -> int:
        catalog = Catalog(catalog_url, timeouts=PATIENT)
        number = publish(catalog, "a", f"{index:x}")
        catalog.close()
        return number

    assert sorted(together(6, start)) == [1, 2, 3, 4, 5, 6]


def test_a_new_file_in_which_another_server_writes_is_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "catalog.db"
    other = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    other.execute("CREATE TABLE t (x)")
    other.execute("BEGIN IMMEDIATE")
    other.execute("INSERT INTO t VALUES (1)")
    hurried = CatalogTimeouts(connect_s=0.1)
    with pytest.raises(StoreUnavailable, match="locked"):
        publish(Catalog(sqlite_url(path), timeouts=hurried), "a")
    with ThreadPoolExecutor(1) as thread:
        published = thread.submit(lambda: publish(Catalog(sqlite_url(path)), "a"))
        with pytest.raises(TimeoutError):
            published.result(0.3)
        other.execute("COMMIT")
        assert published.result(10) == 1
    other.close()


def test_a_reader_sees_one_state_whatever_others_commit(catalog_url: str) -> None:
    here, there = Catalog(catalog_url), Catalog(catalog_url)
    publish(here, "a")
    with here.database.reading() as connection:
        before = read_adapters(connection, true())
        publish(there, "b")
        there.begin_delete_adapter("a")
        assert read_adapters(connection, true()) == before
    assert [adapter.name for adapter in here.list_adapters()] == ["b"]
    here.close()
    there.close()


def test_what_a_writer_has_read_stays_true_until_it_commits(catalog_url: str) -> None:
    here, there = Catalog(catalog_url), Catalog(catalog_url)
    publish(here, "a")
    with ThreadPoolExecutor(1) as thread, here.database.writing() as connection:
        later = thread.submit(publish, there, "a", "2")
        with pytest.raises(TimeoutError):
            later.result(0.3)
        assert connection.scalar(adapters.select().with_only_columns(adapters.c.next_version)) == 2
    assert later.result(30) == 2
    here.close()
    there.close()


def test_names_that_no_row_can_have_are_not_there(catalog_url: str) -> None:
    catalog = Catalog(catalog_url)
    publish(catalog, "a")
    for name in ("a\0", "\0", "a" * 5000, "ä", ""):
        assert catalog.get(name) is None
        assert catalog.list_events(name) == []
        with pytest.raises(NotInCatalog):
            catalog.delete_alias("a", name)
    assert catalog.database.is_up
    catalog.close()


def test_an_outage_is_unavailable_and_ends_by_itself(
    postgres: PostgresServer, caplog: pytest.LogCaptureFixture
) -> None:
    catalog = Catalog(postgres.empty_database())
    publish(catalog, "a")
    postgres.stop()
    try:
        for call in (catalog.revision, lambda: publish(catalog, "b")):
            with pytest.raises(StoreUnavailable) as caught:
                call()
            assert str(caught.value) == (
                "the catalog does not answer: there is no connection to it"
            )
        assert not catalog.database.is_up
    finally:
        postgres.start()
    assert publish(catalog, "b") == 1
    assert catalog.database.is_up
    told = [record.message for record in caplog.records]
    assert len(told) == 2
    assert f"port {postgres.port} failed" in told[0]
    assert told[1] == "the catalog answers again"
    catalog.close()


def test_a_connection_that_broke_is_not_used_again(postgres: PostgresServer) -> None:
    catalog = Catalog(postgres.empty_database())
    publish(catalog, "a")
    postgres.stop()
    postgres.start()
    assert publish(catalog, "b") == 1
    catalog.close()


def test_a_writer_that_does_not_end_is_not_waited_for(postgres: PostgresServer) -> None:
    catalog = Catalog(postgres.empty_database(), timeouts=SHORT)
    with catalog.database.reading() as connection:
        connection.execute(text(f"SELECT pg_advisory_xact_lock({WRITER_LOCK})"))
        with pytest.raises(StoreUnavailable, match="another writer holds it"):
            publish(catalog, "a")
        assert catalog.list_adapters() == []
    assert publish(catalog, "a") == 1
    catalog.close()


def test_a_server_that_is_frozen_holds_no_thread(postgres: PostgresServer) -> None:
    catalog = Catalog(postgres.empty_database(), timeouts=SHORT)
    publish(catalog, "a")
    postgres.signal(signal.SIGSTOP)
    try:
        for _ in range(2):  # on an old connection, then on none
            with pytest.raises(StoreUnavailable, match="no connection"):
                catalog.revision()
    finally:
        postgres.signal(signal.SIGCONT)
    assert publish(catalog, "b") == 1
    catalog.close()


def test_a_statement_that_takes_too_long_is_ended(postgres: PostgresServer) -> None:
    catalog = Catalog(postgres.empty_database(), timeouts=SHORT)
    with (
        pytest.raises(StoreUnavailable, match="it took too long"),
        catalog.database.reading() as connection,
    ):
        connection.execute(text("SELECT pg_sleep(30)"))
    catalog.close()


@pytest.mark.parametrize("scheme", ["postgresql", "postgres", "postgresql+psycopg"])
def test_every_spelling_of_the_scheme_is_the_same(postgres: PostgresServer, scheme: str) -> None:
    url = postgres.empty_database().replace("postgresql", scheme, 1)
    catalog = Catalog(f"{url}?sslmode=prefer&connect_timeout=3")
    assert catalog.revision() == 0
    catalog.close()


def test_no_error_and_no_log_holds_the_password(
    postgres: PostgresServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    url = postgres.empty_database()
    wrong = [
        url.replace(f":{postgres.port}/", ":1/"),
        url.replace("/postgres", "/no-such-database"),
        url.replace("postgresql://quick", "postgresql://nobody"),
        url.replace("postgresql://", "mysql://"),
        url.replace("127.0.0.1", "[127.0.0.1"),
        url.replace(f":{postgres.port}/", ":port/"),
        f"{url}?no_such_setting=1",
        url.replace(ENCODED_PASSWORD, PASSWORD),
    ]
    for each in wrong:
        with pytest.raises(StoreUnavailable) as caught:
            Catalog(each)
        assert "s3cret" not in str(caught.value)
        assert "pass" not in str(caught.value)
    assert "s3cret" not in caplog.text


def test_an_error_does_not_hold_the_values_of_its_statement(catalog_url: str) -> None:
    catalog = Catalog(catalog_url)
    with pytest.raises(StoreUnavailable) as refused, catalog.database.writing() as connection:
        connection.execute(
            text("INSERT INTO aliases VALUES (:a, :b, :c)"), {"a": 1, "b": "s3cret", "c": 1}
        )
    assert isinstance(refused.value.__cause__, IntegrityError)
    assert "s3cret" not in str(refused.value.__cause__)
    catalog.close()
