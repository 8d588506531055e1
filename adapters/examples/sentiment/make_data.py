"""Write train.jsonl: the reviews of handwritten.jsonl and many composed from phrases.toml.

The same seed gives the same file. Knows nothing of models. A composed review too close to another
one of any split is dropped; a handwritten one too close to a held-out one is an error.
"""

import argparse
import re
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

HERE = Path(__file__).parent
sys.path.append(str(HERE.parent))

from near_duplicates import Row, Seen, read_rows, write_rows  # noqa: E402

OPPOSITE = {"positive": "negative", "negative": "positive"}
HELD_OUT = ("valid.jsonl", "test.jsonl")


class Writer:
    """Draws clauses of one polarity about one thing of one domain."""

    def __init__(self, rng: Random, phrases: dict[str, Any], label: str) -> None:
        self.rng = rng
        self.phrases = phrases
        self.label = label
        self.domain = rng.choice(phrases["domains"])
        self.thing = rng.choice(self.domain["things"])
        self._used: set[str] = set()

    def draw(self, options: list[str]) -> str:
        """Return an option not yet used in this review, with its blanks filled."""
        fresh = [option for option in options if option not in self._used] or options
        choice = self.rng.choice(fresh)
        self._used.add(choice)
        return choice.replace("{thing}", self.thing)

    def general(self, kind: str, *, opposite: bool = False) -> str:
        """Return a clause of a kind (verdicts, negated, …) that fits any thing."""
        label = OPPOSITE[self.label] if opposite else self.label
        clause = self.draw(self.phrases[label][kind])
        if "{adj}" not in clause:
            return clause
        return clause.replace("{adj}", self.draw(self.phrases[OPPOSITE[label]]["adjectives"]))

    def fact(self, *, opposite: bool = False) -> str:
        """Return a clause about what happened, from this domain."""
        return self.draw(self.domain[OPPOSITE[self.label] if opposite else self.label])

    def verdict(self) -> str:
        """Return a closing opinion of one of the kinds."""
        return self.general(self.rng.choice(("verdicts", "verdicts", "negated", "understated")))

    def shared(self, kind: str) -> str:
        """Return a phrase without polarity."""
        return self.draw(self.phrases[kind])

    def pick(self, *options: str) -> str:
        """Return one of several wordings."""
        return self.rng.choice(options)


Form = Callable[[Writer], str]


def facts_only(w: Writer) -> str:
    a, b, c = w.fact(), w.fact(), w.fact()
    return w.pick(
        f"{a}.", f"{a}. {b}.", f"{a} and {b}.", f"{a}, {b}, and {c}.", f"{a}. {b}. {c}.",
        f"{a}; {b}.", f"what stays with me: {a}, {b}.", f"{a}. also, {b}.",
    )  # fmt: skip


def opinion_only(w: Writer) -> str:
    a, b = w.general("verdicts"), w.general("negated")
    ending = w.general("endings")
    return w.pick(f"{a}.", f"{a}!", f"{b}.", f"{b}. {a}.", f"{a}. {b}.", f"{ending} {a}.", ending)


def adjective(w: Writer) -> str:
    adjectives = [w.general("adjectives") for _ in range(3)]
    a, b, c = adjectives
    adverb, thing = w.shared("adverbs"), w.thing
    return w.pick(
        f"the {thing} was {adverb} {a}.", f"{adverb} {a} {thing}, {adverb} {b} service.",
        f"{a}, {b}, {c}.", f"this {thing} is {adverb} {a} and {b}. {w.fact()}.",
        f"{a} in the morning, {b} at night. {w.verdict()}.", f"what a {a} {thing}! {w.fact()}.",
        f"{w.general('endings')} {a} {thing}, {w.fact()}.", f"{a} {thing}",
    )  # fmt: skip


def negation(w: Writer) -> str:
    wrong = w.general("adjectives", opposite=True)
    a, thing = w.general("negated"), w.thing
    return w.pick(
        f"{a}. {w.fact()}.", f"{w.fact()}. {a}.", f"the {thing} was not {wrong}. {w.fact()}.",
        f"I had heard it was {wrong}. it isn't: {w.fact()}.", f"{wrong}? not this {thing}.",
        f"I wouldn't call this {thing} {wrong}. {a}.", f"{wrong} is the last word I'd use. {a}.",
        f"it is not that {w.fact(opposite=True)}. quite the reverse: {w.fact()}.",
    )  # fmt: skip


