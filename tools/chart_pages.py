"""Writes the chart's values.schema.json and README.md from the comments and types of values.yaml.

python tools/chart_pages.py            # write both
python tools/chart_pages.py --check    # exit 1 if either is not as it would be written
"""

import argparse
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

CHART = Path(__file__).resolve().parent.parent / "helm" / "quickchange"
FREE = frozenset({"config", "nodeSelector", "affinity", "podLabels", "podAnnotations"})
"""Objects whose keys the chart does not know."""
FREE_ENDINGS = ("labels", "annotations", "resources")
ENUMS: dict[str, list[object]] = {
    "image.pullPolicy": ["Always", "IfNotPresent", "Never"],
    "strategy.type": ["RollingUpdate", "Recreate"],
    "store.type": ["volume", "s3"],
    "store.volume.accessMode": ["ReadWriteOnce", "ReadWriteOncePod", "ReadWriteMany"],
    "service.type": ["ClusterIP", "NodePort", "LoadBalancer"],
    "gpu.count": [0, 1],
}
NUMBER_OR_TEXT = frozenset(
    {
        "train.loraRank",
        "train.loraAlpha",
        "store.s3.cacheBytes",
        "podDisruptionBudget.maxUnavailable",
    }
)
LEAST = {"probes.periodSeconds": 1, "probes.timeoutSeconds": 1, "probes.livenessFailures": 1}
LIST_ITEMS = {"gateway.httpRoute.hostnames": {"type": "string"}}


@dataclass(frozen=True, slots=True)
class Value:
    """One value of the chart: its dotted name, its default, and what it is for."""

    name: str
    default: Any
    text: str


def read_values(text: str) -> list[Value]:
    """Return the documented values in their order; a comment belongs to the key below it."""
    defaults = yaml.safe_load(text)
    found: list[Value] = []
    path: list[tuple[int, str]] = []
    comment: list[str] = []
    for line in text.splitlines():
        stripped = line.strip()
        if stripped.startswith("#"):
            comment.append(stripped.lstrip("# "))
            continue
        match = re.match(r"( *)([A-Za-z][A-Za-z0-9]*):", line)
        if match:
            depth = len(match[1])
            path = [*(each for each in path if each[0] < depth), (depth, match[2])]
            if comment:
                name = ".".join(key for _, key in path)
                found.append(Value(name, _at(defaults, name), " ".join(comment)))
        comment = []
    return found


def schema_of(defaults: Any, name: str = "") -> dict[str, Any]:
    """Return the JSON Schema of a value, from its default."""
    if name in ENUMS:
        return {"enum": ENUMS[name]}
    if name in NUMBER_OR_TEXT:
        return {"type": ["integer", "string"]}
    if isinstance(defaults, dict):
        if name in FREE or name.lower().endswith(FREE_ENDINGS):
            return {"type": "object"}
        parts = {
            key: schema_of(each, f"{name}.{key}".lstrip(".")) for key, each in defaults.items()
        }
        return {"type": "object", "properties": parts, "additionalProperties": False}
    if isinstance(defaults, bool):
        return {"type": "boolean"}
    if isinstance(defaults, int):
        return {"type": "integer", "minimum": LEAST.get(name, 0)}
    if isinstance(defaults, list):
        return {"type": "array", "items": LIST_ITEMS.get(name, {"type": "object"})}
    return {"type": "string"}


def schema_text(text: str) -> str:
    """Return values.schema.json; `global` is there for charts that hold this one."""
    schema = schema_of(yaml.safe_load(text))
    schema["properties"]["global"] = {"type": "object"}
    head = {"$schema": "http://json-schema.org/draft-07/schema#", "title": "Values of quickchange"}
    return json.dumps({**head, **schema}, indent=2) + "\n"


def readme_text(text: str, scenarios: Path) -> str:
    """Return README.md: how to install, the scenarios, every value."""
    head = (CHART / "README.head.md").read_text(encoding="utf-8").rstrip()
    rows = [
        f"| `{each.name}` | {_shown(each.default)} | {each.text} |" for each in read_values(text)
    ]
    table = "\n".join(["| value | default | meaning |", "|---|---|---|", *rows])
    return f"{head}\n\n## Scenarios\n\n{_scenario_table(scenarios)}\n\n## Values\n\n{table}\n"


def _scenario_table(folder: Path) -> str:
    rows = [
        f"| [`{file.name}`](scenarios/{file.name}) | {_first_comment(file)} |"
        for file in sorted(folder.glob("*.yaml"))
    ]
    return "\n".join(["| file | what it makes |", "|---|---|", *rows])


def _first_comment(file: Path) -> str:
    lines = file.read_text(encoding="utf-8").splitlines()
    return " ".join(line.lstrip("# ") for line in lines if line.startswith("#"))


def _at(values: Any, name: str) -> Any:
    for key in name.split("."):
        values = values[key]
    return values


def _shown(default: Any) -> str:
    return f"`{json.dumps(default)}`" if default not in ("", [], {}) else ""


def pages() -> Iterator[tuple[Path, str]]:
    """Yield each page with what belongs into it."""
    text = (CHART / "values.yaml").read_text(encoding="utf-8")
    yield CHART / "values.schema.json", schema_text(text)
    yield CHART / "README.md", readme_text(text, CHART / "scenarios")


def main() -> None:
    """Write, or compare."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing")
    options = parser.parse_args()
    stale = [
        file.name
        for file, text in pages()
        if not file.exists() or file.read_text(encoding="utf-8") != text
    ]
    if options.check:
        sys.exit(f"stale: {', '.join(stale)}; run tools/chart_pages.py" if stale else 0)
    for file, text in pages():
        file.write_text(text, encoding="utf-8")
        print(f"wrote {file.name}")


if __name__ == "__main__":
    main()
