"""Policy scans by tools of their own: checkov over chart and Dockerfile, hadolint over the latter.

Each scan is also given something bad, so that a scanner that sees nothing is noticed.
"""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import yaml

from benchmarks.machine import ROOT
from tests.helm.rendered import Json

EXCUSED = {
    "CKV_K8S_8": (r"Pod\.", "the test's pod ends by itself: nothing is to be restarted"),
    "CKV_K8S_9": (r"Pod\.", "the test's pod serves nobody: nothing waits for it"),
    "CKV_K8S_11": (r".", "a CPU limit would throttle the engine's threads; the request holds"),
    "CKV_K8S_15": (r".", "IfNotPresent: tags of releases do not move"),
    "CKV_K8S_35": (
        r"Deployment\.|Job\.",
        "libraries read the catalog's URL, S3's keys and the caller's key from the environment",
    ),
    "CKV_K8S_43": (r".", "a digest is for whoever pushes the image to name"),
    "CKV2_K8S_6": (r".", "network policies are a scenario's choice (networkPolicy.enabled)"),
}
"""Checks that are not met: of which resources (a pattern), and why."""
BAD_POD = """\
apiVersion: v1
kind: Pod
metadata: {name: bad, namespace: prod}
spec:
  containers:
    - {name: bad, image: "busybox:1", securityContext: {privileged: true}}
"""
BAD_IMAGE = "FROM debian:latest\nRUN cd /tmp && sudo apt-get install -y hello\n"
NOWHERE = "http://127.0.0.1:9"


def checked(scanners: Path, folder: Path) -> tuple[list[Json], set[str]]:
    """Have checkov scan a folder; return what failed, and the files in which anything passed."""
    words = ["--directory", str(folder), "--framework", "kubernetes", "dockerfile"]
    words += ["--output", "json", "--compact", "--skip-download"]
    done = subprocess.run(
        [str(scanners / "checkov"), *words],
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ | {"HTTPS_PROXY": NOWHERE, "HTTP_PROXY": NOWHERE},
    )
    reports = json.loads(done.stdout)
    results = [each["results"] for each in reports]
    assert all(not each["parsing_errors"] for each in results)
    failed = [check for each in results for check in each["failed_checks"]]
    passed = {check["file_path"] for each in results for check in each["passed_checks"]}
    return failed, passed


def is_excused(check: Json) -> bool:
    pattern, _ = EXCUSED.get(check["check_id"], ("$^", ""))
    return re.match(pattern, check["resource"]) is not None


def in_words(check: Json) -> str:
    return f"{check['check_id']} {check['check_name']}: {check['file_path']} {check['resource']}"


def test_chart_and_dockerfile_pass_checkov(
    scanners: Path, scenarios: dict[str, Json], tmp_path: Path
) -> None:
    for name, answer in scenarios.items():
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump_all(answer["documents"]))
    shutil.copy(ROOT / "Dockerfile", tmp_path)
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad/pod.yaml").write_text(BAD_POD)
    (tmp_path / "bad/Dockerfile").write_text(BAD_IMAGE)
    failed, passed = checked(scanners, tmp_path)
    bad = {each["check_id"] for each in failed if each["file_path"].startswith("/bad/")}
    assert {"CKV_K8S_16", "CKV_DOCKER_3", "CKV_DOCKER_7"} <= bad
    ours = [each for each in failed if not each["file_path"].startswith("/bad/")]
    assert [in_words(each) for each in ours if not is_excused(each)] == []
    assert {f"/{name}.yaml" for name in scenarios} | {"/Dockerfile"} <= passed
    assert set(EXCUSED) - {each["check_id"] for each in ours} == set(), "excuses without need"


def linted(scanners: Path, file: Path) -> tuple[int, list[Any]]:
    words = [str(scanners / "hadolint"), "--format", "json", str(file)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    return done.returncode, json.loads(done.stdout)


def test_the_dockerfile_passes_hadolint(scanners: Path, tmp_path: Path) -> None:
    assert linted(scanners, ROOT / "Dockerfile") == (0, [])
    bad = tmp_path / "Dockerfile"
    bad.write_text(BAD_IMAGE)
    code, found = linted(scanners, bad)
    assert code == 1
    assert {"DL3007", "DL3004"} <= {each["code"] for each in found}
