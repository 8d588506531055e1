"""The folder of a run, for one process at a time. Knows nothing of what is written there."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from quickchange_adapters.errors import CannotTrain


@contextmanager
def run_folder(folder: Path) -> Iterator[None]:
    """Make the folder, and hold it until the run ends, however it ends.

    Raises: CannotTrain when another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
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
