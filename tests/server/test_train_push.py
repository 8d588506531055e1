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
    short = RECIPE.replace("epochs = 12", "max_steps = 1")
    (tmp_path / "recipe.toml").write_text(short.format(base=tiny_base))
    done = CliRunner().invoke(app, [*words, "--push", url])
    assert done.exit_code != 0
    assert f"warning: {url} does not answer now" in done.stderr
    assert f"to try again: quickchange push {tmp_path / 'adapter'} --name animals" in done.stderr


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--name", "animals"], "--name goes with --push URL"),
        (["--alias", "canary"], "--alias goes with --push URL"),
        (["--push", "ftp://x", "--name", "a"], "must begin with http:// or https://"),
        (["--push", "http://127.0.0.1:9", "--name", "My Task"], "'My Task' is not allowed"),
        (["--push", "http://127.0.0.1:9"], "'No Name' is not allowed"),
        (["--push", "http://127.0.0.1:9", "--name", "a", "--alias", "3"], "alias '3'"),
    ],
)
def test_what_could_not_be_uploaded_is_said_before_anything_is_trained(
    words: list[str], sentence: str, tmp_path: Path, tiny_base: Path
) -> None:
    folder = tmp_path / "No Name"
    folder.mkdir()
    write_rows(folder / "train.jsonl", ROWS)
    (folder / "recipe.toml").write_text(RECIPE.format(base=tiny_base))
    done = CliRunner().invoke(app, ["train", str(folder / "recipe.toml"), *words])
    assert done.exit_code == 2
    assert sentence in done.stderr
    assert not (folder / "adapter").exists()
