"""SARI: a published value, worked examples, a naive reckoning, and what must hold for any texts."""

import random
from fractions import Fraction

import pytest
from quickchange_adapters.training.sari import Sari, sari

SOURCE = "About 95 species are currently accepted ."
WANTED = "About 95 species are currently known ."


def test_a_published_value() -> None:
    """The value that Hugging Face's `wiki_split` metric documents for this one reference."""
    parts = sari(SOURCE, "About 95 you now get in .", WANTED)
    assert 100 * parts.score == pytest.approx(21.805555555555557, abs=1e-12)


def test_an_example_worked_by_hand() -> None:
    parts = sari("Why do you weep?", "Why dost thou weep?", "Wherefore dost thou weep?")
    # n   added by answer / wanted / both   kept: answer / wanted / both   deleted: answer / both
    # 1   dost thou / +wherefore / 2        why weep ? / weep ? / 2        do you / 2
    # 2   3 / 3 / 2                         1 / 1 / 1                      3 / 3
    # 3   3 / 3 / 2                         0 / 0                          3 / 3
    # 4   2 / 2 / 1                         0 / 0                          2 / 2
    assert parts.add == pytest.approx((4 / 5 + 2 / 3 + 2 / 3 + 1 / 2) / 4)
    assert parts.keep == pytest.approx((4 / 5 + 1) / 2)
    assert parts.delete == 1


def test_how_often_a_word_is_said_counts_where_it_is_kept_or_deleted() -> None:
    parts = sari("no no no", "no no", "no")
    assert parts.add == 1
    assert parts.keep == pytest.approx((Fraction(2, 3) + 0) / 2)
    assert parts.delete == 1


def test_deleting_too_much_costs_and_deleting_nothing_is_worth_nothing() -> None:
    assert sari("a b c d", "a", "a b c").delete < sari("a b c d", "a b c", "a b c").delete == 1
    assert sari("a b c d", "a b c d", "a b c").delete == 0


@pytest.mark.parametrize("source", [SOURCE, "I won!", "x", "You walk."])
def test_the_wanted_text_has_everything(source: str) -> None:
    for wanted in (WANTED, "The victory is mine!", "Thou", source):
        assert sari(source, wanted, wanted) == Sari(1, 1, 1)
        assert sari(source, f" {wanted.upper()}\n", wanted) == Sari(1, 1, 1)


@pytest.mark.parametrize("wanted", [WANTED, "The victory is mine!", "Thou"])
def test_a_copy_of_the_source_adds_and_deletes_nothing(wanted: str) -> None:
    for source in ("You have walked far, my friend.", "I won!", "You"):
        copied = sari(source, source, wanted)
        assert (copied.add, copied.delete) == (0, 0)
        assert copied.score <= Fraction(1, 3)


def test_where_nothing_was_to_be_changed_a_copy_is_right() -> None:
    assert sari("It rains.", "It rains.", "It rains.") == Sari(1, 1, 1)
    assert sari("It rains.", "It raineth.", "It rains.").add == 0


def test_an_empty_answer_keeps_and_adds_nothing() -> None:
    parts = sari(SOURCE, "", WANTED)
    assert (parts.add, parts.keep) == (0, 0)
    assert 0 < parts.delete < 1
    assert sari("", "", "") == Sari(1, 1, 1)


def naive(source: str, answer: str, wanted: str) -> list[float]:
    """Reckon the parts over lists, without multisets, from the definition."""
    parts: list[list[Fraction]] = [[], [], []]
    for n in range(1, 5):
        i, o, r = (
            [tuple(t.split()[k : k + n]) for k in range(len(t.split()) - n + 1)]
            for t in (source, answer, wanted)
        )
        every = sorted({*i, *o, *r})
        add, goal = ({g for g in x if g not in i} for x in (o, r))
        kept = [(min(i.count(g), o.count(g)), min(i.count(g), r.count(g))) for g in every]
        gone = [(max(i.count(g) - o.count(g), 0), max(i.count(g) - r.count(g), 0)) for g in every]
        if add or goal:
            parts[0].append(Fraction(2 * len(add & goal), len(add) + len(goal)))
        if any(map(sum, kept)):
            parts[1].append(Fraction(2 * sum(map(min, kept)), sum(map(sum, kept))))
        if any(map(sum, gone)):
            did = sum(a for a, _ in gone)
            parts[2].append(Fraction(sum(map(min, gone)), did) if did else Fraction(0))
    return [float(sum(part) / len(part)) if part else 1.0 for part in parts]


def test_random_texts_have_what_a_naive_reckoning_gives() -> None:
    rng = random.Random(5)
    for _ in range(400):
        texts = [" ".join(rng.choices("abcd", k=rng.randrange(9))) for _ in range(3)]
        parts = sari(texts[0], texts[1], texts[2])
        assert [parts.add, parts.keep, parts.delete] == pytest.approx(naive(*texts)), texts
        assert 0 <= parts.score <= 1
