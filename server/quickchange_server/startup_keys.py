"""Which keys a server starts with, settled before the base is fetched."""

from quickchange_adapters.api_keys import KeyRecord
from quickchange_adapters.catalog import Catalog
from quickchange_adapters.errors import StoreUnavailable
from quickchange_adapters.key_catalog import KeyCatalog

from quickchange_server.admin_key_file import read_admin_key
from quickchange_server.config import ServerConfig
from quickchange_server.errors import ConfigInvalid
from quickchange_server.keyring import Keyring
from quickchange_server.storage import is_new_catalog


def open_keyring(config: ServerConfig) -> Keyring:
    """Return a keyring with the file's key; the catalog's come when the server starts.

    Raises: ConfigInvalid when the file holds no key, or a public address would ask nobody for one.
    """
    file = config.admin_key_file
    keyring = Keyring(None if file is None else read_admin_key(file))
    if config.is_public and not config.insecure and not keyring.has_file_key:
        _require_stored_key(config)
    return keyring


def _require_stored_key(config: ServerConfig) -> None:
    why = "no key is configured"
    try:
        if any(record.revoked_at is None for record in _stored_keys(config)):
            return
    except StoreUnavailable as error:
        why = f"no key could be read ({error})"
    raise ConfigInvalid(
        f"--host {config.host} can be reached from other machines and {why}; use 127.0.0.1, give "
        "the first key with --admin-key-file FILE, or accept that anybody may use and change this "
        "server: --insecure"
    )


def _stored_keys(config: ServerConfig) -> list[KeyRecord]:
    if is_new_catalog(config.catalog_url):
        return []
    catalog = Catalog(config.catalog_url)
    try:
        return KeyCatalog(catalog.database).list_keys()
    finally:
        catalog.close()
