"""Write the Grafana dashboard: `python tools/dashboard.py`.

A test compares the file with what this makes of dashboard_panels.py.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tools.dashboard_panels import ROWS  # noqa: E402
from tools.dashboard_queries import Panel, Query  # noqa: E402

DASHBOARD = ROOT / "helm/quickchange/dashboards/quickchange.json"
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
TOTAL_WIDTH = 24
PANEL_HEIGHT = 8
STAT_HEIGHT = 4

Json = dict[str, Any]


def render() -> str:
    """Return the dashboard's JSON."""
    return json.dumps(dashboard(), indent=1) + "\n"


def dashboard() -> Json:
    """Return the dashboard as Grafana's model (schema 39: Grafana 10 and later)."""
    return {
        "title": "Quickchange",
        "uid": "quickchange",
        "description": "Requests, latency, adapters and memory of Quickchange servers.",
        "tags": ["quickchange", "lora", "llm"],
        "schemaVersion": 39,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "10s",
        "time": {"from": "now-30m", "to": "now"},
        "timezone": "browser",
        "annotations": {"list": []},
        "links": [],
        "templating": {"list": [*_variables()]},
        "panels": [*_panels()],
    }


def _variables() -> Iterator[Json]:
    yield {
        "name": "datasource",
        "label": "Data source",
        "type": "datasource",
        "query": "prometheus",
        "refresh": 1,
    }
    yield _label_variable("instance", "quickchange_build_info", "Server")
    of_servers = 'quickchange_adapter_requests_total{instance=~"$instance"}'
    yield _label_variable("adapter", of_servers, "Adapter")


def _label_variable(name: str, series: str, label: str) -> Json:
    query = f"label_values({series}, {name})"
    return {
        "name": name,
        "label": label,
        "type": "query",
        "datasource": DATASOURCE,
        "definition": query,
        "query": {"query": query, "refId": name},
        "refresh": 2,
        "sort": 1,
        "multi": True,
        "includeAll": True,
        "allValue": ".*",
        "current": {"text": ["All"], "value": ["$__all"]},
    }


def _panels() -> Iterator[Json]:
    number, y = 1, 0
    for row in ROWS:
        place = {"x": 0, "y": y, "w": TOTAL_WIDTH, "h": 1}
        yield {"id": number, "type": "row", "title": row.title, "gridPos": place, "panels": []}
        number, y, x = number + 1, y + 1, 0
        height = STAT_HEIGHT if row.panels[0].kind == "stat" else PANEL_HEIGHT
        for panel in row.panels:
            if x + panel.width > TOTAL_WIDTH:
                x, y = 0, y + height
            place = {"x": x, "y": y, "w": panel.width, "h": height}
            yield {"id": number, "gridPos": place, **_panel(panel)}
            number, x = number + 1, x + panel.width
        y += height


def _panel(panel: Panel) -> Json:
    until = f"Empty until {panel.empty_until}." if panel.empty_until else ""
    return {
        "type": panel.kind,
        "title": panel.title,
        "description": " ".join(filter(None, (panel.text, until))),
        "datasource": DATASOURCE,
        "targets": [_target(panel, query, at) for at, query in enumerate(panel.queries)],
        "fieldConfig": {"defaults": _defaults(panel), "overrides": []},
        "options": _options(panel),
        **({"transformations": [_TABLE]} if panel.kind == "table" else {}),
    }


def _target(panel: Panel, query: Query, at: int) -> Json:
    is_table = panel.kind == "table"
    formats = {"table": "table", "heatmap": "heatmap"}
    return {
        "refId": chr(ord("A") + at),
        "datasource": DATASOURCE,
        "expr": query.expr,
        "legendFormat": query.legend or panel.title,
        "format": formats.get(panel.kind, "time_series"),
        "instant": is_table,
        "range": not is_table,
    }


def _defaults(panel: Panel) -> Json:
    defaults: Json = {"unit": panel.unit, "min": 0}
    if panel.kind == "timeseries":
        defaults["custom"] = {
            "drawStyle": "line",
            "lineWidth": 1,
            "fillOpacity": 20 if panel.is_stacked else 5,
            "showPoints": "never",
            "stacking": {"mode": "normal" if panel.is_stacked else "none", "group": "A"},
        }
    return defaults


def _options(panel: Panel) -> Json:
    reduced = {"calcs": ["lastNotNull"], "fields": "", "values": False}
    legend = {"displayMode": "list", "placement": "bottom", "showLegend": True}
    options: dict[str, Json] = {
        "timeseries": {"legend": legend, "tooltip": {"mode": "multi", "sort": "desc"}},
        "stat": {"reduceOptions": reduced, "graphMode": "area", "textMode": _text_mode(panel)},
        "bargauge": {"reduceOptions": reduced, "orientation": "horizontal", "displayMode": "basic"},
        "heatmap": {"calculate": False, "cellGap": 1, "yAxis": {"unit": "short"}},
        "table": {"showHeader": True, "cellHeight": "sm"},
    }
    return options[panel.kind]


def _text_mode(panel: Panel) -> str:
    """A panel whose labels are the news shows its series' names."""
    return "name" if "{{" in panel.queries[0].legend else "value"


_TABLE = {"id": "organize", "options": {"excludeByName": {"Time": True}}}


def main() -> None:
    """Write the file."""
    DASHBOARD.parent.mkdir(parents=True, exist_ok=True)
    DASHBOARD.write_text(render(), encoding="utf-8")


if __name__ == "__main__":
    main()
