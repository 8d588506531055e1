"""The dashboard and the alerts, as far as they can be checked without Prometheus."""

import json
import re
from typing import Any

import yaml

from benchmarks.machine import ROOT
from tests.documentation import page, table_rows
from tests.ops.prometheus_server import RULES
from tools.dashboard import DASHBOARD, TOTAL_WIDTH, render
from tools.dashboard_panels import ROWS

METRIC = re.compile(r"quickchange_[a-z_]+")
SUFFIX = re.compile(r"_(bucket|count|sum)$")
CASES = ROOT / "tests/ops/quickchange.rules.test.yaml"


def documented_metrics() -> set[str]:
    rows = table_rows(page("docs/observability.md").section("## Metrics"))
    return {row[0].strip("`") for row in rows}


def metrics_of(text: str) -> set[str]:
    names = documented_metrics()
    return {n if n in names else SUFFIX.sub("", n) for n in METRIC.findall(text)}


def rules() -> list[dict[str, Any]]:
    groups = yaml.safe_load(RULES.read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def test_the_file_is_what_the_panels_say() -> None:
    assert DASHBOARD.read_text(encoding="utf-8") == render(), "run: python tools/dashboard.py"


def test_the_panels_ask_for_metrics_that_there_are() -> None:
    asked = {query.expr for row in ROWS for panel in row.panels for query in panel.queries}
    used = set().union(*(metrics_of(expr) for expr in asked))
    assert used <= documented_metrics()
    assert len(used) > 30


def test_panels_have_their_own_ids_and_places() -> None:
    panels = json.loads(DASHBOARD.read_text())["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        x, y, width, height = (panel["gridPos"][key] for key in ("x", "y", "w", "h"))
        assert x + width <= TOTAL_WIDTH
        cells = {(x + i, y + j) for i in range(width) for j in range(height)}
        assert not taken & cells, panel["title"]
        taken |= cells


def test_every_alert_has_a_runbook_a_case_that_fires_and_one_that_does_not() -> None:
    names = [rule["alert"] for rule in rules()]
    assert len(set(names)) == len(names)
    runbook = page("docs/observability.md").section("## Alerts")
    tests = [
        case
        for group in yaml.safe_load(CASES.read_text())["tests"]
        for case in group["alert_rule_test"]
    ]
    for rule in rules():
        name = rule["alert"]
        assert f"### {name}\n" in runbook, name
        fires = {bool(case["exp_alerts"]) for case in tests if case["alertname"] == name}
        assert fires == {True, False}, name
        assert metrics_of(rule["expr"]) <= documented_metrics()
        assert {"summary", "description"} <= set(rule["annotations"])
