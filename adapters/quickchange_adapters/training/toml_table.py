"""A TOML table read strictly, key by key. Knows no keys of its own."""

import difflib
import math
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from quickchange_adapters.errors import RecipeInvalid

MAX_FILE_BYTES = 1 << 20
_MAX_SHOWN_CHARS = 60

T = TypeVar("T")
D = TypeVar("D")


def read_toml(file: Path) -> dict[str, Any]:
    """Return the tables of a TOML file.

    Raises: RecipeInvalid.
    """
    try:
        with file.open("rb") as stream:
            data = stream.read(MAX_FILE_BYTES + 1)
        if len(data) > MAX_FILE_BYTES:
            raise RecipeInvalid(str(file), [f"larger than {MAX_FILE_BYTES} bytes: no recipe"])
        return tomllib.loads(data.decode("utf-8"))
    except OSError as error:
        raise RecipeInvalid(str(file), [f"cannot be read: {error.strerror or error}"]) from error
    except UnicodeDecodeError as error:
        raise RecipeInvalid(str(file), [f"is not UTF-8 at byte {error.start}"]) from error
    except tomllib.TOMLDecodeError as error:
        raise RecipeInvalid(str(file), [f"is no TOML: {error}"]) from error


class TomlTable:
    """Reads keys one by one; a wrong one leaves a problem in `problems` and gives the default.

    `finish` adds a problem for every key that nobody asked for.
    """

    def __init__(self, values: dict[str, Any], name: str, problems: list[str]) -> None:
        self._values = values
        self._name = name
        self._asked: list[str] = []
        self.problems = problems

    def has(self, key: str) -> bool:
        """Whether the key is given, whatever its value."""
        return key in self._values

    def table(self, key: str) -> "TomlTable":
        """Return a table inside this one; an empty one if it is not given."""
        value = self._read(key, {}, lambda raw: raw if isinstance(raw, dict) else None, "a table")
        return TomlTable(value, self._path(key), self.problems)

    def text(self, key: str, default: D) -> str | D:
        """Return a text that is not empty."""
        return self._read(key, default, _as_text, "a text that is not empty")

    def flag(self, key: str, default: bool) -> bool:
        """Return true or false."""
        return self._read(key, default, _as_flag, "true or false")

    def choice(self, key: str, default: str, known: Sequence[str]) -> str:
        """Return one of some words."""
        wanted = " or ".join(f'"{word}"' for word in known)
        return self._read(key, default, lambda v: _as_text(v) if v in known else None, wanted)

    def number_choice(self, key: str, default: int, known: Sequence[int]) -> int:
        """Return one of some whole numbers."""
        wanted = " or ".join(map(str, known))
        return self._read(key, default, lambda v: _as_count(v) if v in known else None, wanted)

    def count(self, key: str, default: D, low: int, high: int) -> int | D:
        """Return a whole number from `low` to `high`."""
        return self._read(
            key,
            default,
            lambda v: _as_count(v) if _is_count(v) and low <= v <= high else None,
            f"a whole number from {low} to {high}",
        )

    def number(self, key: str, default: D, low: float, high: float) -> float | D:
        """Return a number from `low` to `high`."""
        return self._read(
            key,
            default,
            lambda v: float(v) if _is_number(v) and low <= v <= high else None,
            f"a number from {low:g} to {high:g}",
        )

    def words(self, key: str, default: D) -> tuple[str, ...] | D:
        """Return a list of texts with at least one in it."""
        return self._read(key, default, _as_words, "a list of texts")

    def value(self, key: str) -> Any:
        """Return whatever stands there; None if nothing does."""
        self._asked.append(key)
        return self._values.get(key)

    def refuse(self, key: str, sentence: str) -> None:
        """Leave a problem with a key whose kind was right."""
        self.problems.append(f"{self._path(key)} {sentence}")

    def finish(self) -> None:
        """Leave a problem for each key that is not known, with the nearest that is."""
        for key in self._values:
            if key not in self._asked:
                near = difflib.get_close_matches(key, self._asked, n=1, cutoff=0.5)
                known = f"nearest: {near[0]}" if near else f"known: {', '.join(self._asked)}"
                self.problems.append(f"{self._path(key)} is not known ({known})")

    def _path(self, key: str) -> str:
        return f"{self._name}.{key}" if self._name else key

    def _read(self, key: str, default: D, read: Callable[[Any], T | None], wanted: str) -> T | D:
        self._asked.append(key)
        if key not in self._values:
            return default
        value = read(self._values[key])
        if value is None:
            self.refuse(key, f"is {_show(self._values[key])}, but must be {wanted}")
            return default
        return value


def _as_text(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None


def _as_flag(value: Any) -> bool | None:
    return value if isinstance(value, bool) else None


def _as_count(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _as_words(value: Any) -> tuple[str, ...] | None:
    if isinstance(value, list) and value and all(isinstance(v, str) and v for v in value):
        return tuple(value)
    return None


def _is_count(value: Any) -> bool:
    return _as_count(value) is not None


def _is_number(value: Any) -> bool:
    return (_is_count(value) or isinstance(value, float)) and math.isfinite(value)


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _MAX_SHOWN_CHARS else text[: _MAX_SHOWN_CHARS - 3] + "..."
