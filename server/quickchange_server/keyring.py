"""The keys that are good now, in memory, so that no request waits for the catalog.

Lives on the event loop. Knows no catalog and no HTTP.
"""

from collections.abc import Sequence
from hmac import compare_digest

from quickchange_adapters.api_keys import KeyRecord, token_hash, token_id
from quickchange_adapters.names import DEFAULT_TENANT

from quickchange_server.principal import Principal

FILE_KEY_ID = "admin-key-file"
_NOBODY = "0" * 64
"""Compared with where there is no key: no text has this sha256."""


class Keyring:
    """Good keys by id, and the admin key that a file holds, as hashes.

    `file_hash`: the sha256 of the file's key; it may do everything as the default tenant.
    `is_open`: nobody has made a key yet, so nobody is asked for one. That ends with the first key,
    and does not come back when all are revoked.
    """

    def __init__(self, file_hash: str | None = None) -> None:
        self.has_file_key = file_hash is not None
        self.is_open = file_hash is None
        self._file_hash = file_hash or _NOBODY
        self._keys: dict[str, KeyRecord] = {}

    def tenants(self) -> frozenset[str]:
        """Return whose keys there are, the file's included; from any thread."""
        owners = frozenset(record.tenant for record in list(self._keys.values()))
        return owners | {DEFAULT_TENANT} if self.has_file_key else owners

    def load(self, records: Sequence[KeyRecord]) -> None:
        """Forget all keys but the file's, and take these, of which revoked ones are not good."""
        self._keys = {record.id: record for record in records if record.revoked_at is None}
        self.is_open = self.is_open and not records

    def put(self, record: KeyRecord) -> None:
        """Take one key's new state: it is good from now on, or no longer."""
        self.is_open = False
        if record.revoked_at is None:
            self._keys[record.id] = record
        else:
            self._keys.pop(record.id, None)

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
