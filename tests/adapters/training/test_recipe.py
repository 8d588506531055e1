"""Recipes: read strictly, all problems at once, the nearest known key named."""

from pathlib import Path
from typing import Any

import pytest
from quickchange_adapters.errors import RecipeInvalid
from quickchange_adapters.training.recipe import Recipe, read_recipe, recipe_from

DATA = {"train": "train.jsonl"}
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "unknown": ({"seeds": 1}, "seeds is not known (nearest: seed)"),
    "unknown inside": ({"adapter": {"rnak": 4}}, "adapter.rnak is not known (nearest: rank)"),
    "unlike any": ({"xyz": 1}, "xyz is not known (known: "),
    "no data": ({"data": {}}, "data.train is missing"),
    "rank": ({"adapter": {"rank": 0}}, "adapter.rank is 0, but must be a whole number from 1"),
    "rank true": ({"adapter": {"rank": True}}, "adapter.rank is True, but"),
    "bits": ({"base_bits": 5}, "base_bits is 5, but must be 16 or 8 or 4"),
    "method": ({"adapter": {"method": "ia3"}}, "adapter.method is 'ia3', but must be \"lora\""),
    "targets": ({"adapter": {"targets": []}}, "adapter.targets is []"),
    "rate": ({"training": {"learning_rate": "1e-4"}}, "training.learning_rate is '1e-4'"),
    "not finite": ({"training": {"learning_rate": float("nan")}}, "learning_rate is nan"),
    "task": ({"task": {"prompt": "no input"}}, "task.prompt: prompt has no {input}"),
    "task key": ({"task": {"promt": "{input}"}}, "task.promt: the key 'promt' is not known"),
    "table": ({"training": 3}, "training is 3, but must be a table"),
    "frozen": (
        {"adapter": {"method": "vera", "frozen_a": True}},
        "adapter.frozen_a does not go with 'vera'",
    ),
    "system": (
        {"form": "completion", "task": {"system": "Be brief."}},
        'task.system has no place in form "completion"',
    ),
}


def recipe_of(values: dict[str, Any], environ: dict[str, str] | None = None) -> Recipe:
    return recipe_from(Path("some/recipe.toml"), {"data": DATA, **values}, environ or {})


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_said_with_its_key(name: str) -> None:
    values, sentence = WRONG[name]
    with pytest.raises(RecipeInvalid) as caught:
        recipe_of(values)
    assert sentence in str(caught.value)


def test_all_problems_are_said_at_once() -> None:
    with pytest.raises(RecipeInvalid) as caught:
        recipe_of({"seeds": 1, "base_bits": 5, "adapter": {"rank": 0}})
    assert len(caught.value.problems) == 3


def test_paths_are_relative_to_the_recipe() -> None:
    recipe = recipe_of({"output": "out"})
    assert recipe.data.train == Path("some/train.jsonl")
    assert recipe.output == Path("some/out")


def test_variables_override_rank_and_alpha() -> None:
    values = {"adapter": {"rank": 4, "alpha": 8}}
    recipe = recipe_of(values, {"LORA_RANK": "16", "LORA_ALPHA": "40.5"})
    assert (recipe.adapter.rank, recipe.adapter.alpha) == (16, 40.5)
    assert recipe_of({}, {"LORA_RANK": "16"}).adapter.alpha == 32
    for name, text in (("LORA_RANK", "1.5"), ("LORA_RANK", "0"), ("LORA_ALPHA", "nan")):
        with pytest.raises(RecipeInvalid, match=f"the variable {name} is"):
            recipe_of(values, {name: text})


def test_a_file_that_is_no_recipe_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "recipe.toml"
    for data, sentence in ((b"a = ", "is no TOML"), (b"\xff", "is not UTF-8"), (None, "read")):
        if data is not None:
            file.write_bytes(data)
        else:
            file.unlink()
        with pytest.raises(RecipeInvalid, match=sentence):
            read_recipe(file)
