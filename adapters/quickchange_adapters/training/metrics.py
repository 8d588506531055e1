"""How good answers are: one metric a kind of task, chosen by a recipe. Knows no models.

A metric gives figures over all rows, and a score a row that says which answers to show as good and
which as bad. Its `trivial` answers need no language model; what they reach is shown beside.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from typing import Protocol

import re2

from quickchange_adapters.errors import CannotTrain, RecipeInvalid
from quickchange_adapters.training.answers import Answer
from quickchange_adapters.training.examples import Example
from quickchange_adapters.training.recipe import Recipe
from quickchange_adapters.training.sari import sari

MAX_FORM_BYTES = 1 << 10
_SHORTEST_CONTENT_WORD = 4
_SHARED_LETTERS = 4


@dataclass(frozen=True, slots=True)
class Scores:
    """`figures`: shares from 0 to 1, by what they are a share of; `rows`: a score for each row.

    `num_headlines`: the first so many figures are what an evaluation is about.
    """

    figures: Mapping[str, float]
    rows: Sequence[float]
    num_headlines: int = 1


class Metric(Protocol):
    """A way to tell good answers from bad ones."""

    def score(self, examples: Sequence[Example], answers: Sequence[Answer]) -> Scores:
        """Compare answers with what was wanted."""
        ...

    def trivial(self, examples: Sequence[Example]) -> Mapping[str, list[Answer]]:
        """Return answers that need no model, by how they come about."""
        ...


def metric_of(recipe: Recipe) -> Metric:
    """Return the metric that a recipe names.

    Raises: CannotTrain when it lacks what it needs.
    """
    name = recipe.evaluation.metric
    if name == "accuracy":
        return Accuracy()
    if name == "style":
        return Style(load_chrf())
    if name == "form":
        return _form_of(recipe)
    return Likeness()


def _form_of(recipe: Recipe) -> "Form":
    settings = recipe.evaluation
    if settings.form is None:
        raise RecipeInvalid(str(recipe.file), ['evaluation.form is missing: metric = "form" needs'])
    if len(settings.form.encode()) > MAX_FORM_BYTES:
        raise RecipeInvalid(str(recipe.file), ["evaluation.form is longer than 1 KiB"])
    try:
        pattern = re2.compile(settings.form)
    except re2.error as error:
        raise RecipeInvalid(str(recipe.file), [f"evaluation.form: {error}"]) from error
    return Form(pattern, settings.name_field)


@dataclass(frozen=True, slots=True)
class Likeness:
    """How like the wanted text an answer is, letter by letter; for tasks without a metric."""

    def score(self, examples: Sequence[Example], answers: Sequence[Answer]) -> Scores:
        """Compare answers with what was wanted."""
        rows = [
            SequenceMatcher(None, answer.text.strip(), example.answer.strip()).ratio()
            for example, answer in zip(examples, answers, strict=True)
        ]
        figures = {"likeness to the wanted text": _mean(rows)}
        return Scores(figures | {"ends by itself": _ended(answers)}, rows)

    def trivial(self, examples: Sequence[Example]) -> Mapping[str, list[Answer]]:
        """Copy the input."""
        return {"the input, copied": _copies(examples)}


@dataclass(frozen=True, slots=True)
class Accuracy:
    """Labels: an answer is right if it is the wanted one and nothing else."""

    def score(self, examples: Sequence[Example], answers: Sequence[Answer]) -> Scores:
        """Compare answers with what was wanted."""
        labels = sorted({example.answer for example in examples})
        said = [answer.text.strip() for answer in answers]
        rows = [float(text == e.answer) for text, e in zip(said, examples, strict=True)]
        figures = {
            "exactly right": _mean(rows),
            "says exactly one of the labels": _mean([float(text in labels) for text in said]),
            "the right label appears first": _mean(
                [
                    float(_first_of(labels, text) == example.answer)
                    for text, example in zip(said, examples, strict=True)
                ]
            ),
        }
        for label in labels:
            of_label = [s for s, e in zip(rows, examples, strict=True) if e.answer == label]
            figures[f"exactly right where it is {label!r}"] = _mean(of_label)
        return Scores(figures, rows)

    def trivial(self, examples: Sequence[Example]) -> Mapping[str, list[Answer]]:
        """Always say the label that is most frequent."""
        wanted = [example.answer for example in examples]
        commonest = max(sorted(set(wanted)), key=wanted.count)
        return {f"always {commonest!r}": [Answer(commonest, True)] * len(examples)}


@dataclass(frozen=True, slots=True)
class Form:
    """Texts of a form: it matches a pattern whole, names what it is about, and ends by itself."""

    pattern: "re2._Regexp[str]"
    name_field: str | None

    def score(self, examples: Sequence[Example], answers: Sequence[Answer]) -> Scores:
        """Compare answers with what was wanted."""
        pairs = list(zip(examples, answers, strict=True))
        formed = [self.pattern.fullmatch(answer.text.strip()) is not None for _, answer in pairs]
        named = [self._names(example, answer) for example, answer in pairs]
        ended = [answer.has_ended for answer in answers]
        rows = [(a + b + c) / 3 for a, b, c in zip(formed, named, ended, strict=True)]
        figures = {
            "all three of these": _mean([float(row == 1) for row in rows]),
            "the right form": _mean([float(each) for each in formed]),
            "names what it is about": _mean([float(each) for each in named]),
            "ends by itself": _ended(answers),
        }
        return Scores(figures, rows)

    def _names(self, example: Example, answer: Answer) -> bool:
        name = example.fields.get(self.name_field, "") if self.name_field else ""
        return name.lower() in answer.text.lower()

    def trivial(self, examples: Sequence[Example]) -> Mapping[str, list[Answer]]:
        """Copy the input."""
        return {"the input, copied": _copies(examples)}


class ChrF(Protocol):
    """How like a text is to another, by the runs of letters that they share: 0 to 1."""

    def __call__(self, answer: str, wanted: str) -> float:
        """Compare two texts."""
        ...


@dataclass(frozen=True, slots=True)
class Style:
    """The same content said otherwise: like the wanted text, changed as wanted, the words kept."""

    chrf: ChrF
    words: "re.Pattern[str]" = field(default_factory=lambda: re.compile(r"[^\W\d_]+"))

    def score(self, examples: Sequence[Example], answers: Sequence[Answer]) -> Scores:
        """Compare answers with what was wanted."""
        pairs = list(zip(examples, answers, strict=True))
        likeness = [self.chrf(answer.text.strip(), example.answer) for example, answer in pairs]
        kept = [self.kept(example.input, answer.text) for example, answer in pairs]
        wanted = [self.kept(example.input, example.answer) for example in examples]
        changed = [float(answer.text.strip() != e.input.strip()) for e, answer in pairs]
        edits = [sari(e.input, answer.text, e.answer) for e, answer in pairs]
        figures = {
            "chrF against the wanted text": _mean(likeness),
            "SARI against source and wanted text": _mean([e.score for e in edits]),
            "its add part: F1 of new words and runs of words": _mean([e.add for e in edits]),
            "content words of the source kept": _mean(kept),
            "the same, of the wanted text": _mean(wanted),
            "differs from the source": _mean(changed),
            "ends by itself": _ended(answers),
        }
        return Scores(figures, likeness, num_headlines=2)

    def kept(self, source: str, answer: str) -> float:
        """Return the share of the source's content words that an answer has in some form.

        A content word has four letters or more and is kept if a word of the answer begins with
        the same four; what both say in other words is not counted.
        """
        content = [w for w in self._words(source) if len(w) >= _SHORTEST_CONTENT_WORD]
        said = {word[:_SHARED_LETTERS] for word in self._words(answer)}
        return _mean([float(word[:_SHARED_LETTERS] in said) for word in content]) if content else 1

    def _words(self, text: str) -> list[str]:
        return self.words.findall(text.lower())

    def trivial(self, examples: Sequence[Example]) -> Mapping[str, list[Answer]]:
        """Copy the input; or say one word of the style."""
        thee = [Answer("thee", True)] * len(examples)
        return {"the input, copied": _copies(examples), 'always "thee"': thee}


def load_chrf() -> ChrF:
    """Return sacrebleu's chrF.

    Raises: CannotTrain when it is not installed.
    """
    try:
        from sacrebleu.metrics.chrf import CHRF
    except ImportError as error:
        raise CannotTrain(
            'the metric "style" needs sacrebleu: pip install "quickchange-server[train]"'
        ) from error
    measure = CHRF()
    return lambda answer, wanted: measure.sentence_score(answer, [wanted]).score / 100


def _copies(examples: Sequence[Example]) -> list[Answer]:
    return [Answer(example.input, True) for example in examples]


def _first_of(labels: Sequence[str], text: str) -> str | None:
    places = {text.lower().find(label.lower()): label for label in labels}
    return min(
        ((place, label) for place, label in places.items() if place >= 0), default=(0, None)
    )[1]


def _ended(answers: Sequence[Answer]) -> float:
    return _mean([float(answer.has_ended) for answer in answers])


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
