"""A folder that is there completely or not at all, whatever happens while it is written."""

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from quickchange_server.errors import CannotWrite

MODEL_FILE = "config.json"


def check_target(folder: Path, *, is_forced: bool) -> None:
    """Refuse a target before long work. Forced, only a model's folder or an empty one is replaced.

    Raises: CannotWrite.
    """
    if not folder.parent.is_dir():
        raise CannotWrite(f"{folder}: there is no folder {str(folder.parent)!r} to make it in")
    if not os.path.lexists(folder):
        return
    if not is_forced:
        raise CannotWrite(f"{folder} exists already; choose another name, or replace it: --force")
    is_model = folder.is_dir() and not folder.is_symlink()
    is_model = is_model and ((folder / MODEL_FILE).is_file() or not any(folder.iterdir()))
    if not is_model:
        raise CannotWrite(
            f"{folder} is neither a model's folder nor an empty one: not even --force replaces it"
        )


@contextmanager
def new_folder(folder: Path, *, is_forced: bool = False) -> Iterator[Path]:
    """Give a folder beside `folder` to write to; it takes that name once the block is through.

    On any error, and on Ctrl-C, what was written is removed and what was there stays.

    Raises: CannotWrite.
    """
    check_target(folder, is_forced=is_forced)
    unfinished = _beside(folder, "unfinished")
    try:
        unfinished.mkdir()
        yield unfinished
        _sync(unfinished)
        _move(unfinished, folder, is_forced=is_forced)
    except OSError as error:
        raise CannotWrite(f"{folder} cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _move(unfinished: Path, folder: Path, *, is_forced: bool) -> None:
    if not os.path.lexists(folder):
        unfinished.rename(folder)
        return
    check_target(folder, is_forced=is_forced)  # it may have come meanwhile
    former = _beside(folder, "former")
    folder.rename(former)
    try:
        unfinished.rename(folder)
    except OSError:
        former.rename(folder)
        raise
    shutil.rmtree(former, ignore_errors=True)


def _beside(folder: Path, word: str) -> Path:
    return folder.with_name(f".{folder.name}.{word}-{secrets.token_hex(4)}")


def _sync(folder: Path) -> None:
    """Have the bytes on the disk before the name says that they are."""
    for path in [*folder.iterdir(), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
