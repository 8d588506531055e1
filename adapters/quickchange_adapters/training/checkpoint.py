"""Where a run stands, on disk, so that it can be ended at any moment and go on from there."""

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quickchange_adapters.errors import CannotTrain

NAME = "checkpoint.pt"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The state after `step` steps.

    Attributes:
        fingerprint: of recipe, data and base; another one does not go on from here.
        state: of the master weights and the optimizer.
        best: the master weights of the lowest validation loss so far.
        num_worse: looks at the validation rows since then.
    """

    fingerprint: str
    step: int
    state: dict[str, Any]
    best: dict[str, Tensor] | None
    best_loss: float
    best_step: int
    num_worse: int


def save_checkpoint(folder: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint; a crash at any point leaves the one before or this one.

    Raises: CannotTrain when the disk does not take it.
    """
    partial = folder / f".{NAME}.partial"
    try:
        with partial.open("wb") as file:
            torch.save(asdict(checkpoint), file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(folder / NAME)
    except (OSError, RuntimeError) as error:
        partial.unlink(missing_ok=True)
        raise CannotTrain(f"{folder / NAME} cannot be written: {error}; make room there") from error


def load_checkpoint(folder: Path, fingerprint: str) -> Checkpoint | None:
    """Return the checkpoint of a run with this fingerprint; None if there is none at all.

    Raises: CannotTrain when there is another run's, or it cannot be read.
    """
    file = folder / NAME
    if not file.exists():
        return None
    again = f"start afresh with --restart, or move {file} away"
    try:
        found = Checkpoint(**torch.load(file, map_location="cpu", weights_only=True))
    except Exception as error:  # torch has no tree of errors for files that are none of its own
        raise CannotTrain(f"{file} cannot be read; {again}") from error
    if found.fingerprint != fingerprint:
        raise CannotTrain(f"{file} belongs to another recipe, other data or another base; {again}")
    return found


def drop_checkpoint(folder: Path) -> None:
    """Forget where a run stood."""
    (folder / NAME).unlink(missing_ok=True)
