"""The keys that are good now, in memory, so that no request waits for the catalog.

Lives on the event loop. Knows no catalog and no HTTP.
"""

from collections.abc import Iterable
from hmac import compare_digest

from quickchange_adapters.api_keys import KeyRecord, token_hash, token_id

from quickchange_server.principal import Principal

FILE_KEY_ID = "admin-key-file"
_NOBODY = "0" * 64
"""Compared with where there is no key: no text has this sha256."""


class Keyring:
    """Good keys by id, and the admin key that a file holds, as hashes.

    `file_hash`: the sha256 of the file's key; it may do everything as the default tenant.
    """

    def __init__(self, file_hash: str | None = None) -> None:
        self.has_file_key = file_hash is not None
        self._file_hash = file_hash or _NOBODY
        self._keys: dict[str, KeyRecord] = {}

    def load(self, records: Iterable[KeyRecord]) -> None:
        """Forget all keys but the file's, and take these; revoked ones are left out."""
        self._keys = {record.id: record for record in records if record.revoked_at is None}

    @property
    def is_empty(self) -> bool:
        """Whether there is no key at all, so that nobody can be asked for one."""
        return not self._keys and not self.has_file_key

    def authenticate(self, token: str) -> Principal | None:
        """Return whose key this is; None if it is nobody's.

        Every text costs one hash, one look-up and two comparisons that take the same time wherever
        they differ.
        """
        hashed = token_hash(token)
        record = self._keys.get(token_id(token) or "")
        is_key = compare_digest(hashed, record.secret_hash if record else _NOBODY)
        is_file_key = compare_digest(hashed, self._file_hash)
        if is_file_key:
            return Principal(key_id=FILE_KEY_ID)
        return _principal(record) if record is not None and is_key else None


def _principal(record: KeyRecord) -> Principal:
    adapters = None if record.adapters is None else frozenset(record.adapters)
    return Principal(record.tenant, frozenset(record.scopes), record.id, adapters)
