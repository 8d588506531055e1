"""Everything about a run that can be wrong before it begins: recipe, files, rows, lengths.

Reads the tokenizer and the base's config, never its weights.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from quickchange_adapters.errors import CannotTrain, DataInvalid, RecipeInvalid
from quickchange_adapters.training.adapter_model import unserved
from quickchange_adapters.training.base_model import context_length, weights_sample
from quickchange_adapters.training.examples import Example, read_examples
from quickchange_adapters.training.metrics import metric_of
from quickchange_adapters.training.prompt_form import (
    PromptForm,
    TokenRow,
    end_ids_of,
    token_rows,
)
from quickchange_adapters.training.recipe import Recipe

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Split:
    """Rows of one kind, as texts and as token ids, in the same order."""

    examples: list[Example]
    rows: list[TokenRow]


@dataclass(frozen=True, slots=True)
class Prepared:
    """A run that can begin."""

    recipe: Recipe
    base_folder: Path
    tokenizer: Any
    form: PromptForm
    train: Split
    validation: Split
    test: Split | None
    fingerprint: str


def prepare(recipe: Recipe, base_folder: Path, say: Say) -> Prepared:
    """Read and check everything that a run needs but the weights.

    Raises: CannotTrain.
    """
    _refuse_unserved(recipe, say)
    if recipe.data.test is not None:
        metric_of(recipe)
    config, tokenizer = _read_base(base_folder)
    form = PromptForm(tokenizer, recipe.task, recipe.form, end_ids_of(base_folder))
    train, validation, test = _read_splits(recipe)
    _warn_of_leaks(train, {"validation": validation, "test": test}, say)
    longest = min(recipe.loop.max_length, context_length(config))
    trained, validated = (Split(e, token_rows(e, form, longest)) for e in (train, validation))
    tested = Split(test, token_rows(test, form, longest)) if test else None
    fingerprint = _fingerprint(recipe, base_folder, (trained, validated))
    splits = (trained, validated, tested)
    return Prepared(recipe, base_folder, tokenizer, form, *splits, fingerprint)


def _refuse_unserved(recipe: Recipe, say: Say) -> None:
    problems = unserved(recipe.adapter)
    if not problems:
        return
    reasons = "; ".join(problem.message for problem in problems)
    if not recipe.adapter.allow_unserved:
        sentence = (
            f"what this trains could not be served: {reasons}. Choose another method, or write "
            "adapter.allow_unserved = true to train it for other tools"
        )
        raise RecipeInvalid(str(recipe.file), [sentence])
    say(f"warning: what this trains cannot be served: {reasons}")


def _read_base(folder: Path) -> tuple[Any, Any]:
    from transformers import AutoConfig, AutoTokenizer

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        return config, AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CannotTrain(f"the base in {folder} cannot be read: {reason}") from error


def _read_splits(recipe: Recipe) -> tuple[list[Example], list[Example], list[Example] | None]:
    data = recipe.data
    train = read_examples(data.train, data)
    test = read_examples(data.test, data) if data.test else None
    if data.validation is not None:
        return train, read_examples(data.validation, data), test
    num_held_out = max(1, round(data.validation_share * len(train)))
    if num_held_out >= len(train):
        raise DataInvalid([f"{data.train}: one row is too few to hold any out for validation"])
    shuffled = Random(recipe.seed).sample(train, len(train))
    return shuffled[num_held_out:], shuffled[:num_held_out], test


def _warn_of_leaks(
    train: Sequence[Example], others: dict[str, list[Example] | None], say: Say
) -> None:
    seen = {each.input for each in train}
    for name, examples in others.items():
        num_seen = sum(each.input in seen for each in examples or ())
        if num_seen:
            say(
                f"warning: {num_seen} of {len(examples or ())} {name} rows have an input that is "
                "trained on too; figures on them say little"
            )


def _fingerprint(recipe: Recipe, base: Path, splits: Sequence[Split]) -> str:
    """Return a digest of all that decides what a run learns."""
    digest = hashlib.sha256()
    settings = (
        *(recipe.adapter, recipe.loop, recipe.seed),
        *(recipe.base_bits, recipe.base_storage),
    )
    digest.update(repr(settings).encode())
    for split in splits:
        digest.update(repr(split.rows).encode())
    digest.update(weights_sample(base))
    digest.update((base / "config.json").read_bytes())
    return digest.hexdigest()
