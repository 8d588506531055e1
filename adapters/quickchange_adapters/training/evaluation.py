"""Base against adapter on rows that were never trained on. Knows nothing of how it is shown.

The adapter is read back from its files by PEFT, onto the base as it is served.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from quickchange_adapters.errors import CannotTrain
from quickchange_adapters.task import Task
from quickchange_adapters.training.answers import Answer, Answerer, OnRows
from quickchange_adapters.training.base_model import fast_number_format, load_base
from quickchange_adapters.training.examples import Example
from quickchange_adapters.training.metrics import Metric, Scores, metric_of
from quickchange_adapters.training.prepared import Prepared, Split
from quickchange_adapters.training.prompt_form import PromptForm, end_ids_of
from quickchange_adapters.training.trainer import held_out_loss
from quickchange_adapters.training.word_baseline import NAME as WORD_BASELINE
from quickchange_adapters.training.word_baseline import word_answers

BASE = "base"
BASE_TOLD = "base, told the task"
ADAPTER = "adapter"

NewBar = Callable[[str, int], OnRows]
"""Is told what begins and of how many rows; gives what is told how many are done."""


@dataclass(frozen=True, slots=True)
class Contender:
    """One that answers. `loss`: of the wanted answers' tokens, in nats; None for no model."""

    answers: list[Answer]
    scores: Scores
    loss: float | None = None


@dataclass(frozen=True, slots=True)
class Evaluation:
    """All contenders on the same rows; `trivial` ones are no language models."""

    examples: list[Example]
    models: Mapping[str, Contender]
    trivial: Mapping[str, Contender]


def evaluate(prepared: Prepared, adapter: Path, new_bar: NewBar) -> Evaluation:
    """Ask base and adapter the test rows, and score what they say.

    Raises: CannotTrain when there are no test rows or no adapter.
    """
    split = test_rows(prepared)
    metric = metric_of(prepared.recipe)
    models = AskedModels(prepared, split, metric, new_bar).run(adapter)
    trivial = dict(metric.trivial(split.examples))
    if prepared.recipe.evaluation.word_baseline:
        trivial[WORD_BASELINE] = word_answers(prepared.train.examples, split.examples)
    scored = {
        name: Contender(answers, metric.score(split.examples, answers))
        for name, answers in trivial.items()
    }
    return Evaluation(split.examples, models, scored)


def test_rows(prepared: Prepared) -> Split:
    """Return the rows that are evaluated on.

    Raises: CannotTrain when there are none.
    """
    if prepared.test is None:
        raise CannotTrain(f"{prepared.recipe.file}: data.test is missing: nothing to evaluate on")
    most = prepared.recipe.evaluation.max_rows
    return Split(prepared.test.examples[:most], prepared.test.rows[:most])


class AskedModels:
    """Asks one model after the other."""

    def __init__(self, prepared: Prepared, split: Split, metric: Metric, new_bar: NewBar) -> None:
        self._prepared = prepared
        self._split = split
        self._metric = metric
        self._new_bar = new_bar

    def run(self, adapter: Path) -> dict[str, Contender]:
        """Ask the base, the base told the task if the recipe says how, and the adapter."""
        recipe = self._prepared.recipe
        model = self._base()
        found = {BASE: self._ask(model, BASE, recipe.task)}
        if recipe.evaluation.base_prompt is not None:
            told = replace(recipe.task, prompt=recipe.evaluation.base_prompt)
            found[BASE_TOLD] = self._ask(model, BASE_TOLD, told, with_loss=False)
        found[ADAPTER] = self._ask(_with_adapter(model, adapter), ADAPTER, recipe.task)
        return found

    def base_alone(self) -> Contender:
        """Ask the base."""
        return self._ask(self._base(), BASE, self._prepared.recipe.task)

    def adapter_alone(self, adapter: Path) -> Contender:
        """Ask the adapter."""
        model = _with_adapter(self._base(), adapter)
        return self._ask(model, ADAPTER, self._prepared.recipe.task)

    def _base(self) -> Any:
        dtype = fast_number_format(self._prepared.recipe.loop.compute)
        return load_base(self._prepared.base_folder, dtype, 16)

    def _ask(self, model: Any, name: str, task: Task, with_loss: bool = True) -> Contender:
        prepared, split = self._prepared, self._split
        end_ids = end_ids_of(prepared.base_folder)
        form = PromptForm(prepared.tokenizer, task, prepared.recipe.form, end_ids)
        answerer = Answerer(
            model, prepared.tokenizer, task, list({form.end_id: None, **dict.fromkeys(end_ids)})
        )
        prompts = [form.prompt_ids(example.input) for example in split.examples]
        answers = answerer.answer(prompts, self._new_bar(name, len(prompts)))
        scores = self._metric.score(split.examples, answers)
        pack_tokens = prepared.recipe.loop.pack_tokens
        loss = held_out_loss(model, split.rows, pack_tokens) if with_loss else None
        return Contender(answers, scores, loss)


def _with_adapter(base: Any, folder: Path) -> Any:
    from peft import PeftModel

    if not (folder / "adapter_config.json").is_file():
        raise CannotTrain(f"{folder}: there is no adapter to evaluate; train it first")
    return PeftModel.from_pretrained(base, str(folder), autocast_adapter_dtype=False)


def best_trivial(evaluation: Evaluation, figure: str) -> tuple[str, float] | None:
    """Return which contender without a model does best by a figure, and how well."""
    found = [
        (name, each.scores.figures[figure])
        for name, each in evaluation.trivial.items()
        if figure in each.scores.figures
    ]
    return max(found, key=lambda pair: pair[1], default=None)


def first_figure(scores: Scores) -> tuple[str, float]:
    """Return the figure that a metric puts first."""
    return next(iter(scores.figures.items()))


def row_order(scores: Sequence[float]) -> list[int]:
    """Return the rows from the worst to the best; equal ones in their order."""
    return sorted(range(len(scores)), key=lambda i: scores[i])
