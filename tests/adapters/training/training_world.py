"""Small recipes and data for the tiny base."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from quickchange_adapters.training.prepared import Prepared, prepare
from quickchange_adapters.training.recipe import recipe_from

ANIMALS = {"fox": "positive", "dog": "positive", "cat": "negative", "hen": "negative"}
WORDS = ("jumps", "runs over", "lazy", "brown movie", "quick")
ROWS = [
    {"input": f"the quick {animal} {word}", "answer": answer}
    for animal, answer in ANIMALS.items()
    for word in WORDS
]


def write_rows(file: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    """Write rows as JSON lines."""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def write_world(folder: Path, rows: Iterable[Mapping[str, Any]] = ROWS) -> Path:
    """Write data and return the name that a recipe in this folder would have."""
    folder.mkdir(parents=True, exist_ok=True)
    write_rows(folder / "train.jsonl", rows)
    write_rows(folder / "valid.jsonl", ROWS[::7])
    return folder / "recipe.toml"


def recipe_values(base: Path, **training: Any) -> dict[str, Any]:
    """Return a recipe for a few steps on the tiny base."""
    loop = {"batch_rows": 4, "max_steps": 6, "learning_rate": 1e-2, "validate_every": 2}
    return {
        "base": str(base),
        "data": {"train": "train.jsonl", "validation": "valid.jsonl"},
        "task": {"prompt": "<{input}>", "max_tokens": 4},
        "training": {**loop, "compute": "float32", **training},
    }


def prepared_in(folder: Path, base: Path, values: Mapping[str, Any] | None = None) -> Prepared:
    """Return a run that can begin, in a folder of its own."""
    file = write_world(folder)
    recipe = recipe_from(file, dict(values or recipe_values(base)), {})
    return prepare(recipe, base, lambda sentence: None)
