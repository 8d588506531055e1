"""The log of a run: one JSON object a line. Knows no loop."""

import json
from pathlib import Path
from typing import Any

from quickchange_adapters.training.run_folder import cannot_write, replace_file

NAME = "train_log.jsonl"


class RunLog:
    """Appends lines to a file. Lines after the step that a run goes on from are dropped."""

    def __init__(self, folder: Path, after_step: int) -> None:
        self.file = folder / NAME
        lines = [line for line in read_log(self.file) if 0 < line.get("step", 0) <= after_step]
        replace_file(self.file, "".join(map(_line, lines)).encode())
        self._stream = self.file.open("ab", buffering=0)

    def write(self, **values: Any) -> None:
        """Append a line.

        Raises: CannotTrain when the disk does not take it.
        """
        try:
            self._stream.write(_line(values).encode())
        except OSError as error:
            raise cannot_write(self.file, error) from error

    def close(self) -> None:
        """Close the file."""
        self._stream.close()


def read_log(file: Path) -> list[dict[str, Any]]:
    """Return the lines of a log; what comes after one that was cut off is left out."""
    if not file.exists():
        return []
    found = []
    for line in file.read_bytes().splitlines():
        try:
            values = json.loads(line)
        except ValueError:
            break
        if not isinstance(values, dict):
            break
        found.append(values)
    return found


def _line(values: dict[str, Any]) -> str:
    return json.dumps(values) + "\n"