def but_clause(w: Writer) -> str:
    a, b, verdict = w.fact(opposite=True), w.fact(), w.verdict()
    but = w.pick("but", "yet", "still,", "and yet", "however,")
    return w.pick(
        f"{a}, {but} {b}. {verdict}.", f"{a}, {but} {verdict}.", f"{a}. {but} {b}, and {w.fact()}.",
        f"true, {a}. {but} {b}. {verdict}.", f"{a}, I admit, {but} {b}. {w.general('endings')}",
        f"on the one hand {a}; on the other {b} and {w.fact()}. {verdict}.",
    )  # fmt: skip


def concession(w: Writer) -> str:
    a, b, verdict = w.fact(opposite=True), w.fact(), w.verdict()
    though = w.pick("although", "even though", "though", "while")
    return w.pick(
        f"{though} {a}, {b}. {verdict}.", f"{b}, {though} {a}. {verdict}.",
        f"{verdict}, {though} {a}.", f"never mind that {a}: {b}. {verdict}.",
        f"granted, {a}; that does not change the fact that {b}. {verdict}.",
    )  # fmt: skip


def expectation(w: Writer) -> str:
    fear = w.general("fears")
    wrong = w.general("adjectives", opposite=True)
    a, feeling, thing = w.fact(), w.general("feelings"), w.thing
    return w.pick(
        f"I expected {fear} from this {thing}. {a}. {feeling}.", f"I am {feeling}. {a}.",
        f"having read the reviews I was hoping for {fear}. what I got: {a}."
        if w.label == "negative" else f"having read the reviews I feared {fear}. what I got: {a}.",
        f"everyone said it would be {wrong}. {a}, and I am {feeling}.",
        f"it sounded {wrong}; it turned out {w.general('adjectives')}. {a}.",
        f"the {thing} left me {feeling}. {w.verdict()}.",
    )  # fmt: skip


def other_people(w: Writer) -> str:
    person, a = w.shared("people"), w.fact()
    other, mine = w.general("adjectives", opposite=True), w.general("adjectives")
    return w.pick(
        f"{person} called this {w.thing} {other}. I found it {mine}: {a}.",
        f"{person} thinks it is {other}. I can't agree, because {a}. {w.verdict()}.",
        f"{person} and I agree for once: {mine}. {a}.", f"{person} saw it first: {a}.",
        f"I was told {w.fact(opposite=True)}. for us {a}, and {w.fact()}.",
        f"{person} asked me how it was. I said: {w.verdict()}.",
    )  # fmt: skip


def change_over_time(w: Writer) -> str:
    before, after, verdict = w.fact(opposite=True), w.fact(), w.verdict()
    other = w.general("adjectives", opposite=True)
    return w.pick(
        f"at first {before}. then things changed: {after}. {verdict}.",
        f"last year I would have said it is {other}. not any more: {after}.",
        f"the first day {before}; ever since, {after}. {verdict}.",
        f"I used to think this {w.thing} was {other}. then {after}, and {w.fact()}.",
        f"with my old {w.thing} {before}. with this one {after}.",
        f"with other people {before}. here {after}. {verdict}.",
    )  # fmt: skip


def exclaimed(w: Writer) -> str:
    cheer = w.pick("great", "oh wonderful", "well done", "brilliant", "how lovely", "bravo")
    a, b = w.fact(), w.fact()
    if w.label == "positive":
        return w.pick(f"{cheer}: {a}!", f"{a}. {cheer}, just what I needed!", f"{cheer}, {a}, {b}!")
    return w.pick(
        f"{cheer}: {a}.", f"{a}. {cheer}, just what I needed.", f"{cheer}, {a} and {b}.",
        f"if you like it when {a}, this is the {w.thing} for you.", f"{a}. lucky me.",
        f"the best part? {a}. {cheer}.", f"{a}, but hey, at least they took my money quickly.",
    )  # fmt: skip


