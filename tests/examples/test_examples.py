"""The programs in examples/ run as people run them, against a real server on a tiny base."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from quickchange_client import Quickchange

from tests.clients.real_server import real_server
from tests.conftest import MakeAdapter
from tests.examples.example_modules import EXAMPLES, load_example

LANGCHAIN_PYTHON = "LANGCHAIN_PYTHON"
"""A Python with langchain-openai: it brings fifteen packages, so it lives by itself."""


@pytest.fixture(scope="module")
def url(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with real_server(tiny_base, tmp_path_factory.mktemp("examples") / "store", "tiny") as address:
        yield address


@pytest.fixture
def task(url: str, make_adapter: MakeAdapter) -> Iterator[str]:
    """Name of an adapter that is there."""
    with Quickchange(url) as client:
        client.adapters.upload(make_adapter(seed=6), name="verdict")
        yield "verdict"
        client.adapters.delete("verdict")


def run(script: str, *words: str, url: str, python: str = sys.executable) -> list[str]:
    done = subprocess.run(
        [python, str(EXAMPLES / script), *words],
        env=os.environ | {"QUICKCHANGE_URL": url, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout.splitlines()


def test_from_training_to_rolling_back(url: str, tiny_base: Path) -> None:
    harder = ("--steps", "40", "--learning-rate", "1e-2")
    lines = run("train_and_roll_out.py", str(tiny_base), *harder, url=url)
    assert [line for line in lines if "NOT SO" in line] == []
    assert sum(line.startswith("   ok: ") for line in lines) == 6
    assert "   ok: the first version is live again" in lines
    with Quickchange(url) as client:
        assert "film-reviews" not in {each.name for each in client.adapters.iterate()}


def test_a_step_that_does_not_hold_ends_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    script = load_example("train_and_roll_out")
    with pytest.raises(SystemExit, match="1"):
        script.check(False, "the second is better")
    assert "NOT SO: the second is better" in capsys.readouterr().out


def test_openai_s_client(url: str, task: str) -> None:
    lines = run("openai_client.py", task, url=url)
    said = dict(line.split(": ", 1) for line in lines)
    assert len(said["digest"]) >= 64
    assert int(said["streamed tokens"]) >= 1
    assert said["error"] == "model_not_found"


def langchain_python() -> str | None:
    named = os.environ.get(LANGCHAIN_PYTHON)
    return named or (sys.executable if find_spec("langchain_openai") else None)


@pytest.mark.skipif(
    langchain_python() is None,
    reason=f"langchain-openai is not installed; {LANGCHAIN_PYTHON} may name a Python that has it",
)
def test_langchain_s_client(url: str, task: str) -> None:
    python = langchain_python()
    assert python is not None
    lines = run("langchain_chat.py", task, url=url, python=shutil.which(python) or python)
    said = dict(line.split(": ", 1) for line in lines)
    assert said["streamed"] == said["whole"].rpartition(" ")[0]
    assert int(said["streamed tokens"]) >= 1
    assert "->" in said["chain"]
