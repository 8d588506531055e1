"""Write this folder's splits: the handwritten pairs, and many composed from lists.toml.

`sentences.py` has the forms of sentence. The same seed gives the same files. Knows nothing of
models. A composed pair that nearly repeats another one of any split is dropped; a handwritten one
too close to a held-out one is an error.
"""

import argparse
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

HERE = Path(__file__).parent
sys.path.append(str(HERE.parent))

from near_duplicates import Row, Seen, read_rows, write_rows  # noqa: E402
from sentences import FORMS, Pair, Writer, decorated  # noqa: E402

HELD_OUT = ("valid", "test")


def row_of(pair: Pair, topic: str, kind: str) -> Row:
    """Return a pair as a row of a file."""
    return {"input": pair.modern, "answer": pair.early, "topic": topic, "kind": kind}


def composed(rng: Random, lists: dict[str, Any]) -> Iterator[Row]:
    """Yield pairs without end."""
    forms, weights = zip(*FORMS, strict=True)
    while True:
        writer = Writer(rng, lists)
        pair = decorated(writer, rng.choices(forms, weights)[0](writer))
        yield row_of(pair, writer.topic["topic"], "composed")


def handwritten_rows(seen: Seen) -> list[Row]:
    """Return the handwritten training pairs; end with a message if one repeats a held-out one."""
    rows = [row | {"kind": "handwritten"} for row in read_rows(HERE / "handwritten.jsonl")]
    repeated = [row["input"] for row in rows if seen.has_close(row["input"])]
    if repeated:
        raise SystemExit(f"handwritten.jsonl repeats held-out pairs: {repeated}")
    return rows


def make_train(num_composed: int, seed: int) -> list[Row]:
    """Return the handwritten training pairs and `num_composed` new ones, shuffled."""
    rng = Random(seed)
    lists = tomllib.loads((HERE / "lists.toml").read_text(encoding="utf-8"))
    seen = Seen(row["input"] for name in HELD_OUT for row in read_rows(HERE / f"{name}.jsonl"))
    rows = handwritten_rows(seen)
    num_rows = len(rows) + num_composed
    for row in rows:
        seen.add(row["input"])
    for row in composed(rng, lists):
        if len(rows) == num_rows:
            break
        if not seen.has_close(row["input"]):
            seen.add(row["input"])
            rows.append(row)
    rng.shuffle(rows)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--composed", type=int, default=1150)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--output", type=Path, default=HERE / "train.jsonl")
    options = parser.parse_args()
    rows = make_train(options.composed, options.seed)
    write_rows(options.output, rows)
    print(f"{len(rows)} pairs in {options.output.name}")


if __name__ == "__main__":
    main()
