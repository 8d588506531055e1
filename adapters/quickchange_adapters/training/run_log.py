"""The log of a run: one JSON object a line. Knows no loop."""

import json
from pathlib import Path
from typing import Any

NAME = "train_log.jsonl"


class RunLog:
    """Appends lines to a file. Lines after the step that a run goes on from are dropped."""

    def __init__(self, folder: Path, after_step: int) -> None:
        self.file = folder / NAME
        lines = [line for line in read_log(self.file) if 0 < line.get("step", 0) <= after_step]
        partial = self.file.with_name(f".{NAME}.partial")
        partial.write_text("".join(map(_line, lines)), encoding="utf-8")
        partial.replace(self.file)
        self._stream = self.file.open("a", encoding="utf-8")

    def write(self, **values: Any) -> None:
        """Append a line."""
        self._stream.write(_line(values))
        self._stream.flush()

    def close(self) -> None:
        """Close the file."""
        self._stream.close()


def read_log(file: Path) -> list[dict[str, Any]]:
    """Return the lines of a log; a last one that was cut off is left out."""
    if not file.exists():
        return []
    found = []
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return found


def _line(values: dict[str, Any]) -> str:
    return json.dumps(values) + "\n"
