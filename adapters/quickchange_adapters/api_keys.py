"""API keys: what one may do, how it is spelled, and what is kept of it. Knows no catalog, no HTTP.

A key is shown once, as `qc-ID-SECRET`. The id is no secret: it finds the row, so that checking a
key costs the same whether it is right, wrong or unknown. Of the key itself only a sha256 is kept;
that is enough, since nobody can guess 256 random bits, however fast the hash.
"""

import hashlib
import re
import secrets
from dataclasses import dataclass
from typing import Literal, get_args

KeyScope = Literal["generate", "adapters:read", "adapters:write", "admin", "metrics"]
KEY_SCOPES: tuple[KeyScope, ...] = get_args(KeyScope)

_ID = re.compile(r"[0-9a-f]{16}")
_TOKEN = re.compile(r"qc-([0-9a-f]{16})-[A-Za-z0-9_-]{43}")


@dataclass(frozen=True, slots=True)
class KeyRecord:
    """One key as it is kept. Times are seconds since 1970.

    `adapters` None: not limited to named adapters. `created_by` and `revoked_by` are ids of keys.
    """

    id: str
    tenant: str
    secret_hash: str
    scopes: tuple[KeyScope, ...]
    adapters: tuple[str, ...] | None
    name: str
    created_at: int
    created_by: str = ""
    revoked_at: int | None = None
    revoked_by: str = ""


def new_token() -> str:
    """Return a fresh key: 64 bits of id, 256 bits of secret."""
    return f"qc-{secrets.token_hex(8)}-{secrets.token_urlsafe(32)}"


def is_key_id(text: str) -> bool:
    """Whether a key may have this id."""
    return _ID.fullmatch(text) is not None


def token_id(token: str) -> str | None:
    """Return the id inside a key; None for text that no key looks like."""
    match = _TOKEN.fullmatch(token)
    return match[1] if match else None


def token_hash(token: str) -> str:
    """Return what is kept of a key: sha256, in hex."""
    return hashlib.sha256(token.encode()).hexdigest()
