"""Opens the store and the catalog that the settings name. Knows no adapters."""

import logging
import sqlite3
from contextlib import closing
from pathlib import Path

from quickchange_adapters.catalog import Catalog
from quickchange_adapters.errors import StoreRefused, StoreUnavailable
from quickchange_adapters.store import LocalStore, Store

from quickchange_server.config import ServerConfig
from quickchange_server.errors import CannotStart, ConfigInvalid

SQLITE_PREFIX = "sqlite:///"
log = logging.getLogger(__name__)


def open_storage(config: ServerConfig) -> tuple[Store, Catalog]:
    """Open both for serving; what is not there is made, except in an object store.

    Raises: CannotStart.
    """
    store = _open_store(config)
    try:
        return store, _open_catalog(config)
    except (StoreUnavailable, OSError) as error:
        raise CannotStart(f"--catalog: {error}") from error


def open_existing_storage(config: ServerConfig) -> tuple[Store, Catalog]:
    """Open both as they are; a wrong name must not make a new one.

    Raises: ConfigInvalid.
    """
    if config.store_url is None and not (config.store_folder / "blobs").is_dir():
        raise ConfigInvalid(
            f"--store {config.store_folder}: there is no store in this folder; name the one that "
            "`quickchange serve` was given"
        )
    file = sqlite_file(config.catalog_url)
    if file is not None:
        _check_sqlite_file(file)
    try:
        if config.store_url is None:
            return LocalStore(config.store_folder), Catalog(config.catalog_url)
        store = _open_object_store(config, config.store_url, "fsck")
        store.check_writable()
        return store, Catalog(config.catalog_url)
    except StoreUnavailable as error:
        where = config.store_url or config.store_folder
        raise ConfigInvalid(f"store {where} and its catalog: {error}") from error


def _open_store(config: ServerConfig) -> Store:
    if config.store_url is not None:
        return _open_reachable(config, config.store_url)
    try:
        store = LocalStore(config.store_folder)
        store.check_writable()
    except StoreUnavailable as error:
        raise CannotStart(
            f"--store {config.store_folder}: {error}; name a folder that can be written"
        ) from error
    return store


def _open_reachable(config: ServerConfig, url: str) -> Store:
    """Open an object store. One that does not answer now may later: uploads wait, not the start.

    Raises: CannotStart when no waiting will help.
    """
    try:
        store = _open_object_store(config, url)
    except StoreUnavailable as error:
        raise CannotStart(f"--store {url}: {error}") from error
    try:
        store.check_writable()
    except StoreRefused as error:
        raise CannotStart(f"--store {url}: {error}") from error
    except StoreUnavailable as error:
        log.warning("--store %s: %s; serving what is on this disk until it does", url, error)
    return store


def _open_object_store(config: ServerConfig, url: str, purpose: str = "") -> Store:
    """Open an object store with its cache; each purpose has a cache of its own."""
    from quickchange_adapters.disk_cache import DiskCache
    from quickchange_adapters.object_blobs import ObjectBlobs
    from quickchange_adapters.remote_store import RemoteStore

    folder = config.store_cache_folder
    blobs = ObjectBlobs(url)
    name = f"{folder.name}.{purpose}" if purpose else folder.name
    return RemoteStore(blobs, DiskCache(folder.with_name(name), config.store_cache_bytes, blobs))


def _open_catalog(config: ServerConfig) -> Catalog:
    if config.catalog is None:
        config.store_folder.mkdir(parents=True, exist_ok=True)
    return Catalog(config.catalog_url)


def is_new_catalog(url: str) -> bool:
    """Whether a catalog is a file that is not there yet; what a database holds is not asked."""
    file = sqlite_file(url)
    return file is not None and not file.exists()


def sqlite_file(url: str) -> Path | None:
    """Return the file of a catalog's URL, which may end in a query; None: it names a server."""
    if not url.startswith(SQLITE_PREFIX):
        return None
    return Path(url.removeprefix(SQLITE_PREFIX).partition("?")[0])


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
