"""Blobs in an object store, through fsspec: asked patiently, believed only by their sha256.

    PREFIX/blobs/ab/abcd…    immutable, named by the sha256 of its bytes

Nothing is renamed, and no listing is remembered. A blob appears by one request: a PUT, or the end
of an upload in parts when it is large; one that breaks off before leaves nothing visible. Knows no
local copies (disk_cache.py).
"""

import logging
import random
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import fsspec
from fsspec.asyn import AsyncFileSystem
from fsspec.registry import known_implementations

from quickchange_adapters.errors import BlobMissing, StoreRefused, StoreUnavailable
from quickchange_adapters.store import BlobInfo

log = logging.getLogger(__name__)
T = TypeVar("T")

READ_BYTES = 8 << 20
PART_BYTES = 32 << 20
"""Blobs of twice this size and more go up in parts, two at a time."""
EXTRAS = {"s3": "quickchange-server[s3]", "s3a": "quickchange-server[s3]"}

_SHA256 = re.compile(r"[0-9a-f]{64}")
_TIMES = ("LastModified", "last_modified", "updated", "created")


@dataclass(frozen=True, slots=True)
class Patience:
    """How long an object store that fails is asked again.

    Attributes:
        max_attempts: how often one request is made.
        pause_s: before the second attempt; it doubles with each, and varies by half.
        give_up_s: after so long no further attempt begins.
        connect_s: for a connection.
        reply_s: for the next bytes of a reply, and for a whole request beside its transfer.
        min_bytes_per_s: slower transfers are given up.
        delete_s: for each of the two requests of a delete, which is made once: other writers of the
            catalog wait meanwhile, and a sweep repeats what failed.
    """

    max_attempts: int = 5
    pause_s: float = 0.2
    give_up_s: float = 30.0
    connect_s: float = 5.0
    reply_s: float = 30.0
    min_bytes_per_s: float = 256 << 10
    delete_s: float = 3.0


