"""What the chart became: the documents of one rendered release, and those of one kind."""

from typing import Any

from benchmarks.machine import ROOT

CHART = ROOT / "helm" / "quickchange"
SCENARIOS = sorted((CHART / "scenarios").glob("*.yaml"))
Json = dict[str, Any]


def documents(answer: Json, kind: str) -> list[Json]:
    assert "error" not in answer, answer
    return [each for each in answer["documents"] if each["kind"] == kind]


def only(answer: Json, kind: str) -> Json:
    (document,) = documents(answer, kind)
    return document


def pod_specs(answer: Json) -> list[Json]:
    templates = [
        each["spec"]["template"]["spec"]
        for kind in ("Deployment", "Job")
        for each in documents(answer, kind)
    ]
    return [*templates, *(each["spec"] for each in documents(answer, "Pod"))]


def config_text(answer: Json) -> str:
    """Return the settings that the server is started with."""
    text: str = documents(answer, "ConfigMap")[0]["data"]["quickchange.toml"]
    return text
