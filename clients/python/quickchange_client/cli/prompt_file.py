"""Prompts from a file: one a line, or one a JSON line."""

import json
import sys
from pathlib import Path

from quickchange_client.errors import ArgumentInvalid


def read_prompts(file: str, field: str, limit: int | None = None) -> list[str]:
    """Return the prompts of a file, `-` for standard input; empty lines are passed over.

    In a `.jsonl` file a line is a JSON string, or an object whose `field` is the prompt.

    Raises: ArgumentInvalid, saying which line.
    """
    try:
        text = sys.stdin.read() if file == "-" else Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ArgumentInvalid(f"cannot read the prompts in {file!r}: {error}") from error
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise ArgumentInvalid(f"{file!r} holds no prompt; write one a line")
    if not file.endswith(".jsonl"):
        return [line.rstrip("\r") for _, line in lines[:limit]]
    return [_prompt(f"{file}:{number}", line, field) for number, line in lines[:limit]]


def _prompt(place: str, line: str, field: str) -> str:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise ArgumentInvalid(f"{place} is no JSON: {error}") from error
    prompt = value.get(field) if isinstance(value, dict) else value
    if not isinstance(prompt, str):
        raise ArgumentInvalid(
            f"{place} has no text under {field!r}; write a JSON string or an object, "
            "and name its field with --field"
        )
    return prompt
