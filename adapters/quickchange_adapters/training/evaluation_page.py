"""EVAL.md: figures of base and adapter side by side, and samples, good and bad."""

from collections.abc import Sequence

from quickchange_adapters.training.evaluation import (
    ADAPTER,
    BASE,
    Contender,
    Evaluation,
    best_trivial,
    row_order,
)
from quickchange_adapters.training.recipe import Recipe

NAME = "EVAL.md"
_MAX_SHOWN_CHARS = 400
_TIE = 0.01


def evaluation_page(recipe: Recipe, evaluation: Evaluation) -> str:
    """Return the page."""
    parts = [
        "# Evaluation",
        f"Written by `quickchange train {recipe.file.name}`; do not edit. Greedy answers to "
        f"{len(evaluation.examples)} rows of `{_test_name(recipe)}`, which was not trained on.",
        _headline(evaluation),
        _table(evaluation),
        *_without_model(evaluation),
        "## Samples",
        *_samples(evaluation, recipe.evaluation.samples),
    ]
    return "\n\n".join(parts) + "\n"


def _test_name(recipe: Recipe) -> str:
    return recipe.data.test.name if recipe.data.test is not None else ""


def _headline(evaluation: Evaluation) -> str:
    scores = evaluation.models[ADAPTER].scores
    figures = list(scores.figures)[: scores.num_headlines]
    return "\n".join(_verdict(evaluation, figure) for figure in figures)


def _verdict(evaluation: Evaluation, figure: str) -> str:
    """Return what one figure says of the adapter, the base, and what needs no model."""
    value, of_base = (evaluation.models[name].scores.figures[figure] for name in (ADAPTER, BASE))
    sentence = (
        f"**{figure[0].upper()}{figure[1:]}: {_percent(value)} with the adapter, "
        f"{_percent(of_base)} with the base alone.**"
    )
    best = best_trivial(evaluation, figure)
    if best is None:
        return sentence
    name, reached = best
    if value > reached + _TIE:
        return f"{sentence} Without a model, {name}: {_percent(reached)}."
    verdict = "ties with" if value >= reached - _TIE else "does worse than"
    return (
        f"{sentence} By this figure the adapter {verdict} what needs no model: {name} "
        f"({_percent(reached)})."
    )


def _table(evaluation: Evaluation) -> str:
    names = list(evaluation.models)
    contenders = list(evaluation.models.values())
    lines = [f"| | {' | '.join(names)} |", f"|---|{'---|' * len(names)}"]
    losses = ["-" if each.loss is None else f"{each.loss:.3f}" for each in contenders]
    lines.append(f"| held-out loss, nats a token of the answer | {' | '.join(losses)} |")
    lines += _figure_lines(contenders)
    return "\n".join(lines)


def _without_model(evaluation: Evaluation) -> list[str]:
    if not evaluation.trivial:
        return []
    names = list(evaluation.trivial)
    lines = [f"| {' | '.join(['without a language model', *names])} |"]
    lines.append(f"|---|{'---|' * len(names)}")
    return ["\n".join([*lines, *_figure_lines(list(evaluation.trivial.values()))])]


def _figure_lines(contenders: Sequence[Contender]) -> list[str]:
    figures = contenders[0].scores.figures
    return [
        f"| {figure} | {' | '.join(_percent(each.scores.figures[figure]) for each in contenders)} |"
        for figure in figures
    ]


def _samples(evaluation: Evaluation, num_samples: int) -> list[str]:
    """Return the worst rows, and rows spread over the better half."""
    order = row_order(evaluation.models[ADAPTER].scores.rows)
    best = max(evaluation.models[ADAPTER].scores.rows)
    scores = evaluation.models[ADAPTER].scores.rows
    worst = [i for i in order[:num_samples] if scores[i] < best]
    better = sorted(i for i in order[len(order) // 2 :] if i not in worst)
    step = max(1, len(better) // num_samples)
    good = better[::step][:num_samples]
    return [
        f"Good ones, spread over the better half ({len(good)}):",
        _sample_table(evaluation, good),
        f"The worst ones by the same score ({len(worst)}):" if worst else "No row was worse.",
        *([_sample_table(evaluation, worst)] if worst else []),
    ]


def _sample_table(evaluation: Evaluation, rows: Sequence[int]) -> str:
    lines = ["| input | wanted | adapter | base |", "|---|---|---|---|"]
    for i in rows:
        example = evaluation.examples[i]
        answers = [evaluation.models[name].answers[i].text for name in (ADAPTER, BASE)]
        cells = [example.input, example.answer, *answers]
        lines.append(f"| {' | '.join(map(_cell, cells))} |")
    return "\n".join(lines)


def _cell(text: str) -> str:
    """Return a text as a cell of a table: one line, nothing that Markdown would read."""
    shown = (
        text.strip() if len(text) <= _MAX_SHOWN_CHARS else f"{text[:_MAX_SHOWN_CHARS].strip()} …"
    )
    for sign, instead in (("\\", "\\\\"), ("|", "\\|"), ("<", "&lt;"), ("`", "\\`"), ("*", "\\*")):
        shown = shown.replace(sign, instead)
    return "<br>".join(shown.splitlines()) or "(nothing)"


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"
