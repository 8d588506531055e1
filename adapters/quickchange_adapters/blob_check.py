"""Reads a blob to its end and says whether it still has the bytes of its name."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from quickchange_adapters.errors import BlobDamaged, BlobMissing
from quickchange_adapters.findings import Finding
from quickchange_adapters.store import Store

CHUNK_BYTES = 1 << 20
SEND_AGAIN = "upload the same files again under any of these names, or delete these versions"
LOOK = "look at the disk and at the file's permissions; if it is lost, " + SEND_AGAIN

OnProgress = Callable[[int], None]
"""Told of the bytes that were read since it was last told."""


@dataclass(frozen=True, slots=True)
class BlobCheck:
    """What a blob turned out to be; `finding` None: whole. `stamp` tells this file from another."""

    sha256: str
    num_bytes: int = 0
    stamp: tuple[int, ...] = ()
    finding: Finding | None = None


def check_blob(
    store: Store, sha256: str, used_by: tuple[str, ...], on_progress: OnProgress
) -> BlobCheck:
    """Read a blob that versions need.

    Raises: StoreUnavailable.
    """
    try:
        with store.lease(sha256) as path:
            stamp = stamp_of(path)
            found, num_bytes = _read(path, on_progress)
        store.evict(sha256)
    except BlobDamaged:
        message = "the blob's bytes have another sha256"
        return BlobCheck(
            sha256, finding=Finding("blob_damaged", sha256, message, SEND_AGAIN, used_by)
        )
    except (BlobMissing, FileNotFoundError):
        message = "the store has no such blob"
        return BlobCheck(
            sha256, finding=Finding("blob_missing", sha256, message, SEND_AGAIN, used_by)
        )
    except OSError as error:
        message = f"the blob cannot be read: {error.strerror or type(error).__name__}"
        return BlobCheck(sha256, finding=Finding("blob_unreadable", sha256, message, LOOK, used_by))
    if found == sha256:
        return BlobCheck(sha256, num_bytes, stamp)
    message = f"the blob's {num_bytes} bytes have the sha256 {found[:12]}…"
    finding = Finding("blob_damaged", sha256, message, SEND_AGAIN, used_by)
    return BlobCheck(sha256, num_bytes, stamp, finding)


def stamp_of(path: Path) -> tuple[int, ...]:
    """Return what changes when a file is replaced or written to.

    Raises: OSError.
    """
    found = path.stat()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _read(path: Path, on_progress: OnProgress) -> tuple[str, int]:
    sha256, num_bytes = hashlib.sha256(), 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            sha256.update(chunk)
            num_bytes += len(chunk)
            on_progress(len(chunk))
    return sha256.hexdigest(), num_bytes
