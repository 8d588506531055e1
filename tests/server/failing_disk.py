"""A disk and a catalog that fail at one call of many, chosen by its number."""

import errno
import os
import sqlite3
from pathlib import Path
from typing import BinaryIO

from quickchange_adapters.disk import Disk
from sqlalchemy.exc import OperationalError

SQLITE_MEANING = {errno.ENOSPC: sqlite3.SQLITE_FULL, errno.EDQUOT: sqlite3.SQLITE_FULL}


class Faults:
    """Counts what is done to files and committed to the catalog; the `fail_at`-th of it fails.

    `is_lasting`: so does everything after it, but for removals where the disk is merely full.
    """

    def __init__(self) -> None:
        self.heal()

    def heal(self) -> None:
        """Let everything succeed."""
        self.arm(0, 0)

    def arm(self, fail_at: int, number: int, *, is_lasting: bool = False) -> None:
        """Fail from now on; `number` is the operating system's."""
        self.num_calls = 0
        self.fail_at = fail_at
        self.number = number
        self.is_lasting = is_lasting

    def on_call(self, *, makes_room: bool = False) -> None:
        """Stand before one call on a file."""
        if self._is_due(makes_room):
            raise OSError(self.number, os.strerror(self.number), "/a/secret/path")

    def on_point(self, point: str) -> None:
        """Stand at a fault point; a commit fails as SQLite's does."""
        if point.startswith("before ") and point.endswith(".commit") and self._is_due(False):
            meaning = SQLITE_MEANING.get(self.number, sqlite3.SQLITE_IOERR)
            cause = sqlite3.OperationalError("database or disk is full")
            cause.sqlite_errorcode = meaning
            raise OperationalError("COMMIT", {}, cause)

    def _is_due(self, makes_room: bool) -> bool:
        if makes_room and self.number in SQLITE_MEANING:
            return False
        self.num_calls += 1
        if not self.fail_at or self.num_calls < self.fail_at:
            return False
        return self.is_lasting or self.num_calls == self.fail_at


class FailingDisk(Disk):
    """Asks `faults` before each call."""

    def __init__(self, faults: Faults) -> None:
        self._faults = faults

    def create(self, path: Path) -> BinaryIO:
        self._faults.on_call()
        return super().create(path)

    def write(self, file: BinaryIO, chunk: bytes) -> None:
        self._faults.on_call()
        super().write(file, chunk)

    def sync_file(self, file: BinaryIO) -> None:
        self._faults.on_call()
        super().sync_file(file)

    def make_folder(self, folder: Path) -> None:
        self._faults.on_call()
        super().make_folder(folder)

    def rename(self, source: Path, target: Path) -> None:
        self._faults.on_call()
        super().rename(source, target)

    def remove(self, path: Path) -> None:
        self._faults.on_call(makes_room=True)
        super().remove(path)

    def sync_folder(self, folder: Path) -> None:
        self._faults.on_call()
        super().sync_folder(folder)
