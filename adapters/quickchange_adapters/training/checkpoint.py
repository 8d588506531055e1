"""Where a run stands, on disk, so that it can be ended at any moment and go on from there."""

import os
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from quickchange_adapters.errors import CannotTrain
from quickchange_adapters.training.run_folder import cannot_write

NAME = "checkpoint.pt"
PARTIAL = f".{NAME}.partial"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The state after `step` steps.

    Attributes:
        fingerprint: of recipe, data and base; another one does not go on from here.
        state: of the trainer.
        best: what was learned at the lowest validation loss so far.
        num_worse: looks at the validation rows since then.
    """

    fingerprint: str
    step: int
    state: dict[str, Any]
    best: dict[str, Any] | None
    best_loss: float
    best_step: int
    num_worse: int


def save_checkpoint(folder: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint; a crash at any point leaves the one before or this one.

    Raises: CannotTrain when the disk does not take it.
    """
    partial = folder / PARTIAL
    try:
        with partial.open("wb") as file:
            torch.save(asdict(checkpoint), file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(folder / NAME)
    except (OSError, RuntimeError) as error:  # RuntimeError: of torch's own writer
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise cannot_write(folder / NAME, error) from error


def load_checkpoint(folder: Path, fingerprint: str) -> Checkpoint | None:
    """Return the checkpoint of a run with this fingerprint; None if there is none at all.

    Raises: CannotTrain when there is another run's, or it cannot be read.
    """
    file = folder / NAME
    if not file.exists():
        return None
    found = _read(file)
    if found.fingerprint != fingerprint:
        raise CannotTrain(
            f"{file} belongs to another recipe, other data or another base; start afresh with "
            f"--restart, or move {file} away"
        )
    return found


def forget_checkpoint(folder: Path) -> None:
    """Drop the checkpoint of whatever run; only if it is one.

    Raises: CannotTrain for a file of somebody else's that has its name.
    """
    if (folder / NAME).exists():
        _read(folder / NAME)
    drop_checkpoint(folder)


def drop_checkpoint(folder: Path) -> None:
    """Forget where a run stood."""
    (folder / NAME).unlink(missing_ok=True)
    (folder / PARTIAL).unlink(missing_ok=True)


def _read(file: Path) -> Checkpoint:
    try:
        return Checkpoint(**torch.load(file, map_location="cpu", weights_only=True))
    except Exception as error:  # torch has no tree of errors for files that are none of its own
        raise CannotTrain(
            f"{file} is no checkpoint of this program, or damaged; move it away, or give --output"
        ) from error
