"""Which of many adapters a request asks for: all alike, or few often and many seldom."""

import random
from collections.abc import Sequence
from itertools import accumulate
from typing import Literal, get_args

Kind = Literal["uniform", "zipf"]
KINDS: tuple[Kind, ...] = get_args(Kind)


class Popularity:
    """Draws adapters' indices; equal seeds draw alike.

    `zipf`: adapter k is asked for in proportion to 1 / (k + 1)^exponent.
    """

    def __init__(self, kind: Kind, num_adapters: int, exponent: float, seed: int) -> None:
        power = exponent if kind == "zipf" else 0.0
        weights = ((index + 1) ** -power for index in range(num_adapters))
        self._cumulative = list(accumulate(weights))
        self._indices = range(num_adapters)
        self._random = random.Random(seed)

    def draw(self, count: int) -> list[int]:
        """Return the adapters of the next requests."""
        return self._random.choices(self._indices, cum_weights=self._cumulative, k=count)


def read_kinds(text: str) -> tuple[Kind, ...]:
    """Read a comma-separated list of kinds.

    Raises: ValueError.
    """
    known: dict[str, Kind] = {kind: kind for kind in KINDS}
    for word in text.split(","):
        if word not in known:
            raise ValueError(f"{word!r} is none of {', '.join(KINDS)}")
    return tuple(known[word] for word in text.split(","))


def read_counts(text: str) -> tuple[int, ...]:
    """Read a comma-separated list of positive numbers.

    Raises: ValueError.
    """
    words = text.split(",")
    for word in words:
        if not word.isdecimal() or int(word) < 1:
            raise ValueError(f"{word!r} is no count: write numbers from 1 on, with commas")
    return tuple(int(word) for word in words)


def num_distinct(indices: Sequence[int]) -> int:
    """Return how many different adapters were asked for."""
    return len(set(indices))
