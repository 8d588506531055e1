"""Tables and JSON."""

import json
from pathlib import Path

import pytest

from benchmarks.machine import Machine
from benchmarks.report import Report, markdown_table, scenario_results, scenario_table
from benchmarks.timing import Figures
from benchmarks.workload import Scenario

FIGURES = [Figures(rate, 0.1, 0.2, 0.01, 0.02, 0.015, 1.0, 2.0, 1.0) for rate in (30.0, 10.0, 20.0)]


def test_a_table_lines_up() -> None:
    lines = markdown_table(("name", "n"), [("a", "1"), ("longer", "1000")]).splitlines()
    assert lines == [
        "| name   |    n |",
        "| ------ | ---: |",
        "| a      |    1 |",
        "| longer | 1000 |",
    ]


def test_a_scenario_shows_medians_and_the_spread() -> None:
    row = scenario_table({Scenario(8, 16): FIGURES}).splitlines()[2]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[:4] == ["8 adapters, 16 clients", "20.0 (10.0–30.0)", "100 / 200", "10.0 / 20.0"]
    assert cells[-1] == "–"


def test_what_is_printed_says_where_it_was_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    machine = Machine.here()
    results = scenario_results({Scenario(0, 1): FIGURES})
    report = Report("Title", machine, {"base": "tiny"}, "the table", results)
    report.publish(tmp_path / "r.md", tmp_path / "r.json")
    printed = capsys.readouterr().out
    assert printed.strip() == (tmp_path / "r.md").read_text().strip()
    for expected in (
        "### Title",
        machine.cpu,
        machine.commit,
        "torch 2",
        "base: tiny",
        "the table",
    ):
        assert expected in printed
    stored = json.loads((tmp_path / "r.json").read_text())
    assert [run["tokens_per_s"] for run in stored["results"][0]["runs"]] == [30.0, 10.0, 20.0]
    assert stored["machine"]["commit"] == machine.commit
