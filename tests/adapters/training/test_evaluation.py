"""Evaluation: base against adapter on held-out rows, and the page that it becomes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from quickchange_adapters.errors import CannotTrain
from quickchange_adapters.training.answers import Answer
from quickchange_adapters.training.evaluation import (
    ADAPTER,
    BASE,
    BASE_TOLD,
    Contender,
    Evaluation,
    evaluate,
)
from quickchange_adapters.training.evaluation_page import evaluation_page
from quickchange_adapters.training.examples import Example
from quickchange_adapters.training.metrics import Accuracy, Style, load_chrf
from quickchange_adapters.training.prepared import Prepared
from quickchange_adapters.training.run import TrainingRun
from quickchange_adapters.training.word_baseline import NAME as WORD_BASELINE
from transformers import AutoModelForCausalLM

from tests.adapters.training.training_world import prepared_in, recipe_values

QUIET: Any = lambda *words: lambda *more: None  # noqa: E731


@pytest.fixture(scope="module")
def trained(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    """A run of the tiny base that has learned its few rows, and its adapter."""
    values = recipe_values(tiny_base, max_steps=60, epochs=20, patience=9, validate_every=10)
    values["data"]["test"] = "valid.jsonl"
    values["evaluation"] = {
        "metric": "accuracy",
        "base_prompt": "Say it: {input}",
        "word_baseline": True,
    }
    prepared = prepared_in(tmp_path_factory.mktemp("evaluation"), tiny_base, values)
    TrainingRun(prepared, lambda sentence: None, lambda *step: None).run()
    return prepared


@pytest.fixture(scope="module")
def evaluation(trained: Prepared) -> Evaluation:
    return evaluate(trained, trained.recipe.output / "adapter", QUIET)


def test_the_adapter_beats_the_base_on_what_it_learned(evaluation: Evaluation) -> None:
    base, adapter = evaluation.models[BASE], evaluation.models[ADAPTER]
    assert list(evaluation.models) == [BASE, BASE_TOLD, ADAPTER]
    assert base.loss is not None
    assert adapter.loss is not None
    assert adapter.loss < base.loss / 2
    assert adapter.scores.figures["exactly right"] > base.scores.figures["exactly right"]
    assert set(evaluation.trivial) == {"always 'positive'", WORD_BASELINE}


def test_answers_are_those_that_hugging_face_gives_alone(
    trained: Prepared, evaluation: Evaluation, tiny_base: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    assert trained.test is not None
    for row, answer in zip(trained.test.rows, evaluation.models[BASE].answers, strict=True):
        ids = torch.tensor([row.prompt_ids])
        output = model.generate(input_ids=ids, max_new_tokens=4, do_sample=False)
        text = trained.tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
        assert answer.text == text


def test_the_page_has_figures_baselines_and_samples(
    trained: Prepared, evaluation: Evaluation
) -> None:
    page = evaluation_page(trained.recipe, evaluation)
    assert f"| | {BASE} | {BASE_TOLD} | {ADAPTER} |" in page
    assert f"| without a language model | always 'positive' | {WORD_BASELINE} |" in page
    assert "Greedy answers to 3 rows of `valid.jsonl`" in page
    assert page.count("| the quick ") >= 1


def made_up(adapter: list[str], labels: list[str]) -> Evaluation:
    examples = [
        Example(f"in | {i}\nline", label, Path("f"), i, {}) for i, label in enumerate(labels)
    ]
    found = {}
    for name, texts in ((BASE, ["<b>`"] * len(labels)), (ADAPTER, adapter)):
        answers = [Answer(text, True) for text in texts]
        found[name] = Contender(answers, Accuracy().score(examples, answers), 1.0)
    trivial = {
        name: Contender(answers, Accuracy().score(examples, answers))
        for name, answers in Accuracy().trivial(examples).items()
    }
    return Evaluation(examples, found, trivial)


def test_a_tie_with_what_needs_no_model_is_said(trained: Prepared) -> None:
    labels = ["no", "no", "no", "yes"]
    tie = evaluation_page(trained.recipe, made_up(["no"] * 4, labels))
    assert "the adapter ties with what needs no model: always 'no'" in tie
    worse = evaluation_page(trained.recipe, made_up(["yes"] * 4, labels))
    assert "the adapter does worse than what needs no model: always 'no'" in worse
    assert "always 'no' (75.0 %)." in worse
    better = evaluation_page(trained.recipe, made_up(labels, labels))
    assert "Without a model, always 'no': 75.0 %." in better
    assert "needs no model" not in better
    assert "No row was worse." in better


def test_style_is_told_by_chrf_and_by_sari(trained: Prepared) -> None:
    source, wanted = "You walked slowly to my garden.", "Thou walkedst slowly to my garden."
    rows = [Example(source, wanted, Path("f"), 1, {})]
    page = evaluation_page(trained.recipe, scored_by_style(rows, adapter=source, base="No."))
    chrf, by_sari = page.split("\n\n")[2].split("\n")
    assert chrf.startswith("**ChrF against the wanted text: ")
    assert "ties with what needs no model: the input, copied" in chrf
    assert by_sari.startswith("**SARI against source and wanted text: ")
    assert "ties with what needs no model: the input, copied" in by_sari
    page = evaluation_page(trained.recipe, scored_by_style(rows, adapter=wanted, base="No."))
    assert "**SARI against source and wanted text: 100.0 % with the adapter, " in page
    assert "| its add part: F1 of new words and runs of words | 0.0 % | 100.0 % |" in page
    assert "| its add part: F1 of new words and runs of words | 0.0 % | 0.0 % |" in page


def scored_by_style(rows: list[Example], **said: str) -> Evaluation:
    metric = Style(load_chrf())

    def contender(answers: list[Answer], loss: float | None = None) -> Contender:
        return Contender(answers, metric.score(rows, answers), loss)

    models = {
        name: contender([Answer(said[key], True)] * len(rows), 1.0)
        for name, key in ((BASE, "base"), (ADAPTER, "adapter"))
    }
    trivial = {name: contender(answers) for name, answers in metric.trivial(rows).items()}
    return Evaluation(rows, models, trivial)


def test_samples_are_good_and_bad_and_cannot_break_the_table(trained: Prepared) -> None:
    labels = ["no", "yes"] * 10
    said = [*labels[:16], "no", "no", "yes", "no"]
    page = evaluation_page(trained.recipe, made_up(said, labels))
    good, bad = page.split("The worst ones")
    assert good.count("| in \\| ") == 5
    assert bad.count("| in \\| ") == sum(a != b for a, b in zip(said, labels, strict=True))
    assert "| in \\| 17<br>line | yes | no | &lt;b>\\` |" in bad


def test_without_test_rows_or_an_adapter_there_is_nothing_to_evaluate(
    trained: Prepared, tiny_base: Path, tmp_path: Path
) -> None:
    with pytest.raises(CannotTrain, match="there is no adapter to evaluate"):
        evaluate(trained, tmp_path, QUIET)
    with pytest.raises(CannotTrain, match=r"data\.test is missing"):
        evaluate(prepared_in(tmp_path, tiny_base), tmp_path / "adapter", QUIET)
