"""What the examples' READMEs say of their figures is what their EVAL.md says."""

import re
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[3] / "adapters" / "examples"


@pytest.mark.parametrize("example", ["shakespeare", "product"])
def test_the_readme_tells_how_many_rows_were_asked(example: str) -> None:
    folder = EXAMPLES / example
    page = (folder / "EVAL.md").read_text(encoding="utf-8")
    num_rows = len((folder / "test.jsonl").read_text(encoding="utf-8").splitlines())
    asked = re.search(r"Greedy answers to (\d+) rows of `test\.jsonl`", page)
    assert asked is not None
    assert int(asked[1]) <= num_rows
    assert f"On {asked[1]} test " in (folder / "README.md").read_text(encoding="utf-8")
