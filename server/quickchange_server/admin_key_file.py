"""The first key: a secret in a file, so that no command line, log or process list shows it."""

import os
import stat
from pathlib import Path

from quickchange_adapters.api_keys import token_hash

from quickchange_server.errors import ConfigInvalid

MIN_CHARS = 32
MAX_BYTES = 4096


def read_admin_key(file: Path) -> str:
    """Return the sha256 of the key in a file; the key itself is not kept. Its text is in no error.

    Raises: ConfigInvalid.
    """
    try:
        with file.open("rb") as opened:
            mode = stat.S_IMODE(os.fstat(opened.fileno()).st_mode)
            raw = opened.read(MAX_BYTES + 1)
    except OSError as error:
        raise _refusal(file, f"cannot be read: {error.strerror}") from error
    if mode & stat.S_IRWXO:
        raise _refusal(
            file,
            f"is open to every user of this machine (mode {mode:04o}); "
            f"close it with: chmod o-rwx {file}",
        )
    return token_hash(_checked(file, raw))


def _checked(file: Path, raw: bytes) -> str:
    if not raw.strip():
        raise _refusal(file, "is empty; fill it with: (umask 077; openssl rand -hex 32 > FILE)")
    if len(raw) > MAX_BYTES:
        raise _refusal(file, f"has more than {MAX_BYTES} bytes, so it is no key")
    secret = raw.decode("ascii", "replace").strip()
    if not all("!" <= char <= "~" for char in secret):
        raise _refusal(
            file, "must hold one line of printable ASCII without spaces, for it goes into a header"
        )
    if len(secret) < MIN_CHARS:
        raise _refusal(
            file, f"holds {len(secret)} characters; a key needs {MIN_CHARS} or more random ones"
        )
    return secret


def _refusal(file: Path, sentence: str) -> ConfigInvalid:
    return ConfigInvalid(f"--admin-key-file {file}: {sentence}", param="admin_key_file")