class ObjectBlobs:
    """The blobs under one URL. Every method blocks, and raises StoreUnavailable in the end.

    `is_up` says whether the store answered when it was last asked.
    """

    is_up = True

    def __init__(
        self, url: str, patience: Patience | None = None, part_bytes: int = PART_BYTES
    ) -> None:
        self._patience = patience or Patience()
        self._part_bytes = part_bytes
        self._fs, self._root = _open(url, self._patience)
        self._suspects: set[str] = set()

    def check(self) -> None:
        """Say now, rather than at the first upload, that the place is not there or not ours.

        Raises: StoreRefused; StoreUnavailable when it does not answer.
        """
        try:
            self._ask(lambda: self._fs.find(f"{self._root}/blobs/00", **self._limit()))
        except FileNotFoundError as error:
            raise _no_bucket() from error

    def size(self, sha256: str) -> int:
        """Return how many bytes a blob has.

        Raises: BlobMissing.
        """
        path = self._path(sha256)
        try:
            info = self._ask(lambda: self._fs.info(path, **self._limit()))
        except FileNotFoundError as error:
            raise BlobMissing(sha256) from error
        return int(info["size"])

    def read(self, sha256: str, num_bytes: int) -> Iterator[bytes]:
        """Yield a blob's bytes; a part that breaks off is asked for again.

        Raises: BlobMissing.
        """
        path = self._path(sha256)
        for start in range(0, num_bytes, READ_BYTES):
            end = min(start + READ_BYTES, num_bytes)
            try:
                yield self._ask(partial(self._read, path, start, end))
            except FileNotFoundError as error:
                raise BlobMissing(sha256) from error

    def put(self, sha256: str, file: Path, num_bytes: int) -> None:
        """Keep a file's bytes. What is there in full already is not sent again, unless `suspect`.

        Raises: BlobMissing when `sha256` is no digest.
        """
        path = self._path(sha256)
        if sha256 not in self._suspects and self._has(sha256, num_bytes):
            return
        parts = {"chunksize": self._part_bytes, "max_concurrency": 2} if self._is_s3 else {}
        limit = self._limit(num_bytes)
        try:
            self._ask(lambda: self._fs.put_file(str(file), path, **parts, **limit))
        except FileNotFoundError as error:
            raise _no_bucket() from error
        self._suspects.discard(sha256)

    def suspect(self, sha256: str) -> None:
        """Remember that a blob has other bytes than its name says: the next `put` replaces it."""
        self._suspects.add(sha256)

    def delete(self, sha256: str) -> int:
        """Remove a blob and return its size; 0 when there is none."""
        path, limit = self._path(sha256), self._limit(total_s=self._patience.delete_s)
        try:
            info = self._ask(lambda: self._fs.info(path, **limit), max_attempts=1)
            self._ask(lambda: self._fs.rm_file(path, **limit), max_attempts=1)
        except FileNotFoundError:
            return 0
        return int(info["size"])

    def list(self) -> Iterator[BlobInfo]:
        """Yield every blob; objects with other names are not ours and are left out."""
        root = f"{self._root}/blobs"
        try:
            found = self._ask(lambda: self._fs.find(root, detail=True, **self._limit()))
        except FileNotFoundError:
            return
        for path, info in found.items():
            folder, _, name = path.removeprefix(f"{root}/").partition("/")
            if _SHA256.fullmatch(name) and folder == name[:2]:
                yield BlobInfo(name, int(info["size"]), _modified_at(info))

    @property
    def _is_s3(self) -> bool:
        return "s3" in self._fs.protocol

    def _has(self, sha256: str, num_bytes: int) -> bool:
        try:
            return self.size(sha256) == num_bytes
        except BlobMissing:
            return False

    def _read(self, path: str, start: int, end: int) -> bytes:
        limit = self._limit(end - start)
        data: bytes = self._fs.cat_file(path, start=start, end=end, **limit)
        if len(data) != end - start:
            raise _Truncated(f"{len(data)} bytes came, not {end - start}")
        return data

    def _limit(self, num_bytes: int = 0, total_s: float | None = None) -> dict[str, float]:
        """Return how long a request may take, if this kind of store can be told."""
        if not isinstance(self._fs, AsyncFileSystem):
            return {}
        patience = self._patience
        return {"timeout": total_s or patience.reply_s + num_bytes / patience.min_bytes_per_s}

    def _ask(self, call: Callable[[], T], max_attempts: int | None = None) -> T:
        """Make a request, again and again while it fails in ways that may pass.

        Raises: FileNotFoundError, StoreRefused, StoreUnavailable.
        """
        try:
            result = self._ask_patiently(call, max_attempts or self._patience.max_attempts)
        except StoreUnavailable:
            self.is_up = False
            raise
        except FileNotFoundError:
            self.is_up = True
            raise
        self.is_up = True
        return result

    def _ask_patiently(self, call: Callable[[], T], max_attempts: int) -> T:
        patience, started_s = self._patience, time.monotonic()
        for attempt in range(1, max_attempts + 1):
            try:
                return call()
            except FileNotFoundError:
                raise
            except PermissionError as error:
                raise StoreRefused("the object store refuses access") from error
            except Exception as error:  # each kind of store has its own
                waited_s = time.monotonic() - started_s
                if attempt == max_attempts or waited_s > patience.give_up_s:
                    log.warning("the object store does not answer: %s", error)
                    name = type(error).__name__
                    raise StoreUnavailable(f"the object store does not answer: {name}") from error
                time.sleep(patience.pause_s * 2 ** (attempt - 1) * random.uniform(0.5, 1.0))
        raise AssertionError("the loop returns or raises")

    def _path(self, sha256: str) -> str:
        if not _SHA256.fullmatch(sha256):
            raise BlobMissing(sha256)
        return f"{self._root}/blobs/{sha256[:2]}/{sha256}"


class _Truncated(Exception):
    """Fewer bytes came than were announced."""


def _open(url: str, patience: Patience) -> tuple[Any, str]:
    """Return the file system behind a URL, and the path in it.

    Raises: StoreRefused when it is not known, or what it needs is not installed.
    """
    scheme = url.partition("://")[0]
    if scheme not in known_implementations:
        raise StoreRefused(f"{scheme}:// is not known: use s3://BUCKET/PREFIX or a folder")
    options: dict[str, Any] = {"use_listings_cache": False, "skip_instance_cache": True}
    if scheme in EXTRAS:
        # Attempts are ours to count.
        options["config_kwargs"] = {
            "connect_timeout": patience.connect_s,
            "read_timeout": patience.reply_s,
            "retries": {"total_max_attempts": 1},
        }
    try:
        fs, root = fsspec.url_to_fs(url.rstrip("/"), **options)
    except ImportError as error:
        wanted = EXTRAS.get(scheme)
        hint = f"pip install '{wanted}'" if wanted else known_implementations[scheme].get("err", "")
        raise StoreRefused(f"{scheme}:// needs a package that is not here: {hint}") from error
    if scheme in EXTRAS:
        fs.retries = 1
    return fs, root


def _no_bucket() -> StoreRefused:
    return StoreRefused("there is no such bucket")


def _modified_at(info: dict[str, Any]) -> float | None:
    times = (info.get(key) for key in _TIMES)
    return next((t.timestamp() for t in times if isinstance(t, datetime)), None)
