"""Rows of files: what is wrong with them is said with file, line and field before anything runs."""

from pathlib import Path

import pytest
from quickchange_adapters.errors import DataInvalid
from quickchange_adapters.training.examples import MAX_SHOWN_PROBLEMS, read_examples
from quickchange_adapters.training.recipe import DataSettings

GOOD = b'{"input": "a", "answer": "b"}\n'
BAD_LINES = {
    "missing": (
        b'{"inputs": "a", "answer": "b"}',
        "the field 'input' is missing (nearest: 'inputs",
    ),
    "no like it": (b'{"x": "a", "answer": "b"}', "the field 'input' is missing (it has: 'x'"),
    "empty": (b'{"input": " ", "answer": "b"}', "the field 'input' is empty"),
    "empty answer": (b'{"input": "a", "answer": ""}', "the field 'answer' is empty"),
    "a number": (b'{"input": "a", "answer": 3}', "the field 'answer' is 3, but must be a text"),
    "null": (b'{"input": null, "answer": "b"}', "the field 'input' is null"),
    "latin-1": (b'{"input": "caf\xe9", "answer": "b"}', "is not UTF-8 (byte 0xe9)"),
    "cut off": (b'{"input": "a", "ans', "is no JSON"),
    "a list": (b'["a", "b"]', "is a JSON list, but must be an object"),
    "half a pair": (
        b'{"input": "\\ud800", "answer": "b"}',
        "the field 'input' holds half of a surrogate",
    ),
    "deep": (b"[" * 100_000, "is no JSON"),
}


def settings(file: Path) -> DataSettings:
    return DataSettings(train=file)


def problem_of(file: Path) -> str:
    with pytest.raises(DataInvalid) as caught:
        read_examples(file, settings(file))
    return str(caught.value)


@pytest.mark.parametrize("name", BAD_LINES)
def test_a_bad_line_is_named_with_its_file_and_field(name: str, tmp_path: Path) -> None:
    line, sentence = BAD_LINES[name]
    file = tmp_path / "rows.jsonl"
    file.write_bytes(GOOD + b"\n" + line + b"\n" + GOOD)
    assert f"{file}, line 3: {sentence}" in problem_of(file)


def test_all_problems_are_said_at_once_and_the_rest_counted(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b'{"input": "", "answer": ""}\n' * 20)
    text = problem_of(file)
    assert text.count("rows.jsonl, line") == MAX_SHOWN_PROBLEMS
    assert f"and {40 - MAX_SHOWN_PROBLEMS} more" in text


def test_json_lines_and_csv_mean_the_same(tmp_path: Path) -> None:
    lines, commas, tabs = (tmp_path / f"rows.{end}" for end in ("jsonl", "csv", "tsv"))
    lines.write_text('{"input": "caf\u00e9, \\"so\\"\\nit", "answer": "b", "topic": "t"}\n')
    commas.write_text('\ufeffinput,answer,topic\r\n"caf\u00e9, ""so""\nit",b,t\r\n')
    tabs.write_text('input\tanswer\ttopic\n"caf\u00e9, ""so""\nit"\tb\tt\n')
    found = [read_examples(file, settings(file)) for file in (lines, commas, tabs)]
    assert len({(e.input, e.answer, e.fields["topic"]) for (e,) in found}) == 1


def test_csv_lines_are_counted_as_an_editor_does(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_text('input,answer\n"two\nlines",b\n,b\n')
    assert f"{file}, line 4: the field 'input' is empty" in problem_of(file)
    file.write_text("input,answer\na,b\na\n")
    assert f"{file}, line 3: the field 'answer' is missing" in problem_of(file)
    file.write_text("input,answer\na,b\na, or so,b\n")
    assert f"{file}, line 3: has 3 fields, but the first line has 2; a text" in problem_of(file)
    file.write_bytes(b"input,answer\na,b\ncaf\xe9,b\n")
    assert f"{file}, line 3: is not UTF-8" in problem_of(file)
    file.write_text('input,answer\na,b\n"a,b\n')
    assert f"{file}, line 3: is no CSV" in problem_of(file)


@pytest.mark.parametrize(
    ("heading", "sentence"),
    [
        ("a first,x", "the field 'answer' is missing (it has: 'a first', 'x')"),
        ("input;answer", "it looks separated by ';': use commas, or tabs in a .tsv"),
        ("input,input,answer", "has the field 'input' twice"),
    ],
)
def test_a_first_line_without_the_fields_is_said_once(
    heading: str, sentence: str, tmp_path: Path
) -> None:
    file = tmp_path / "rows.csv"
    file.write_text(f"{heading}\n" + "a,b\n" * 9)
    text = problem_of(file)
    assert sentence in text
    assert text.count(f"{file}, line ") == text.count(f"{file}, line 1: ") <= 2


def test_a_spreadsheet_is_known_as_one(tmp_path: Path) -> None:
    file = tmp_path / "rows.xlsx"
    file.write_bytes(b"PK\x03\x04" + bytes(range(256)))
    assert "save its rows as CSV" in problem_of(file)


@pytest.mark.parametrize("data", [b"", b"\n\n", b"\xef\xbb\xbf"])
def test_a_file_without_rows_is_refused(data: bytes, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(data)
    assert f"{file}: has no rows" in problem_of(file)


def test_utf_16_and_a_file_that_is_not_there_are_named(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    assert f"{file}: cannot be read" in problem_of(file)
    file.write_text('{"input": "a", "answer": "b"}\n', encoding="utf-16")
    assert f"{file}, line 1: this is UTF-16" in problem_of(file)
