"""The catalog's database as transactions: one to read, one to write. Knows no tables' meaning."""

from collections.abc import Iterator
from contextlib import contextmanager

from sqlalchemy import Connection
from sqlalchemy.exc import DBAPIError

from quickchange_adapters.catalog_schema import open_database
from quickchange_adapters.errors import StoreUnavailable


class CatalogDatabase:
    """An open database. Everything raises StoreUnavailable when it does not answer."""

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
    def writing(self) -> Iterator[Connection]:
        """One transaction: all of it is committed when the block ends, or nothing is."""
        with (
            _unavailable(),
            self._engine.connect().execution_options(is_write=True) as connection,
            connection.begin(),
        ):
            yield connection


@contextmanager
def _unavailable() -> Iterator[None]:
    """Turn the database's errors into ours; the text names no path and no row."""
    try:
        yield
    except DBAPIError as error:
        reason = str(error.orig).split("\n")[0]
        raise StoreUnavailable(f"the catalog does not answer: {reason}") from error
