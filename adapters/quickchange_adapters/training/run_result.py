"""What a finished run came to, and the record of it that spares the same command the training."""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from quickchange_adapters.training.adapter_model import CONFIG, WEIGHTS, ParameterCount
from quickchange_adapters.training.run_folder import replace_file

NAME = ".quickchange_trained.json"
"""Beside the adapter's folder and not in it, so that it is never uploaded with the adapter."""


@dataclass(frozen=True, slots=True)
class RunResult:
    """What a finished run came to. `is_new`: it was trained now, and not found as trained."""

    parameters: ParameterCount
    steps: int
    best_step: int
    best_loss: float
    seconds: float
    adapter_folder: Path
    adapter_bytes: int
    is_new: bool = True


def keep_result(folder: Path, fingerprint: str, result: RunResult) -> None:
    """Write the record of a run, once its adapter is written.

    Raises: CannotTrain when the disk does not take it.
    """
    record = {
        "fingerprint": fingerprint,
        "files": _digests(result.adapter_folder),
        "parameters": asdict(result.parameters),
        "steps": result.steps,
        "best_step": result.best_step,
        "best_loss": result.best_loss,
        "seconds": result.seconds,
    }
    replace_file(folder / NAME, (json.dumps(record, indent=2) + "\n").encode())


def find_result(folder: Path, fingerprint: str, adapter: Path) -> RunResult | None:
    """Return what a run with this fingerprint came to, if its adapter is still as it was written.

    A record that is not there, of another run, or damaged is none.
    """
    try:
        record = json.loads((folder / NAME).read_bytes())
        if record["fingerprint"] != fingerprint or record["files"] != _digests(adapter):
            return None
        return RunResult(
            ParameterCount(**record["parameters"]),
            int(record["steps"]),
            int(record["best_step"]),
            float(record["best_loss"]),
            float(record["seconds"]),
            adapter,
            (adapter / WEIGHTS).stat().st_size,
            is_new=False,
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None


def forget_result(folder: Path) -> None:
    """Drop the record of whatever run."""
    (folder / NAME).unlink(missing_ok=True)


def _digests(adapter: Path) -> dict[str, str]:
    """Return the digests of what training decides; the task is the recipe's in any case."""
    found = {}
    for name in (WEIGHTS, CONFIG):
        with (adapter / name).open("rb") as file:
            found[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found
