"""Write this folder's splits: attribute lists and descriptions, composed from lists.toml.

Kinds of product of one split occur in no other, and test names are made of other parts. The same
seed gives the same files. A list that nearly repeats another one of any split is dropped.
"""

import argparse
import sys
import tomllib
from pathlib import Path
from random import Random
from typing import Any

HERE = Path(__file__).parent
sys.path.append(str(HERE.parent))

from descriptions import Describer, attribute_list, invented_product  # noqa: E402
from near_duplicates import Row, Seen, write_rows  # noqa: E402

NUM_ROWS = {"test": 220, "valid": 48, "train": 1600}


def composed(rng: Random, lists: dict[str, Any], split: str) -> Row:
    """Return one attribute list and its description."""
    product = invented_product(rng, lists, split)
    return {
        "input": attribute_list(rng, product),
        "answer": Describer(rng, lists, product).text(),
        "name": product.name,
        "topic": product.kind,
    }


def make_splits(seed: int) -> dict[str, list[Row]]:
    """Return all splits, the held-out ones first, so that training rows keep clear of them."""
    rng, seen = Random(seed), Seen()
    lists = tomllib.loads((HERE / "lists.toml").read_text(encoding="utf-8"))
    splits: dict[str, list[Row]] = {}
    for split, num_rows in NUM_ROWS.items():
        rows: list[Row] = []
        while len(rows) < num_rows:
            row = composed(rng, lists, split)
            if not seen.has_close(row["input"]) and not seen.has_close(row["answer"]):
                seen.add(row["input"])
                seen.add(row["answer"])
                rows.append(row)
        splits[split] = rows
    return splits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--output", type=Path, default=HERE, help="folder to write to")
    options = parser.parse_args()
    for split, rows in make_splits(options.seed).items():
        write_rows(options.output / f"{split}.jsonl", rows)
        print(f"{len(rows)} products in {split}.jsonl")


if __name__ == "__main__":
    main()
