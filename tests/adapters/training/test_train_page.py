"""docs/train.md: its rows and its recipe are good ones, and its table has every key."""

import dataclasses
import re
import subprocess
from pathlib import Path
from typing import Any

from quickchange_adapters.training.prepared import prepare
from quickchange_adapters.training.recipe import (
    AdapterSettings,
    DataSettings,
    EvaluationSettings,
    LoopSettings,
    Recipe,
    read_recipe,
)

from tests.documentation import code_spans, page, table_rows

PAGE = page("docs/train.md")
NO_KEYS = {"file", "data", "task", "adapter", "loop", "evaluation"}
"""What a recipe holds under the names of its tables."""


def test_its_rows_and_recipe_can_be_trained_on(tiny_base: Path, tmp_path: Path) -> None:
    for block in PAGE.blocks("bash"):
        if "<<'END'" in block.text:
            subprocess.run(["bash", "-eu", "-c", block.text], cwd=tmp_path, check=True)
    file = tmp_path / "recipe.toml"
    file.write_text(file.read_text().replace("builtin:smollm2-135m", str(tiny_base)))
    said: list[str] = []
    prepared = prepare(read_recipe(file, {}), tiny_base, said.append)
    assert said == []
    assert len(prepared.train.rows) + len(prepared.validation.rows) == 24
    assert {example.answer for example in prepared.train.examples} == {
        "shipping",
        "billing",
        "support",
    }


def test_its_table_has_every_key_and_its_default() -> None:
    tables: tuple[Any, ...] = (Recipe, DataSettings, AdapterSettings, LoopSettings)
    keys = {f.name for table in (*tables, EvaluationSettings) for f in dataclasses.fields(table)}
    rows = list(table_rows(PAGE.section("## All keys")))
    named = {span for row in rows for span in code_spans(row[0]) if not span.startswith("[")}
    more = {span for row in rows for span in code_spans(row[2]) if span == "validation_share"}
    assert named | more | {"allow_unserved"} == keys - NO_KEYS
    assert re.search(r"allow_unserved = true", PAGE.text)
