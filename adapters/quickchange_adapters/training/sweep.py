"""A small study: one recipe with some of its settings varied, read from a TOML file.

`[grid]` gives lists, all of whose combinations are tried; each `[[cell]]` is one more. `[set]`
changes the recipe for all of them; `evaluate = false` leaves the test rows aside. Knows no torch.
"""

import copy
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quickchange_adapters.errors import RecipeInvalid
from quickchange_adapters.training.recipe import Recipe, recipe_from
from quickchange_adapters.training.toml_table import TomlTable, read_toml

MAX_CELLS = 1000
PLACES = {
    "rank": "adapter",
    "targets": "adapter",
    "method": "adapter",
    "learning_rate": "training",
    "base_bits": "",
    "seed": "",
}
"""What can be varied, and the table of the recipe that it stands in."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One run of a study. `settings` are those that are varied."""

    name: str
    settings: Mapping[str, Any]
    recipe: Recipe


@dataclass(frozen=True, slots=True)
class Sweep:
    """A study. `output` is the folder that its files go to."""

    file: Path
    recipe_file: Path
    output: Path
    cells: tuple[Cell, ...]


def read_sweep(file: Path, output: Path | None = None) -> Sweep:
    """Read a study and every cell's recipe. Paths in it are relative to its own folder.

    Raises: RecipeInvalid with every problem found.
    """
    root = TomlTable(read_toml(file), "", [])
    recipe_name = root.text("recipe", "recipe.toml")
    folder = output or file.parent / root.text("output", "sweep")
    is_tested = root.flag("evaluate", True)
    changes = root.value("set") or {}
    chosen = [*_grid(root), *_listed(root)]
    root.finish()
    if not chosen and not root.problems:
        root.problems.append("has no cells: write a table [grid], or [[cell]] tables")
    if len(chosen) > MAX_CELLS:
        root.problems.append(f"has {len(chosen)} cells; at most {MAX_CELLS}")
    if root.problems:
        raise RecipeInvalid(str(file), root.problems)
    recipe_file = file.parent / recipe_name
    values = _merged(read_toml(recipe_file), changes)
    if not is_tested and isinstance(values.get("data"), dict):
        values["data"].pop("test", None)
    cells = tuple(_cell(recipe_file, values, settings, folder) for settings in chosen)
    return Sweep(file, recipe_file, folder, tuple({cell.name: cell for cell in cells}.values()))


def _grid(root: TomlTable) -> Iterator[dict[str, Any]]:
    table = root.table("grid")
    lists = {key: table.value(key) for key in PLACES if table.has(key)}
    for key in PLACES:
        table.value(key)  # so that it counts as known
    table.finish()
    for key, values in lists.items():
        if not isinstance(values, list) or not values:
            table.refuse(key, "must be a list of values to try")
            return
    if lists:
        for combination in itertools.product(*lists.values()):
            yield dict(zip(lists, combination, strict=True))


def _listed(root: TomlTable) -> Iterator[dict[str, Any]]:
    cells = root.value("cell") or []
    if not isinstance(cells, list) or not all(isinstance(each, dict) for each in cells):
        root.problems.append("cell must be tables, such as [[cell]]")
        return
    for number, values in enumerate(cells, start=1):
        table = TomlTable(values, f"cell {number}", root.problems)
        yield {key: value for key in PLACES if (value := table.value(key)) is not None}
        table.finish()


def _merged(values: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return values with changes laid over them, table by table."""
    merged = copy.deepcopy(values)
    for key, value in changes.items():
        is_table = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merged(merged[key], value) if is_table else value
    return merged


def _cell(file: Path, values: dict[str, Any], settings: dict[str, Any], output: Path) -> Cell:
    """Return one run. Alpha keeps its ratio to the rank, so that ranks compare as they should."""
    own = copy.deepcopy(values)
    adapter = own.setdefault("adapter", {})
    before = adapter.get("rank", 8), adapter.get("alpha")
    for key, value in settings.items():
        table = own.setdefault(PLACES[key], {}) if PLACES[key] else own
        table[key] = value
    if "rank" in settings and _is_number(before[0]) and _is_number(before[1]):
        adapter["alpha"] = before[1] / before[0] * settings["rank"]
    name = _name(settings)
    recipe = recipe_from(file, own | {"output": str((output / name).resolve())}, {})
    return Cell(name, settings, recipe)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0


def _name(settings: Mapping[str, Any]) -> str:
    """Return a folder's name that says what is varied."""
    words = []
    for key, value in settings.items():
        text = "+".join(map(str, value)) if isinstance(value, list) else str(value)
        words.append(f"{key}-{text}")
    return "_".join(words).replace("/", "-") or "as-it-is"
