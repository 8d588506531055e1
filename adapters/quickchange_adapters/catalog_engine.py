"""How each kind of database is opened, and how its transactions begin. Knows no tables.

| | SQLite | PostgreSQL |
|---|---|---|
| a write begins with | `BEGIN IMMEDIATE` | an advisory lock that all writers take, read committed |
| so that | what a writer has read stays true until it commits | the same |
| a read sees | one state (WAL) | one state (repeatable read, read only) |
| a commit means | synced to the disk | what the server's `synchronous_commit` says |
| waits end | when the file was busy for 5 s | by the server's timeouts, by TCP's, and by our own |

Errors name no password: a URL is never part of one, nor are the values of a statement.
"""

import importlib.util
import math
import sqlite3
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import cast

from sqlalchemy import URL, Connection, Engine, create_engine, event, make_url
from sqlalchemy.engine.interfaces import DBAPIConnection, DBAPICursor
from sqlalchemy.exc import ArgumentError, NoSuchModuleError

from quickchange_adapters.errors import StoreUnavailable

POSTGRESQL_SCHEMES = ("postgresql", "postgres", "postgresql+psycopg")
WAL_POLL_S = 0.02
WRITER_LOCK = int.from_bytes(b"quickchg", "big")


@dataclass(frozen=True, slots=True)
class CatalogTimeouts:
    """How long a call may wait before the database counts as not answering, in seconds.

    Attributes:
        connect_s: for a connection; in SQLite, for the file while another process writes.
        lock_s: for other writers.
        statement_s: for one statement, its wait for other writers included.
        reply_s: for any reply; ends what the server itself no longer ends.
        idle_s: after so long, a writer that fell silent gives its lock back.
    """

    connect_s: float = 5
    lock_s: float = 10
    statement_s: float = 15
    reply_s: float = 20
    idle_s: float = 60


DEFAULT_TIMEOUTS = CatalogTimeouts()

# A peer that vanished is noticed within about twenty seconds, whatever was under way.
_DEAD_PEER = {
    "keepalives_idle": 10,
    "keepalives_interval": 3,
    "keepalives_count": 3,
    "tcp_user_timeout": 15_000,
}


def open_engine(url: str, timeouts: CatalogTimeouts = DEFAULT_TIMEOUTS) -> Engine:
    """Return an engine whose transactions are as above; connects when it is first used.

    A connection with the execution option `is_write` begins writes, any other reads.

    Raises: StoreUnavailable when the URL cannot be used here.
    """
    parsed = _parse(url)
    if parsed.get_backend_name() == "sqlite":
        return _open_sqlite(parsed, timeouts)
    return _open_postgresql(parsed, timeouts)


def _parse(url: str) -> URL:
    """Read a URL; any spelling of PostgreSQL's scheme means the driver psycopg."""
    try:
        parsed = make_url(url)
        if parsed.drivername in POSTGRESQL_SCHEMES:
            parsed = parsed.set(drivername="postgresql+psycopg")
        known = parsed.get_backend_name() in ("sqlite", "postgresql")
    except (ArgumentError, NoSuchModuleError, ValueError):
        known = False
    if not known:
        raise StoreUnavailable(
            "the catalog's URL cannot be read: "
            "use sqlite:///PATH or postgresql://USER:PASSWORD@HOST:PORT/DATABASE"
        )
    return parsed


def _open_sqlite(url: URL, timeouts: CatalogTimeouts) -> Engine:
    connect_args = {"timeout": timeouts.connect_s}
    engine = create_engine(url, connect_args=connect_args, hide_parameters=True)
    event.listen(engine, "connect", partial(_prepare_sqlite, timeouts.connect_s))
    event.listen(engine, "begin", _begin_sqlite)
    return engine


def _prepare_sqlite(timeout_s: float, connection: DBAPIConnection, record: object) -> None:
    """Make a commit mean that the rows are on the disk, and readers not wait for writers."""
    connection.isolation_level = None
    cursor = connection.cursor()
    _enter_wal(cursor, timeout_s)
    cursor.execute("PRAGMA synchronous=FULL")
    cursor.execute("PRAGMA foreign_keys=ON")
    cursor.close()


def _enter_wal(cursor: DBAPICursor, timeout_s: float) -> None:
    """Have the file keep a write-ahead log, waiting for who writes to it before it does.

    SQLite itself does not wait then: servers that make one new catalog together would refuse it.
    """
    end = time.monotonic() + timeout_s
    while True:
        try:
            cursor.execute("PRAGMA journal_mode=WAL")
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > end:
                raise
        time.sleep(WAL_POLL_S)


def _begin_sqlite(connection: Connection) -> None:
    """Take the write lock at the start of a write, so that what it read stays true."""
    connection.exec_driver_sql("BEGIN IMMEDIATE" if _is_write(connection) else "BEGIN")


def _open_postgresql(url: URL, timeouts: CatalogTimeouts) -> Engine:
    if importlib.util.find_spec("psycopg") is None:
        raise StoreUnavailable(
            "a catalog in PostgreSQL needs the package psycopg: "
            "pip install 'quickchange-server[postgres]'"
        )
    engine = create_engine(
        url,
        creator=_postgresql_creator(url, timeouts),
        pool_pre_ping=True,
        hide_parameters=True,
        pool_timeout=timeouts.connect_s,
    )
    event.listen(engine, "begin", _postgresql_begin(timeouts))
    return engine


def _postgresql_creator(url: URL, timeouts: CatalogTimeouts) -> Callable[[], DBAPIConnection]:
    """Return what makes a connection. What the URL says wins over our settings."""
    from quickchange_adapters.bounded_connection import BoundedConnection

    settings = {
        "connect_timeout": math.ceil(timeouts.connect_s),
        "application_name": "quickchange",
        **_DEAD_PEER,
        **url.get_dialect()().create_connect_args(url)[1],
        # Nothing is prepared on the server: a pooler may be in between.
        "prepare_threshold": None,
    }

    def connect() -> DBAPIConnection:
        connection = BoundedConnection.connect(**settings)
        connection.reply_s = timeouts.reply_s
        return cast(DBAPIConnection, connection)

    return connect


def _postgresql_begin(timeouts: CatalogTimeouts) -> Callable[[Connection], None]:
    """Return what is done at the start of each transaction, in one round trip."""
    limits = (
        f"SET LOCAL statement_timeout = '{timeouts.statement_s * 1000:.0f}ms';"
        f"SET LOCAL lock_timeout = '{timeouts.lock_s * 1000:.0f}ms';"
        f"SET LOCAL idle_in_transaction_session_timeout = '{timeouts.idle_s * 1000:.0f}ms'"
    )
    # Read committed: what is read after the lock was taken has all that the last writer committed.
    write = f"{limits}; SELECT pg_advisory_xact_lock({WRITER_LOCK})"
    read = f"SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY; {limits}"

    def begin(connection: Connection) -> None:
        connection.exec_driver_sql(write if _is_write(connection) else read)

    return begin


def _is_write(connection: Connection) -> bool:
    return bool(connection.get_execution_options().get("is_write", False))
