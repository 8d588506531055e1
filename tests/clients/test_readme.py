"""The README's examples run as they stand, against the real server with a tiny base."""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.clients.real_server import COMMAND, real_server
from tests.conftest import MakeAdapter

README = Path(__file__).parents[2] / "clients" / "python" / "README.md"
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
BLOCKS = BLOCK.findall(README.read_text(encoding="utf-8"))


def blocks(language: str) -> list[str]:
    return [text for kind, text in BLOCKS if kind == language]


@pytest.fixture
def folder(tmp_path: Path, make_adapter: MakeAdapter, tiny_base: Path) -> Path:
    """Return a folder that holds what the README calls ./my-adapter and ./my-base."""
    (tmp_path / "my-adapter").symlink_to(make_adapter())
    (tmp_path / "my-base").symlink_to(tiny_base)
    return tmp_path


def run(words: list[str], folder: Path, url: str) -> str:
    env = {**os.environ, "QUICKCHANGE_URL": url}
    done = subprocess.run(words, cwd=folder, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, (words, done.stdout, done.stderr)
    return done.stdout


@pytest.fixture(scope="module")
def fresh_url(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Return the address of a server that has not seen an adapter: versions count from 1."""
    store = tmp_path_factory.mktemp("readme") / "store"
    with real_server(tiny_base, store, "smollm2-135m") as url:
        yield url


def test_shell_examples(folder: Path, fresh_url: str) -> None:
    (example,) = blocks("console")
    lines = [line.removeprefix("$ ") for line in example.splitlines()]
    assert len(lines) >= 10
    for line in lines:
        program, *words = shlex.split(line)
        assert program == "quickchange"
        assert run([COMMAND, *words], folder, fresh_url)


def test_python_examples(folder: Path, fresh_url: str) -> None:
    examples = blocks("python")
    assert len(examples) >= 5
    for example in examples:
        assert run([sys.executable, "-c", example], folder, fresh_url)
