"""Rows of JSON lines or CSV files as examples; what is wrong with them, by file, line and field.

Knows no tokens: how long a row is, is found out by `token_rows`.
"""

import csv
import difflib
import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quickchange_adapters.errors import DataInvalid
from quickchange_adapters.training.recipe import DataSettings

MAX_SHOWN_PROBLEMS = 10
_SEPARATORS = {".csv": ",", ".tsv": "\t"}


@dataclass(frozen=True, slots=True)
class Example:
    """One row. `fields` has all of its texts, for those that evaluate."""

    input: str
    answer: str
    file: Path
    line: int
    fields: Mapping[str, str]

    @property
    def place(self) -> str:
        """Where the row stands, for messages."""
        return f"{self.file}, line {self.line}"


class Problems:
    """Collects sentences about rows; the first few are shown."""

    def __init__(self) -> None:
        self._sentences: list[str] = []

    def add(self, file: Path, line: int, sentence: str) -> None:
        """Add a problem with one line of a file."""
        self._sentences.append(f"{file}, line {line}: {sentence}")

    def raise_any(self) -> None:
        """Raise what was found.

        Raises: DataInvalid.
        """
        if self._sentences:
            shown = self._sentences[:MAX_SHOWN_PROBLEMS]
            raise DataInvalid(shown, len(self._sentences) - len(shown))


def read_examples(file: Path, settings: DataSettings) -> list[Example]:
    """Read all rows of a file: CSV or TSV by its ending, else JSON lines.

    Raises: DataInvalid with file, line and field of every problem found.
    """
    data = _read_bytes(file)
    problems = Problems()
    separator = _SEPARATORS.get(file.suffix.lower())
    if separator is None:
        rows = _json_rows(file, data, problems)
    else:
        rows = _separated_rows(file, data, separator, problems)
    found = [
        _example(file, line, row, settings)
        for line, row in rows
        if _has_fields(file, line, row, settings, problems)
    ]
    problems.raise_any()
    if not found:
        raise DataInvalid([f"{file}: has no rows"])
    return found[: settings.max_rows]


def _read_bytes(file: Path) -> bytes:
    try:
        data = file.read_bytes()
    except OSError as error:
        raise DataInvalid([f"{file}: cannot be read: {error.strerror or error}"]) from error
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DataInvalid([f"{file}, line 1: this is UTF-16; save the file as UTF-8"])
    return data.removeprefix(b"\xef\xbb\xbf")


def _json_rows(file: Path, data: bytes, problems: Problems) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, raw in enumerate(data.split(b"\n"), start=1):
        if not raw.strip():
            continue
        try:
            row = json.loads(raw.decode("utf-8"))
        except UnicodeDecodeError as error:
            problems.add(file, number, _encoding_sentence(error))
        except json.JSONDecodeError as error:
            problems.add(file, number, f"is no JSON: {error.msg} at column {error.colno}")
        except (RecursionError, ValueError) as error:
            problems.add(file, number, f"is no JSON that can be read: {error}")
        else:
            if isinstance(row, dict):
                yield number, row
            else:
                problems.add(file, number, f"is a JSON {type(row).__name__}, but must be an object")


def _separated_rows(
    file: Path, data: bytes, separator: str, problems: Problems
) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        problems.add(file, line, _encoding_sentence(error))
        return
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    line = 1
    try:
        num_fields = len(reader.fieldnames or ())
        line = reader.line_num + 1
        for row in reader:
            if None in row or None in row.values():
                problems.add(file, line, f"has not the {num_fields} fields of the first line")
            else:
                yield line, row
            line = reader.line_num + 1
    except csv.Error as error:
        problems.add(file, line, f"is no CSV: {error}")


def _encoding_sentence(error: UnicodeDecodeError) -> str:
    return f"is not UTF-8 (byte 0x{error.object[error.start]:02x}); save the file as UTF-8"


def _has_fields(
    file: Path, line: int, row: Mapping[str, Any], settings: DataSettings, problems: Problems
) -> bool:
    sentences = [_field_problem(row, field) for field in (settings.input, settings.answer)]
    for sentence in filter(None, sentences):
        problems.add(file, line, sentence)
    return not any(sentences)


def _field_problem(row: Mapping[str, Any], field: str) -> str | None:
    if field not in row:
        near = difflib.get_close_matches(field, row, n=1, cutoff=0.5)
        others = f"nearest: {near[0]!r}" if near else f"it has: {', '.join(map(repr, row))[:200]}"
        return f"the field {field!r} is missing ({others})"
    value = row[field]
    if not isinstance(value, str):
        return f"the field {field!r} is {json.dumps(value)[:40]}, but must be a text"
    if not value.strip():
        return f"the field {field!r} is empty"
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return f"the field {field!r} holds half of a surrogate pair"
    return None


def _example(file: Path, line: int, row: Mapping[str, Any], settings: DataSettings) -> Example:
    texts = {key: value for key, value in row.items() if isinstance(value, str)}
    return Example(row[settings.input], row[settings.answer], file, line, texts)
