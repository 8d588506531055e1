"""Metrics of answers: what they count, and what answers without a language model reach."""

from pathlib import Path

import pytest
from quickchange_adapters.errors import RecipeInvalid
from quickchange_adapters.training.answers import Answer
from quickchange_adapters.training.examples import Example
from quickchange_adapters.training.metrics import Accuracy, Metric, Style, load_chrf, metric_of
from quickchange_adapters.training.recipe import recipe_from
from quickchange_adapters.training.word_baseline import word_answers


def examples(*pairs: tuple[str, str], **fields: str) -> list[Example]:
    return [Example(a, b, Path("f"), i, {"input": a, **fields}) for i, (a, b) in enumerate(pairs)]


def answers(*texts: str, has_ended: bool = True) -> list[Answer]:
    return [Answer(text, has_ended) for text in texts]


def form_metric(form: str | None, name_field: str | None = "name") -> Metric:
    evaluation = {"metric": "form", "name_field": name_field} | ({"form": form} if form else {})
    values = {"data": {"train": "x"}, "evaluation": evaluation}
    return metric_of(recipe_from(Path("r.toml"), values, {}))


def test_a_label_is_right_alone_and_in_its_own_spelling() -> None:
    wanted = examples(("a", "positive"), ("b", "negative"), ("c", "negative"), ("d", "negative"))
    said = answers(" positive\n", "positive", "Negative.", "It is negative, not positive")
    scores = Accuracy().score(wanted, said)
    assert scores.rows == [1, 0, 0, 0]
    assert scores.figures["exactly right"] == 0.25
    assert scores.figures["says exactly one of the labels"] == 0.5
    assert scores.figures["the right label appears first"] == 0.75
    assert scores.figures["exactly right where it is 'positive'"] == 1
    (always,) = Accuracy().trivial(wanted).values()
    assert Accuracy().score(wanted, always).figures["exactly right"] == 0.75


def test_style_gives_nothing_for_one_word_of_it() -> None:
    source, wanted = "You walked slowly towards my garden.", "Thou walkedst slowly to my garden."
    metric = Style(load_chrf())
    rows = examples((source, wanted))
    thee = metric.score(rows, answers("thee")).figures
    assert thee["content words of the source kept"] == 0
    assert thee["chrF against the wanted text"] < 0.1
    right = metric.score(rows, answers(wanted)).figures
    assert right["chrF against the wanted text"] == pytest.approx(1)
    assert right["content words of the source kept"] == 0.75  # "towards" is said otherwise
    assert right["the same, of the wanted text"] == 0.75
    copied = metric.score(rows, metric.trivial(rows)["the input, copied"]).figures
    assert (copied["content words of the source kept"], copied["differs from the source"]) == (1, 0)


def test_style_tells_a_changed_text_from_a_copy() -> None:
    source, wanted = "You walked slowly to my garden.", "Thou walkedst slowly to my garden."
    metric = Style(load_chrf())
    rows = examples((source, wanted), (wanted, source))
    copied = metric.score(rows, metric.trivial(rows)["the input, copied"])
    right = metric.score(rows, answers(wanted, source))
    names = list(copied.figures)[: copied.num_headlines]
    assert names == ["chrF against the wanted text", "SARI against source and wanted text"]
    add = "its add part: F1 of new words and runs of words"
    assert (copied.figures[add], right.figures[add]) == (0, 1)
    assert copied.figures[names[0]] > 0.7
    assert copied.figures[names[1]] < 1 / 3 < right.figures[names[1]] == 1


def test_a_form_must_match_whole_name_its_thing_and_end() -> None:
    metric = form_metric(r"\w[^\n]+\n- [^\n]+")
    rows = examples(("i", "o"), name="Alma Lamp")
    right = "The alma lamp\n- bright"
    for said, row in (
        (answers(right), 1),
        (answers(right, has_ended=False), 2 / 3),
        (answers("A lamp\n- bright"), 2 / 3),
        (answers(right + "\nand more"), 2 / 3),
        (answers("nothing", has_ended=False), 0),
    ):
        scores = metric.score(rows, said)
        assert scores.rows == [row]
        assert scores.figures["all three of these"] == float(row == 1)


def test_a_form_that_cannot_be_used_is_refused() -> None:
    for form in (None, "(", r"(?=a)", "x" * 2000):
        with pytest.raises(RecipeInvalid, match="evaluation.form"):
            form_metric(form)


def test_words_alone_learn_what_words_alone_can_tell() -> None:
    train = examples(*[(f"{w} {i}", w) for w in ("good", "bad") for i in range(20)])
    test = examples(("bad news", "bad"), ("so good", "good"), ("unknown", "bad"))
    assert [answer.text for answer in word_answers(train, test)][:2] == ["bad", "good"]
