"""Whether a text nearly repeats another one: the Jaccard overlap of their word triples.

The generators of all examples drop what nearly repeats an earlier row or a held-out one. As a
command it looks through the committed splits: python near_duplicates.py sentiment shakespeare
"""

import json
import re
import sys
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

HERE = Path(__file__).parent
MAX_SIMILARITY = 0.5
HELD_OUT = ("valid.jsonl", "test.jsonl")
Row = dict[str, str]


def shingles(text: str) -> frozenset[str]:
    """Return the text's word triples (or its words, where it has fewer than four)."""
    words = re.findall(r"[a-z0-9']+", text.lower())
    size = 3 if len(words) > 3 else 1
    return frozenset(" ".join(words[i : i + size]) for i in range(len(words) - size + 1))


def similarity(a: frozenset[str], b: frozenset[str]) -> float:
    """Return the Jaccard overlap of two sets of shingles."""
    return len(a & b) / max(1, len(a | b))


class Seen:
    """The texts met so far, found by the shingles they share with a new one."""

    def __init__(self, texts: Iterable[str] = ()) -> None:
        self._marks: list[frozenset[str]] = []
        self._holders: defaultdict[str, set[int]] = defaultdict(set)
        for text in texts:
            self.add(text)

    def add(self, text: str) -> None:
        """Remember a text."""
        marks = shingles(text)
        for shingle in marks:
            self._holders[shingle].add(len(self._marks))
        self._marks.append(marks)

    def closest(self, text: str) -> float:
        """Return the similarity of the nearest text that was seen, 0 if there is none."""
        marks = shingles(text)
        near = set().union(*(self._holders.get(shingle, ()) for shingle in marks))
        return max((similarity(marks, self._marks[i]) for i in near), default=0.0)

    def has_close(self, text: str) -> bool:
        """Return whether a text nearly repeats one that was seen."""
        return self.closest(text) >= MAX_SIMILARITY


def read_rows(path: Path) -> list[Row]:
    """Return the rows of a JSON lines file."""
    rows: list[Row] = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return rows


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Write rows as a JSON lines file."""
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    path.write_text("".join(lines), encoding="utf-8")


def text_of(row: Row) -> str:
    """Return what the caller of an example sends."""
    return row["text"] if "text" in row else row["input"]


def crossing(folder: Path) -> list[tuple[str, float]]:
    """Return the held-out texts of an example that nearly repeat a row of another split."""
    seen = Seen(text_of(row) for row in read_rows(folder / "train.jsonl"))
    found: list[tuple[str, float]] = []
    for name in HELD_OUT:
        texts = [text_of(row) for row in read_rows(folder / name)]
        found += [(text, seen.closest(text)) for text in texts if seen.has_close(text)]
        for text in texts:
            seen.add(text)
    return found


def main() -> None:
    """Print what crosses; end with code 1 if anything does."""
    found = [(name, *hit) for name in sys.argv[1:] for hit in crossing(HERE / name)]
    for name, text, near in found:
        print(f"{name}: {near:.2f} {text}")
    print(f"{len(found)} near-duplicates across splits in {', '.join(sys.argv[1:])}")
    raise SystemExit(bool(found))


if __name__ == "__main__":
    main()
