"""Opens the store and the catalog that the settings name. Knows no adapters."""

import sqlite3
from contextlib import closing
from pathlib import Path

from quickchange_adapters.catalog import Catalog
from quickchange_adapters.errors import StoreUnavailable
from quickchange_adapters.store import LocalStore

from quickchange_server.config import ServerConfig
from quickchange_server.errors import CannotStart, ConfigInvalid

SQLITE_PREFIX = "sqlite:///"


def open_storage(config: ServerConfig) -> tuple[LocalStore, Catalog]:
    """Open both for serving; what is not there is made.

    Raises: CannotStart.
    """
    try:
        store = LocalStore(config.store_folder)
        store.check_writable()
    except StoreUnavailable as error:
        raise CannotStart(
            f"--store {config.store_folder}: {error}; name a folder that can be written"
        ) from error
    try:
        return store, Catalog(config.catalog_url)
    except StoreUnavailable as error:
        raise CannotStart(f"--catalog: {error}") from error


def open_existing_storage(config: ServerConfig) -> tuple[LocalStore, Catalog]:
    """Open both as they are; a wrong name must not make a new one.

    Raises: ConfigInvalid.
    """
    if not (config.store_folder / "blobs").is_dir():
        raise ConfigInvalid(
            f"--store {config.store_folder}: there is no store in this folder; name the one that "
            "`quickchange serve` was given"
        )
    if config.catalog_url.startswith(SQLITE_PREFIX):
        _check_sqlite_file(Path(config.catalog_url.removeprefix(SQLITE_PREFIX)))
    try:
        return LocalStore(config.store_folder), Catalog(config.catalog_url)
    except StoreUnavailable as error:
        raise ConfigInvalid(f"store {config.store_folder} and its catalog: {error}") from error


def _check_sqlite_file(path: Path) -> None:
    """Refuse what is no catalog, before anything is written to it.

    Raises: ConfigInvalid.
    """
    try:
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as database:
            found = database.execute("SELECT count(*) FROM schema_version").fetchone()
    except sqlite3.Error as error:
        raise ConfigInvalid(
            f"--catalog {path}: there is no catalog in this file ({error}); name the one that "
            "`quickchange serve` was given"
        ) from error
    if not found[0]:
        raise ConfigInvalid(f"--catalog {path}: the catalog is empty: it was never opened fully")
