"""A comparison as tables: one column for each side."""

import json
from collections.abc import Sequence
from typing import Any

from quickchange_client.cli.adapter_tables import short_digest
from quickchange_client.cli.output import format_bytes, format_time, print_table
from quickchange_client.comparison import (
    Output,
    OutputPair,
    Side,
    compare_fields,
    compare_norms,
)

MAX_NAMES = 8
Sides = tuple[Side, Side]


def print_fields(sides: Sides) -> None:
    """Print what the two are, and the settings in which they differ."""
    a, b = (_facts(side) for side in sides)
    rows = [(name, a[name], b[name], "") for name in a]
    for pair in compare_fields(*sides):
        mark = "" if pair.is_equal else "≠"
        rows.append((pair.name, _value(pair.a), _value(pair.b), mark))
    print_table(("", *_columns(sides), ""), rows)


def print_norms(sides: Sides) -> None:
    """Print how strong the updates are, by what they target."""
    pairs = compare_norms(*sides)
    if not pairs:
        return
    print()
    left, right = (f">{name}" for name in _columns(sides))
    rows = [(each.target, each.num_modules, _norm(each.a), _norm(each.b)) for each in pairs]
    print_table(("UPDATE NORM", ">MODULES", left, right), rows)


def print_outputs(sides: Sides, outputs: Sequence[OutputPair]) -> None:
    """Print prompts and answers, and how many answers are equal."""
    if not outputs:
        return
    print()
    rows = [
        (each.prompt, _answer(each.a), _answer(each.b), "=" if each.is_equal else "≠")
        for each in outputs
    ]
    print_table(("PROMPT", *_columns(sides), ""), rows, is_spaced=True)
    num_equal = sum(each.is_equal for each in outputs)
    print(f"\n{num_equal} of {len(outputs)} answers are equal")


def _columns(sides: Sides) -> tuple[str, str]:
    """Return headings that tell the two apart, also when both were asked for by one name."""
    a, b = (side.model for side in sides)
    return (a, b) if a != b else (f"{a} (A)", f"{b} (B)")


def _facts(side: Side) -> dict[str, str]:
    version = side.version
    if version is None:
        return dict.fromkeys(("version", "digest", "created", "bytes"), "-") | {"version": "base"}
    return {
        "version": f"{version.name}:{version.version}",
        "digest": short_digest(version.digest),
        "created": format_time(version.created_at),
        "bytes": format_bytes(version.bytes.file),
    }


def _value(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, list) and all(isinstance(each, str) for each in value):
        return _names(value)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _names(names: list[str]) -> str:
    """Return names in their order; of many paths, their last parts."""
    if len(names) <= MAX_NAMES:
        return ", ".join(sorted(names))
    ends = sorted({name.rpartition(".")[2] for name in names})
    return f"{', '.join(ends)} ({len(names)} names)"


def _norm(norm: float | None) -> str:
    return "-" if norm is None else f"{norm:.4g}"


def _answer(output: Output) -> str:
    if output.error is not None:
        return f"error: {output.error}"
    return output.text.strip() + (" …" if output.finish_reason == "length" else "")
