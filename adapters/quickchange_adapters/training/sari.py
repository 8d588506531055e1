"""SARI: how well an answer changes a text, judged by how it was to be changed. Knows no models.

Likeness to the wanted text rewards what was left as it was; for texts that are to change little,
the source itself scores high. SARI looks at each change by itself.
"""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

ORDERS = range(1, 5)
_TOKEN = re.compile(r"\w+(?:['\u2019]\w+)*|[^\w\s]")

Runs = Counter[tuple[str, ...]]
"""How often each run of n tokens occurs."""


@dataclass(frozen=True, slots=True)
class Sari:
    """The three parts, each from 0 to 1."""

    add: float
    keep: float
    delete: float

    @property
    def score(self) -> float:
        """The mean of the parts."""
        return (self.add + self.keep + self.delete) / 3


def sari(source: str, answer: str, wanted: str) -> Sari:
    """Compare what an answer did to its source with what one wanted text does to it.

    I, O, R: runs of n = 1 to 4 tokens of source, answer and wanted text, with their counts; a
    token is a word in lower case, or a sign. `-` and `&` are of multisets.

    add(n)    = F1 of (O - I) against (R - I), each run counted once
    keep(n)   = F1 of (I & O) against (I & R)
    delete(n) = precision of (I - O) against (I - R)

    Each part is its mean over n. An n at which neither text does any such thing is left out (short
    texts have no runs of four); where only one does, it is 0. A part that nobody has is 1: nothing
    was to be done, and nothing was. So the wanted text has 1 in all parts, and a copy of the source
    has 0 in `add` and `delete` if anything was to be added and deleted.

    Source: Xu et al. 2016, Optimizing Statistical Machine Translation for Text Simplification
    (TACL 4), with one reference.
    """
    before, after, goal = (
        [_runs(_tokens(text), n) for n in ORDERS] for text in (source, answer, wanted)
    )
    return Sari(
        add=_part(_pairwise(_added, before, after), _pairwise(_added, before, goal), _f1),
        keep=_part(_pairwise(_kept, before, after), _pairwise(_kept, before, goal), _f1),
        delete=_part(
            _pairwise(_deleted, before, after), _pairwise(_deleted, before, goal), _precision
        ),
    )


def _tokens(text: str) -> list[str]:
    return _TOKEN.findall(text.lower())


def _runs(tokens: Sequence[str], n: int) -> Runs:
    return Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))


def _added(before: Runs, after: Runs) -> Runs:
    return Counter(after.keys() - before.keys())


def _kept(before: Runs, after: Runs) -> Runs:
    return before & after


def _deleted(before: Runs, after: Runs) -> Runs:
    return before - after


def _pairwise(
    operation: Callable[[Runs, Runs], Runs], before: Sequence[Runs], after: Sequence[Runs]
) -> list[Runs]:
    return [operation(a, b) for a, b in zip(before, after, strict=True)]


def _part(
    done: Sequence[Runs], wanted: Sequence[Runs], quality: Callable[[Runs, Runs], float]
) -> float:
    """Return the mean over those n at which there is anything; 1 if there is none."""
    found = [quality(a, b) for a, b in zip(done, wanted, strict=True) if a or b]
    return sum(found) / len(found) if found else 1.0


def _f1(done: Runs, wanted: Runs) -> float:
    return 2 * (done & wanted).total() / (done.total() + wanted.total())


def _precision(done: Runs, wanted: Runs) -> float:
    return (done & wanted).total() / done.total() if done else 0.0
