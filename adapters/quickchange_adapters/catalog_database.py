"""The catalog's database as transactions: one to read, one to write. Knows no tables' meaning."""

import logging
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager

from sqlalchemy import Connection, RootTransaction
from sqlalchemy.exc import DataError, DBAPIError, IntegrityError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from quickchange_adapters.catalog_engine import DEFAULT_TIMEOUTS, CatalogTimeouts, open_engine
from quickchange_adapters.catalog_schema import create_tables
from quickchange_adapters.errors import StoreFull, StoreUnavailable
from quickchange_adapters.fault_points import step

log = logging.getLogger(__name__)

SQLSTATE_DISK_FULL = "53100"
_REASONS = {
    None: "there is no connection to it",
    SQLSTATE_DISK_FULL: "its disk is full",
    "55P03": "another writer holds it",
    "57014": "it took too long",
}
"""What PostgreSQL's states mean to somebody who must not learn where the database is."""


class CatalogDatabase:
    """An open database.

    Everything raises StoreUnavailable when it does not answer, StoreFull when it has no room.

    `is_up` says whether it answered when it was last asked.
    """

    def __init__(self, url: str, timeouts: CatalogTimeouts = DEFAULT_TIMEOUTS) -> None:
        self.is_up = True
        self._engine = open_engine(url, timeouts)
        try:
            with self._beginning_write() as (connection, _):
                create_tables(connection)
        except BaseException:
            self._engine.dispose()
            raise

    def close(self) -> None:
        """Close all connections."""
        self._engine.dispose()

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """Give a connection for queries that see one state."""
        with self._answering(), self._engine.connect() as connection:
            yield connection

    @contextmanager
    def writing(self, what: str | None = None) -> Iterator[Connection]:
        """One transaction: all of it is committed when the block ends, or nothing is.

        `what` names the step of its commit, if that is one of the fault points.
        """
        with self._beginning_write() as (connection, transaction):
            yield connection
            if what is not None:
                with step(f"{what}.commit"):
                    transaction.commit()

    @contextmanager
    def _beginning_write(self) -> Iterator[tuple[Connection, RootTransaction]]:
        with (
            self._answering(),
            self._engine.connect().execution_options(is_write=True) as connection,
            connection.begin() as transaction,
        ):
            yield connection, transaction

    @contextmanager
    def _answering(self) -> Iterator[None]:
        """Turn the database's errors into ours, and note whether there were any."""
        try:
            yield
        except (IntegrityError, DataError) as error:
            self._note(True)
            raise StoreUnavailable("the catalog refused what was to be written") from error
        except (DBAPIError, PoolTimeout) as error:
            self._note(False, error)
            raise _unavailable(error) from error
        self._note(True)

    def _note(self, is_up: bool, error: Exception | None = None) -> None:
        """Tell the operator, once, when the database goes away and when it is back."""
        was_up, self.is_up = self.is_up, is_up
        if was_up and not is_up:
            detail = getattr(error, "orig", error)
            log.warning("the catalog does not answer: %s", str(detail).strip().split("\n")[0])
        elif is_up and not was_up:
            log.warning("the catalog answers again")


def _unavailable(error: DBAPIError | PoolTimeout) -> StoreUnavailable:
    """Return what the caller gets, in words that name no host, no path and no row."""
    if isinstance(error, PoolTimeout):
        return StoreUnavailable("the catalog does not answer: all connections are in use")
    cause = error.orig
    if isinstance(cause, sqlite3.Error):
        reason = str(cause).split("\n")[0]
        is_full = getattr(cause, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL
    else:
        state = getattr(cause, "sqlstate", None)
        is_full = state == SQLSTATE_DISK_FULL
        reason = _REASONS.get(state, f"{type(cause).__name__} ({state})")
    if is_full:
        return StoreFull(f"the catalog has no room: {reason}")
    return StoreUnavailable(f"the catalog does not answer: {reason}")
