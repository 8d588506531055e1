"""`task.json`: the prompt form and the defaults that a version carries, read and applied.

Training and serving both call `render_chat` and `render_prompt`, so that what a model was trained
on is what it is asked. There is no template language: `{input}` is replaced, every other brace is
text. Knows no tokens, no tensors and no HTTP.
"""

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

from quickchange_adapters.errors import Problem
from quickchange_adapters.records import TASK_FILE
from quickchange_adapters.strict_json import JsonRefused, parse_object

MAX_TASK_BYTES = 16 << 10
MAX_STOP_STRINGS = 16
MAX_STOP_CHARS = 256
MAX_TOKENS = (1 << 63) - 1
INPUT = "{input}"
KEYS = ("prompt", "system", "stop", "max_tokens", "temperature", "top_p")

_MAX_NAMED = 20
_MAX_SHOWN_CHARS = 80
_SYSTEM_ROLES = ("system", "developer")

Message = Mapping[str, str]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Task:
    """What fills the gaps of a request. None, and an empty `stop`, fill nothing.

    Attributes:
        prompt: text around the caller's, with `{input}` once where that goes.
        system: the system message of a chat that has none.
        stop: strings that end the answer.
    """

    prompt: str | None = None
    system: str | None = None
    stop: tuple[str, ...] = ()
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None

    def render_prompt(self, text: str) -> str:
        """Return the prompt form with a caller's text in it; whatever the text holds stays text."""
        if self.prompt is None:
            return text
        before, _, after = self.prompt.partition(INPUT)
        return f"{before}{text}{after}"

    def render_chat(self, messages: Sequence[Message]) -> list[dict[str, str]]:
        """Return a conversation as the base's chat template is to see it.

        `system` goes first unless there is a system message; the form wraps the last user message,
        and every other message stays as it is.
        """
        turns = [dict(message) for message in messages]
        last = max((i for i, turn in enumerate(turns) if turn["role"] == "user"), default=None)
        if last is not None:
            turns[last]["content"] = self.render_prompt(turns[last]["content"])
        has_system = any(turn["role"] in _SYSTEM_ROLES for turn in turns)
        if self.system is None or has_system:
            return turns
        return [{"role": "system", "content": self.system}, *turns]

    def to_json(self) -> dict[str, Any]:
        """Return the object of a task.json that reads as this task."""
        values: dict[str, Any] = {key: getattr(self, key) for key in KEYS}
        values["stop"] = list(self.stop) or None
        return {key: value for key, value in values.items() if value is not None}


@dataclass(frozen=True, slots=True)
class TaskReading:
    """The outcome of reading a task.json: `task` is None exactly when there are problems.

    `text` is the file as it was sent; None if there was no file.
    """

    task: Task | None
    problems: tuple[Problem, ...] = ()
    text: str | None = None


def read_task(data: bytes) -> TaskReading:
    """Read the bytes of a task.json and say everything that is wrong with them."""
    if len(data) > MAX_TASK_BYTES:
        message = f"{TASK_FILE} is larger than {MAX_TASK_BYTES} bytes"
        return TaskReading(None, (Problem("too_large", TASK_FILE, message),))
    try:
        raw = parse_object(data)
    except JsonRefused as error:
        return TaskReading(None, (Problem("task_invalid", TASK_FILE, f"{TASK_FILE}: {error}"),))
    reader = _Reader(raw)
    task = reader.read()
    if reader.problems:
        return TaskReading(None, tuple(reader.problems))
    return TaskReading(task, text=data.decode("utf-8"))


def read_task_file(path: Path) -> TaskReading:
    """Read a task.json, no further than its limit. Raises only OSError."""
    with path.open("rb") as file:
        return read_task(file.read(MAX_TASK_BYTES + 1))


@lru_cache(maxsize=1024)
def stored_task(text: str) -> TaskReading:
    """Read the text of a task.json that was accepted once; a repeat costs a look-up."""
    return read_task(text.encode())


class _Reader:
    """Reads keys one by one; a wrong one leaves a problem, null is as good as left out."""

    def __init__(self, raw: Mapping[str, Any]) -> None:
        self._raw = raw
        self.problems: list[Problem] = []

    def read(self) -> Task:
        self._check_keys()
        return Task(
            prompt=self._prompt(),
            system=self._value("system", _as_text, "a string"),
            stop=self._stop(),
            max_tokens=self._value(
                "max_tokens", _as_count, f"a whole number from 1 to {MAX_TOKENS}"
            ),
            temperature=self._value("temperature", _as_temperature, "a number from 0 to 2"),
            top_p=self._value("top_p", _as_top_p, "a number above 0 and at most 1"),
        )

    def _refuse(self, key: str, message: str, hint: str = "") -> None:
        self.problems.append(Problem("task_invalid", f"task.{key}", message, hint))

    def _check_keys(self) -> None:
        unknown = [key for key in self._raw if key not in KEYS]
        for key in unknown[:_MAX_NAMED]:
            name = key[:_MAX_SHOWN_CHARS]
            near = difflib.get_close_matches(name, KEYS, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"a task has {', '.join(KEYS)}"
            self._refuse(name, f"the key {name!r} is not known", hint)
        if len(unknown) > _MAX_NAMED:
            message = f"{TASK_FILE} has {len(unknown) - _MAX_NAMED} more keys that are not known"
            self.problems.append(Problem("task_invalid", TASK_FILE, message))

    def _prompt(self) -> str | None:
        prompt = self._value("prompt", _as_text, "a string")
        if prompt is not None and prompt.count(INPUT) != 1:
            found = "no" if INPUT not in prompt else f"{prompt.count(INPUT)} times"
            self._refuse(
                "prompt",
                f"prompt has {found} {INPUT}; it must have it once",
                f"write {INPUT} where the caller's text goes; other braces are plain text",
            )
        return prompt

    def _stop(self) -> tuple[str, ...]:
        value = self._raw.get("stop")
        stops = [value] if isinstance(value, str) else value
        if stops is None:
            return ()
        if not isinstance(stops, list) or not all(isinstance(each, str) for each in stops):
            self._refuse("stop", f"stop is {_show(value)}, not a string or a list of strings")
            return ()
        if len(stops) > MAX_STOP_STRINGS:
            self._refuse("stop", f"stop has {len(stops)} strings; at most {MAX_STOP_STRINGS}")
        if not all(1 <= len(each) <= MAX_STOP_CHARS for each in stops):
            message = f"stop has a string that is empty or longer than {MAX_STOP_CHARS} characters"
            self._refuse("stop", message)
        return tuple(stops)

    def _value(self, key: str, read: Callable[[Any], T | None], wanted: str) -> T | None:
        raw = self._raw.get(key)
        if raw is None:
            return None
        value = read(raw)
        if value is None:
            self._refuse(key, f"{key} is {_show(raw)}, not {wanted}")
        return value


def _as_text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _as_count(value: Any) -> int | None:
    is_count = isinstance(value, int) and not isinstance(value, bool)
    return value if is_count and 1 <= value <= MAX_TOKENS else None


def _as_temperature(value: Any) -> float | None:
    return float(value) if _is_number(value) and 0 <= value <= 2 else None


def _as_top_p(value: Any) -> float | None:
    return float(value) if _is_number(value) and 0 < value <= 1 else None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _show(value: Any) -> str:
    """Return a stranger's value short enough for a message."""
    text = repr(value)
    return text if len(text) <= _MAX_SHOWN_CHARS else text[: _MAX_SHOWN_CHARS - 3] + "..."