def question(w: Writer) -> str:
    answer = w.general("answers")
    ask = w.pick("would I do it again?", "again?", "would I pay for it again?", "next time?")
    return w.pick(
        f"{w.fact()}. {ask} {answer}", f"{ask} {answer} {w.fact()}.",
        f"{w.fact(opposite=True)}, but {w.fact()}. {ask} {answer}", f"{ask} {answer}",
    )  # fmt: skip


def story(w: Writer) -> str:
    opener, a, b, c = w.shared("neutral_openers"), w.fact(), w.fact(), w.fact(opposite=True)
    return w.pick(
        f"{opener} {a}. {b}. {w.verdict()}.", f"{opener} {a}, and {b}. {w.general('endings')}",
        f"{opener} {c}, which is a start. {a}, though, and {b}. {w.verdict()}.",
        f"{opener} {w.verdict()}. why? {a}, {b}. {w.general('endings')}",
        f"{opener} {w.verdict()}.", f"{opener} {a}.",
        f"{opener} I was {w.general('feelings')} in the end: {a}. {w.verdict()}.",
    )  # fmt: skip


FORMS: tuple[tuple[Form, int], ...] = (
    (facts_only, 22), (opinion_only, 9), (adjective, 7), (negation, 11), (but_clause, 10),
    (concession, 7), (expectation, 7), (other_people, 5), (change_over_time, 7), (exclaimed, 5),
    (question, 4), (story, 10),
)  # fmt: skip


def capitalised(text: str) -> str:
    """Start every sentence in upper case."""
    return re.sub(r"(^|[.!?] )([a-z])", lambda found: found[1] + found[2].upper(), text)


def as_typed(rng: Random, text: str, label: str) -> str:
    """Return the text as a hurried or an excited person may type it, now and then."""
    face = " :)" if label == "positive" else " :("
    style = rng.random()
    if style < 0.08:
        return text.lower().rstrip(".")
    if style < 0.14:
        return capitalised(text).rstrip(".!") + rng.choice(("!", "!!", face, "..."))
    return capitalised(text)


def candidates(rng: Random, phrases: dict[str, Any]) -> Iterator[Row]:
    """Yield reviews without end, labels in turn."""
    forms, weights = zip(*FORMS, strict=True)
    while True:
        for label in OPPOSITE:
            writer = Writer(rng, phrases, label)
            text = as_typed(rng, rng.choices(forms, weights)[0](writer), label)
            topic = writer.domain["topic"]
            yield {"text": text, "label": label, "topic": topic, "kind": "composed"}


def handwritten_rows(seen: Seen) -> list[Row]:
    """Return the handwritten training reviews; end with a message if one repeats a held-out one."""
    rows = [row | {"kind": "handwritten"} for row in read_rows(HERE / "handwritten.jsonl")]
    repeated = [row["text"] for row in rows if seen.has_close(row["text"])]
    if repeated:
        raise SystemExit(f"handwritten.jsonl repeats held-out reviews: {repeated}")
    return rows


def make_train(num_composed: int, seed: int) -> list[Row]:
    """Return the handwritten training reviews and `num_composed` new ones, shuffled."""
    rng = Random(seed)
    phrases = tomllib.loads((HERE / "phrases.toml").read_text(encoding="utf-8"))
    seen = Seen(row["text"] for name in HELD_OUT for row in read_rows(HERE / name))
    rows = handwritten_rows(seen)
    num_rows = len(rows) + num_composed
    for row in rows:
        seen.add(row["text"])
    for row in candidates(rng, phrases):
        if len(rows) == num_rows:
            break
        if not seen.has_close(row["text"]):
            seen.add(row["text"])
            rows.append(row)
    rng.shuffle(rows)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--composed", type=int, default=450)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--output", type=Path, default=HERE / "train.jsonl")
    options = parser.parse_args()
    rows = make_train(options.composed, options.seed)
    write_rows(options.output, rows)
    print(f"{len(rows)} reviews in {options.output.name}")


if __name__ == "__main__":
    main()
