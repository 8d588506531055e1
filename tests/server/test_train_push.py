"""`quickchange train --push`: from rows to an answer of a real server, in one command."""

from pathlib import Path

import pytest
from quickchange_client import Quickchange
from quickchange_server.cli import app
from typer.testing import CliRunner

from tests.adapters.training.training_world import ROWS, write_rows
from tests.clients.real_server import real_server

RECIPE = """\
base = "{base}"
[data]
train = "train.jsonl"
[task]
prompt = "<{{input}}>"
max_tokens = 8
temperature = 0
[training]
batch_rows = 4
epochs = 12
learning_rate = 1e-2
patience = 99
"""


def test_what_was_trained_is_served(
    tmp_path: Path, tiny_base: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write_rows(tmp_path / "train.jsonl", ROWS)
    (tmp_path / "recipe.toml").write_text(RECIPE.format(base=tiny_base))
    words = ["train", str(tmp_path / "recipe.toml"), "--name", "animals", "--alias", "canary"]
    with real_server(tiny_base, tmp_path / "store", "tiny") as url, Quickchange(url) as client:
        done = CliRunner().invoke(app, [*words, "--push", url])
        assert done.exit_code == 0, done.stderr
        shown = capfd.readouterr().out
        assert "uploaded animals:1; aliases: canary, default" in shown
        assert "UPDATE NORM" in shown
        for row in ROWS[::6]:
            answer = client.chat("animals", row["input"])
            assert answer.text == row["answer"]
    done = CliRunner().invoke(app, [*words, "--evaluate-only", "--push", url])
    assert done.exit_code != 0
