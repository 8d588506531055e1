"""Compare base and adapter on the handwritten reviews, and write the figures to EVAL.md.

The base is asked in three ways, since a model that was never told the task cannot know it. A
bag-of-words classifier trained on the same reviews shows what word counting alone would reach.
"""

import argparse
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from chat_form import (
    HERE,
    LABELS,
    TASK,
    answer_ids,
    answer_logits,
    answer_loss,
    left_padded,
    prompt_ids,
    read_rows,
)
from peft import PeftModel
from quickchange_adapters.task import Task
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

Row = dict[str, str]
NUM_ANSWER_TOKENS = 2
HELD_OUT = ("valid", "test")
KINDS = ("plain", "wry")
BATCH_ROWS = 20
PLAIN = "the plain review"
PROMPTS = {
    PLAIN: TASK,
    "an instruction": Task(
        "Is the following review positive or negative? "
        "Answer with one word, positive or negative.\n\nReview: {input}"
    ),
    "an instruction and two examples": Task(
        "Say whether a review is positive or negative.\n\n"
        "Review: The soup was cold and nobody cared.\nAnswer: negative\n\n"
        "Review: Best holiday we ever had.\nAnswer: positive\n\nReview: {input}\nAnswer:"
    ),
}


@dataclass(frozen=True, slots=True)
class Answers:
    """What a model said and preferred, one entry a row."""

    texts: list[str]
    margins: list[float]  # log-probability of "positive" minus that of "negative"

    def exact(self) -> float:
        """Share of rows answered with exactly one of the two words."""
        return share(text in LABELS for text in self.texts)

    def right(self, rows: list[Row]) -> float:
        """Share of rows whose text is exactly the label."""
        return share(text == row["label"] for text, row in zip(self.texts, rows, strict=True))

    def right_within(self, rows: list[Row]) -> float:
        """Share of rows where the first of the two words to appear, in any case, is the label."""
        return share(
            first_label(text) == row["label"] for text, row in zip(self.texts, rows, strict=True)
        )

    def right_by_margin(self, rows: list[Row], threshold: float = 0.0) -> float:
        """Share of rows whose likelier word of the two is the label."""
        words = ("positive" if margin > threshold else "negative" for margin in self.margins)
        return share(word == row["label"] for word, row in zip(words, rows, strict=True))


def share(values: Iterator[bool]) -> float:
    found = list(values)
    return sum(found) / len(found)


def first_label(text: str) -> str | None:
    found = re.search("|".join(LABELS), text.lower())
    return found[0] if found else None


def in_batches(rows: list[Any], title: str) -> Iterator[list[Any]]:
    for i in tqdm(range(0, len(rows), BATCH_ROWS), desc=title, unit="batch"):
        yield rows[i : i + BATCH_ROWS]


@torch.no_grad()
def margins(model: Any, tokenizer: Any, prompts: list[list[int]]) -> list[float]:
    """Return how much likelier "positive" is than "negative" after each prompt."""
    first = [answer_ids(tokenizer, label) for label in LABELS]
    rows = [prompt + first[0] for prompt in prompts]
    logits = answer_logits(model, rows, NUM_ANSWER_TOKENS, tokenizer.pad_token_id)[:, 0]
    return [float(value) for value in logits[:, first[0][0]] - logits[:, first[1][0]]]


@torch.no_grad()
def replies(model: Any, tokenizer: Any, prompts: list[list[int]]) -> list[str]:
    """Return each prompt's greedy reply of at most eight tokens."""
    ids, mask = left_padded(prompts, tokenizer.pad_token_id)
    output = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=8, do_sample=False)
    return list(tokenizer.batch_decode(output[:, ids.shape[1] :], skip_special_tokens=True))


def ask(model: Any, tokenizer: Any, rows: list[Row], form: Task, title: str) -> Answers:
    """Put every review to the model in one prompt form."""
    texts: list[str] = []
    found: list[float] = []
    for batch in in_batches(rows, title):
        prompts = [prompt_ids(tokenizer, row["text"], form) for row in batch]
        texts += replies(model, tokenizer, prompts)
        found += margins(model, tokenizer, prompts)
    return Answers(texts, found)


