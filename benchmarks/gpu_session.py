"""A run on a lent machine: rows are kept as they come, time is budgeted, failures are kept apart.

Knows nothing of GPUs.
"""

import json
import os
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.report import markdown_table

Record = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a section's table, and the same as plain numbers for machines."""

    cells: tuple[str, ...]
    values: Record


@dataclass(frozen=True, slots=True)
class Section:
    """A table of a run: its rows come one by one, each as soon as it was measured.

    A row that is still to be measured comes as a function: if that fails, the others go on.
    `needs_s`: how long all take at most; the section is left out where less time is left.
    """

    name: str
    header: tuple[str, ...]
    needs_s: float
    rows: Callable[[], Iterable[Row | Callable[[], Row]]]


@dataclass(slots=True)
class Session:
    """One run. `folder`: where rows go, one JSON object a line, written through at once."""

    budget_s: float
    folder: Path | None = None
    clock: Callable[[], float] = time.monotonic
    failures: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    tables: list[str] = field(default_factory=list)
    _started_s: float = field(init=False)

    def __post_init__(self) -> None:
        """Start the clock."""
        self._started_s = self.clock()
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)

    @property
    def left_s(self) -> float:
        """Seconds of the budget that are left."""
        return self.budget_s - (self.clock() - self._started_s)

    def run(self, section: Section) -> list[Row]:
        """Measure a section, unless too little time is left; what was measured before a failure."""
        if self.left_s < section.needs_s:
            reason = f"needs {section.needs_s:.0f} s, {max(self.left_s, 0):.0f} s are left"
            self.left_out.append(section.name)
            self._note({"section": section.name, "left_out": reason})
            print(f"\n## {section.name}: LEFT OUT, {reason}", flush=True)
            return []
        print(f"\n## {section.name} ({self.left_s:.0f} s left)", flush=True)
        rows: list[Row] = []
        try:
            for each in section.rows():
                row = each if isinstance(each, Row) else self._measured(section.name, each)
                if row is not None:
                    rows.append(row)
                    self._note({"section": section.name, **row.values})
                    print("  " + " | ".join(row.cells), flush=True)
        except Exception as error:
            self.fail(section.name, error)
        if rows:
            table = markdown_table(section.header, [row.cells for row in rows])
            self.tables.append(f"#### {section.name}\n\n{table}")
        return rows

    def _measured(self, name: str, measure: Callable[[], Row]) -> Row | None:
        try:
            return measure()
        except Exception as error:
            self.fail(name, error)
            return None

    def fail(self, name: str, error: Exception) -> None:
        """Take note of a failure, and show where it was."""
        text = "".join(traceback.format_exception(error))
        print(f"FAILED: {name}\n{text}", flush=True)
        self.failures.append(name)
        self._note({"section": name, "failed": f"{type(error).__name__}: {error}", "where": text})

    def note(self, name: str, value: Any) -> None:
        """Keep something that is no row: the machine, the settings."""
        self._note({name: asdict(value) if hasattr(value, "__dataclass_fields__") else value})

    def write(self, name: str, text: str) -> None:
        """Write a file beside the rows."""
        if self.folder is not None:
            (self.folder / name).write_text(text, encoding="utf-8")

    def _note(self, record: Record) -> None:
        if self.folder is None:
            return
        record = {"at_s": round(self.clock() - self._started_s, 1), **record}
        with (self.folder / "rows.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(record, default=str) + "\n")
            file.flush()
            os.fsync(file.fileno())
