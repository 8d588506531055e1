"""Rows of JSON lines or CSV files as examples; what is wrong with them, by file, line and field.

Knows no tokens: how long a row is, is found out by `token_rows`.
"""

import csv
import difflib
import io
import json
from collections.abc import Iterator, Mapping, Sequence
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
        rows = _separated_rows(file, data, separator, settings, problems)
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
    if data.startswith(b"PK\x03\x04"):
        raise DataInvalid([f"{file}: is an archive or a spreadsheet; save its rows as CSV"])
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
            reason = f"{error.msg} at column {error.colno}"
            problems.add(file, number, f"is no JSON object in one line: {reason}")
        except (RecursionError, ValueError) as error:
            problems.add(file, number, f"is no JSON that can be read: {error}")
        else:
            if isinstance(row, dict):
                yield number, row
            else:
                problems.add(file, number, f"is a JSON {type(row).__name__}, but must be an object")


def _separated_rows(
    file: Path, data: bytes, separator: str, settings: DataSettings, problems: Problems
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
        names = list(reader.fieldnames or ())
        sentences = [_heading_problem(names, each) for each in (settings.input, settings.answer)]
        if names and any(sentences):
            for sentence in filter(None, sentences):
                problems.add(file, 1, sentence)
            return
        line = reader.line_num + 1
        for row in reader:
            problem = _width_problem(row, len(names))
            if problem is None:
                yield line, row
            else:
                problems.add(file, line, problem)
            line = reader.line_num + 1
    except csv.Error as error:
        problems.add(file, line, f"is no CSV: {error}")


def _heading_problem(names: Sequence[str], field: str) -> str | None:
    """Return what is wrong with a first line that is to have a field's name."""
    if field in names:
        return f"has the field {field!r} twice" if names.count(field) > 1 else None
    missing = _missing_sentence(names, field)
    other = next((sign for sign in ";\t|" if len(names) == 1 and sign in names[0]), None)
    if other is not None:
        return f"{missing}; it looks separated by {other!r}: use commas, or tabs in a .tsv"
    return missing


def _width_problem(row: Mapping[str | None, Any], num_fields: int) -> str | None:
    """Return what is wrong with a line that has more or fewer fields than the first."""
    if None in row:
        return (
            f"has {num_fields + len(row[None])} fields, but the first line has {num_fields}; "
            "a text that holds the separator must stand in double quotes"
        )
    missing = [name for name, value in row.items() if value is None]
    return f"the field {missing[0]!r} is missing" if missing else None


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
        return _missing_sentence(list(row), field)
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


def _missing_sentence(names: Sequence[str], field: str) -> str:
    near = difflib.get_close_matches(field, names, n=1, cutoff=0.5)
    others = f"nearest: {near[0]!r}" if near else f"it has: {', '.join(map(repr, names))[:200]}"
    return f"the field {field!r} is missing ({others})"


def _example(file: Path, line: int, row: Mapping[str, Any], settings: DataSettings) -> Example:
    texts = {key: value for key, value in row.items() if isinstance(value, str)}
    return Example(row[settings.input], row[settings.answer], file, line, texts)
