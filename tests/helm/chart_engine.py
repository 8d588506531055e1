"""Renders and checks the chart with Helm's own engine; runs in an environment that has it.

Reads `[{"values": {…}}, …]` from standard input, and writes for each what came of it:
`{"documents": […], "invalid": […]}` or `{"error": "…"}`. Documents of kinds that Kubernetes itself
has are checked against its schemas, strictly; so are those of a request `{"documents": […]}`, which
renders nothing.
"""

import json
import sys
from typing import Any

import kubernetes_validate  # type: ignore[import-not-found]
import yaml
from helm_python import Chart, lint  # type: ignore[import-not-found]

OTHERS_KINDS = {
    *("ScaledObject", "ServiceMonitor", "PodMonitor", "PrometheusRule"),
    *("InferencePool", "HTTPRoute"),
}


def rendered(chart: Any, values: dict[str, Any]) -> dict[str, Any]:
    """Return the documents of one release, or why there are none."""
    try:
        chart.validate_schema(values)
        files = chart.render(values=values, name="qc", namespace="prod")
    except Exception as error:
        return {"error": str(error)}
    manifests = (text for name, text in files.items() if name.endswith(".yaml"))
    documents = [each for text in manifests for each in yaml.safe_load_all(text) if each]
    invalid = [found for each in documents for found in problems(each)]
    return {
        "documents": documents,
        "invalid": invalid,
        "notes": files["quickchange/templates/NOTES.txt"],
    }


def problems(document: dict[str, Any]) -> list[str]:
    """Return what Kubernetes' schema has against a document."""
    if document["kind"] in OTHERS_KINDS:
        return []
    try:
        kubernetes_validate.validate(document, kubernetes_validate.latest_version(), strict=True)
    except Exception as error:
        return [f"{document['kind']}: {error}"]
    return []


def answer(chart: Any, request: dict[str, Any]) -> dict[str, Any]:
    """Render, or only check."""
    if "values" in request:
        return rendered(chart, request["values"])
    documents = request["documents"]
    return {"documents": documents, "invalid": [p for each in documents for p in problems(each)]}


def main() -> None:
    """Answer every request."""
    folder = sys.argv[1]
    chart = Chart.load(folder)
    requests = json.load(sys.stdin)
    answers = [answer(chart, each) for each in requests]
    found = lint(folder, values={"auth": {"insecure": True}})
    json.dump({"answers": answers, "lint": found}, sys.stdout)


if __name__ == "__main__":
    main()
