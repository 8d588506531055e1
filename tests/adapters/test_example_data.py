"""The shipped examples' rows: enough of them, of other topics where held out, none repeated."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "adapters" / "examples"
NAMES = ("product", "sentiment", "shakespeare")
SPLITS = ("train", "valid", "test")
MAX_BYTES = 1_000_000

Row = dict[str, str]


def read_split(example: str, split: str) -> list[Row]:
    lines = (EXAMPLES / example / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    rows: list[Row] = [json.loads(line) for line in lines]
    return rows


def near_duplicates(*examples: Path) -> subprocess.CompletedProcess[str]:
    """Run the script on folders; their names may be paths."""
    command = [sys.executable, str(EXAMPLES / "near_duplicates.py"), *map(str, examples)]
    return subprocess.run(command, check=False, capture_output=True, text=True)


@pytest.mark.parametrize("example", NAMES)
def test_there_are_enough_rows_in_small_files(example: str) -> None:
    num_rows = {split: len(read_split(example, split)) for split in SPLITS}
    assert sum(num_rows.values()) >= 1500
    assert num_rows["valid"] >= 40
    assert num_rows["test"] >= 200
    files = [path for path in (EXAMPLES / example).rglob("*") if path.suffix == ".jsonl"]
    assert all(path.stat().st_size < MAX_BYTES for path in files)


@pytest.mark.parametrize("example", NAMES)
def test_test_rows_are_about_other_topics(example: str) -> None:
    topics = {split: {row["topic"] for row in read_split(example, split)} for split in SPLITS}
    assert len(topics["test"]) >= 15
    assert not topics["test"] & (topics["train"] | topics["valid"])


def test_no_held_out_row_nearly_repeats_another_splits() -> None:
    done = near_duplicates(*map(Path, NAMES))
    assert done.returncode == 0, done.stdout


def test_a_near_duplicate_is_found(tmp_path: Path) -> None:
    texts = {
        "train": "You said that you would come at noon, and now it is almost night.",
        "valid": "The robot refuses to obey.",
        "test": "You said that you would come at noon, and it is almost night.",
    }
    for split, text in texts.items():
        (tmp_path / f"{split}.jsonl").write_text(json.dumps({"input": text}) + "\n")
    done = near_duplicates(tmp_path)
    assert done.returncode == 1
    assert texts["test"] in done.stdout
    assert texts["valid"] not in done.stdout


@pytest.mark.parametrize("example", NAMES)
def test_inputs_and_answers_are_texts_that_vary(example: str) -> None:
    given, wanted = ("text", "label") if example == "sentiment" else ("input", "answer")
    rows = read_split(example, "train")
    assert all(row[given].strip() and row[wanted].strip() for row in rows)
    assert len({row[given] for row in rows}) == len(rows)
    first_words = {" ".join(row[given].split()[:2]).lower() for row in rows}
    assert len(first_words) >= 300


@pytest.mark.parametrize(
    ("example", "option", "written"),
    [
        ("sentiment", "train.jsonl", ("train.jsonl",)),
        ("shakespeare", "train.jsonl", ("train.jsonl",)),
        ("product", ".", ("train.jsonl", "valid.jsonl", "test.jsonl")),
    ],
)
def test_the_committed_splits_are_what_the_generator_writes(
    tmp_path: Path, example: str, option: str, written: tuple[str, ...]
) -> None:
    script = EXAMPLES / example / "make_data.py"
    command = [sys.executable, str(script), "--output", str(tmp_path / option)]
    subprocess.run(command, check=True, capture_output=True)
    for name in written:
        assert (tmp_path / name).read_bytes() == (EXAMPLES / example / name).read_bytes(), name
