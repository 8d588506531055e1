"""The catalog's database as transactions: one to read, one to write. Knows no tables' meaning."""

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager

from sqlalchemy import Connection
from sqlalchemy.exc import DBAPIError

from quickchange_adapters.catalog_schema import open_database
from quickchange_adapters.errors import StoreFull, StoreUnavailable
from quickchange_adapters.fault_points import step

SQLSTATE_DISK_FULL = "53100"


class CatalogDatabase:
    """An open database.

    Everything raises StoreUnavailable when it does not answer, StoreFull when it has no room.
    """

    def __init__(self, url: str) -> None:
        with _unavailable():
            self._engine = open_database(url)

    def close(self) -> None:
        """Close all connections."""
        self._engine.dispose()

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """Give a connection for queries that see one state."""
        with _unavailable(), self._engine.connect() as connection:
            yield connection

    @contextmanager
    def writing(self, what: str = "write") -> Iterator[Connection]:
        """One transaction: all of it is committed when the block ends, or nothing is.

        `what` names the step of its commit among the fault points.
        """
        with (
            _unavailable(),
            self._engine.connect().execution_options(is_write=True) as connection,
            connection.begin() as transaction,
        ):
            yield connection
            with step(f"{what}.commit"):
                transaction.commit()


@contextmanager
def _unavailable() -> Iterator[None]:
    """Turn the database's errors into ours; the text names no path and no row."""
    try:
        yield
    except DBAPIError as error:
        reason = str(error.orig).split("\n")[0]
        if _is_full(error.orig):
            raise StoreFull(f"the catalog has no room: {reason}") from error
        raise StoreUnavailable(f"the catalog does not answer: {reason}") from error


def _is_full(error: BaseException | None) -> bool:
    if isinstance(error, sqlite3.Error):
        return getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL
    return getattr(error, "sqlstate", None) == SQLSTATE_DISK_FULL
