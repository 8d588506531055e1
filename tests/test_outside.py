"""The suites of `make test-outside` are whole, and the page says how each went."""

import json
from pathlib import Path

from tests.documentation import ROOT, code_spans, page, table_rows
from tests.outside.environments import SUITES

OUTSIDE = ROOT / "tests" / "outside"


def test_every_suite_has_its_file_and_every_file_its_suite() -> None:
    assert {each.file for each in SUITES} == set(OUTSIDE.glob("*_suite.py"))


def test_suites_import_nothing_of_ours() -> None:
    for file in [each.file for each in SUITES] + [OUTSIDE / "conftest.py"]:
        text = file.read_text(encoding="utf-8")
        assert "import quickchange" not in text
        assert "from quickchange" not in text
        assert "from tests" not in text


def test_the_page_has_an_outcome_of_every_client() -> None:
    rows = list(table_rows(page("docs/compatibility.md").section("## Clients that are tried")))
    assert {code_spans(row[0])[0] for row in rows} == {each.client for each in SUITES}
    assert all(len(row) == 5 for row in rows)


def test_the_scored_task_is_sound() -> None:
    lines = Path(OUTSIDE / "tasks" / "opposites.jsonl").read_text(encoding="utf-8").splitlines()
    questions = [json.loads(line) for line in lines]
    assert len(questions) > 20
    for each in questions:
        assert len(set(each["choices"])) == 4
        assert 0 <= each["answer"] < 4