@torch.no_grad()
def held_out_loss(model: Any, tokenizer: Any, rows: list[Row], title: str) -> float:
    """Return the mean cross-entropy of the right answer's tokens after the plain review."""
    total = 0.0
    for batch in in_batches(rows, title):
        ids = [
            prompt_ids(tokenizer, row["text"]) + answer_ids(tokenizer, row["label"])
            for row in batch
        ]
        loss = answer_loss(model, ids, NUM_ANSWER_TOKENS, tokenizer.pad_token_id)
        total += loss.item() * len(batch)
    return total / len(rows)


def word_counts(rows: list[Row], vocabulary: dict[str, int]) -> torch.Tensor:
    """Return which words and word pairs each review holds: [rows, vocabulary]."""
    counts = torch.zeros(len(rows), len(vocabulary))
    for i, row in enumerate(rows):
        for term in terms(row):
            if term in vocabulary:
                counts[i, vocabulary[term]] = 1.0
    return counts


def terms(row: Row) -> list[str]:
    words = re.findall(r"[a-z']+", row["text"].lower())
    return words + [f"{a} {b}" for a, b in zip(words, words[1:], strict=False)]


def bag_of_words(train: list[Row], rows: list[Row]) -> float:
    """Return the accuracy on `rows` of a logistic regression over words and word pairs."""
    vocabulary = {
        term: i for i, term in enumerate(sorted({t for row in train for t in terms(row)}))
    }
    inputs = word_counts(train, vocabulary)
    targets = torch.tensor([float(row["label"] == "positive") for row in train])
    weight = torch.zeros(len(vocabulary), requires_grad=True)
    bias = torch.zeros((), requires_grad=True)
    optimizer = torch.optim.Adam([weight, bias], lr=0.05)
    for _ in range(200):
        optimizer.zero_grad()
        scores = inputs @ weight + bias
        loss = torch.nn.functional.binary_cross_entropy_with_logits(scores, targets)
        (loss + 1e-3 * weight.square().sum()).backward()
        optimizer.step()
    with torch.no_grad():
        guesses = word_counts(rows, vocabulary) @ weight + bias > 0
    return share(
        bool(guess) == (row["label"] == "positive")
        for guess, row in zip(guesses, rows, strict=True)
    )


def percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def table_line(name: str, answers: Answers, rows: list[Row]) -> str:
    median = sorted(answers.margins)[len(rows) // 2]
    cells = [
        name,
        percent(answers.exact()),
        percent(answers.right(rows)),
        percent(answers.right_within(rows)),
        percent(answers.right_by_margin(rows)),
        percent(answers.right_by_margin(rows, median)),
    ]
    return f"| {' | '.join(cells)} |"


def share_right(answers: Answers, rows: list[Row], field: str, value: str) -> float:
    """Return the share of exactly right answers among the rows whose field has this value."""
    pairs = zip(answers.texts, rows, strict=True)
    return share(text == row["label"] for text, row in pairs if row[field] == value)


def sample_lines(rows: list[Row], base: Answers, adapter: Answers) -> list[str]:
    """Return three reviews the adapter got right and two it got wrong, spread over the file."""
    right = [i for i, row in enumerate(rows) if adapter.texts[i] == row["label"]]
    wrong = [i for i, row in enumerate(rows) if adapter.texts[i] != row["label"]]
    chosen = [right[len(right) * n // 3] for n in range(3)]
    chosen += [wrong[len(wrong) * n // 2] for n in range(min(2, len(wrong)))]
    lines = ["| review | truth | adapter | base, plain review |", "|---|---|---|---|"]
    for i in chosen:
        said = base.texts[i].replace("\n", " ")
        lines.append(
            f"| {rows[i]['text']} | {rows[i]['label']} | **{adapter.texts[i]}** | {said} … |"
        )
    return lines


def headline(split: str, rows: list[Row], adapter: Answers) -> list[str]:
    recalls = ", ".join(
        f"{percent(share_right(adapter, rows, field, value))} of the {value} ones"
        for field, values in (("label", LABELS), ("kind", KINDS))
        for value in values
    )
    return [
        f"**The adapter answers {percent(adapter.right(rows))} of the {len(rows)} handwritten "
        f"{split} reviews right**: {recalls}.",
        "",
        "Their topics do not occur in the training reviews. A plain review says what its writer "
        "thinks; a wry one leaves it to the reader, by irony, understatement or what happened.",
    ]


def comparison(rows: list[Row], asked: dict[str, Answers]) -> list[str]:
    return [
        "| model and what it is shown | says exactly one of the two words | exactly right "
        "| right word appears first | right word likelier | same, threshold at the median |",
        "|---|---|---|---|---|---|",
        *[table_line(name, answers, rows) for name, answers in asked.items()],
        "",
        "The last two columns compare the probabilities of the two words only, so that a model "
        "that likes to chat is not punished for it; the last one also removes a leaning towards "
        "one word by using what no user has, the balance of this test.",
    ]


def loss_table(losses: dict[tuple[str, str], float]) -> list[str]:
    return [
        "| held-out loss (nats a token, two tokens an answer) | base | adapter |",
        "|---|---|---|",
        *[
            f"| {split} | {losses['base', split]:.3f} | {losses['adapter', split]:.3f} |"
            for split in HELD_OUT
        ],
    ]


def report(
    split: str,
    rows: list[Row],
    asked: dict[str, Answers],
    losses: dict[tuple[str, str], float],
    counting: float,
) -> str:
    """Return EVAL.md."""
    adapter, base = asked[f"adapter, {PLAIN}"], asked[f"base, {PLAIN}"]
    parts = [
        ["# Evaluation"],
        ["Written by `evaluate.py`; do not edit. Greedy decoding, float32, CPU."],
        headline(split, rows, adapter),
        comparison(rows, asked),
        [
            "Logistic regression on words and word pairs, same training reviews: "
            f"{percent(counting)}."
        ],
        loss_table(losses),
        ["## Samples"],
        ["Three that it got right, then up to two that it got wrong, spread over the file."],
        sample_lines(rows, base, adapter),
    ]
    return "\n\n".join("\n".join(part) for part in parts) + "\n"


def measured(
    base_folder: Path, adapter_folder: Path, rows: list[Row]
) -> tuple[dict[str, Answers], dict[tuple[str, str], float]]:
    """Return what base and adapter say to `rows`, and their losses on both held-out splits."""
    tokenizer = AutoTokenizer.from_pretrained(base_folder)
    model: Any = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32).eval()
    splits = {name: read_rows(f"{name}.jsonl") for name in HELD_OUT}
    asked: dict[str, Answers] = {}
    losses: dict[tuple[str, str], float] = {}
    for who, forms in (("base", list(PROMPTS)), ("adapter", [PLAIN])):
        if who == "adapter":
            model = PeftModel.from_pretrained(model, adapter_folder).eval()
        for name in forms:
            title = f"{who}, {name}"
            asked[title] = ask(model, tokenizer, rows, PROMPTS[name], title)
        for name, split in splits.items():
            losses[who, name] = held_out_loss(model, tokenizer, split, f"{who}, {name} loss")
    return asked, losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base", type=Path, help="folder of the base model (Hugging Face form)")
    parser.add_argument("--adapter", type=Path, default=HERE / "adapter")
    parser.add_argument("--split", choices=HELD_OUT, default="test")
    parser.add_argument("--output", type=Path, default=HERE / "EVAL.md")
    options = parser.parse_args()
    logging.disable_progress_bar()
    rows = read_rows(f"{options.split}.jsonl")
    asked, losses = measured(options.base, options.adapter, rows)
    counting = bag_of_words(read_rows("train.jsonl"), rows)
    options.output.write_text(
        report(options.split, rows, asked, losses, counting), encoding="utf-8"
    )
    print(f"written: {options.output.name}")


if __name__ == "__main__":
    main()
