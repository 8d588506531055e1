"""The folder of a run, for one process at a time, and how files get there. Knows no contents."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from quickchange_adapters.disk import Disk
from quickchange_adapters.errors import CannotTrain


@contextmanager
def run_folder(folder: Path) -> Iterator[None]:
    """Make the folder, and hold it until the run ends, however it ends.

    Raises: CannotTrain when another process holds it, or it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CannotTrain(f"{folder} cannot be made a folder: {error.strerror}") from error
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        _hold(descriptor, folder)
        yield
    finally:
        os.close(descriptor)


def _hold(descriptor: int, folder: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise CannotTrain(
            f"another run writes to {folder.resolve()}: wait for it, or give --output"
        ) from error


def replace_file(file: Path, data: bytes) -> None:
    """Write a file that is whole or as it was before, whatever ends the program or the machine.

    Raises: CannotTrain when the disk does not take it.
    """
    partial = file.with_name(f".{file.name}.partial")
    try:
        with partial.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(file)
        Disk().sync_folder(file.parent)
    except OSError as error:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise cannot_write(file, error) from error


def cannot_write(file: Path, error: Exception) -> CannotTrain:
    """Return what to say of a file that the disk does not take."""
    reason = getattr(error, "strerror", None) or error
    return CannotTrain(
        f"{file} cannot be written: {reason}; make room there, and the same command goes on"
    )
