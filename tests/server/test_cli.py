"""The command line: help from the settings, refusals as one sentence, `base path`."""

import subprocess
import sys
from pathlib import Path

import pytest
from quickchange_server.cli import app
from quickchange_server.config import OPTIONS
from typer.testing import CliRunner

runner = CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"})


def test_help_of_serve_shows_every_option_and_examples() -> None:
    result = runner.invoke(app, ["serve", "--help"])
    assert result.exit_code == 0
    assert [option.flag for option in OPTIONS.values() if option.flag not in result.output] == []
    assert "--config" in result.output
    assert "quickchange serve --model" in result.output


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--port", "http"], "--port is 'http'"),
        (["--host", "0.0.0.0", "--store", "/no/such/folder"], "--insecure"),
        (["--admin-key-file", "/no/such/file"], "--admin-key-file /no/such/file: cannot be read"),
        (["stray"], "unexpected argument 'stray'"),
        (["--lora-modules", "a=/x", "b"], "has 'b', but must be NAME=FOLDER"),
        (["--lora-modules", "a=/x", "a=/y"], "names 'a' twice"),
        (["--config", "/no/such/file.toml"], "cannot be read"),
    ],
)
def test_wrong_setting_is_one_sentence_and_exit_code_2(arguments: list[str], sentence: str) -> None:
    result = runner.invoke(app, ["serve", *arguments])
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")
    assert sentence in result.stderr
    assert result.stdout == ""


def test_missing_base_is_one_sentence_and_exit_code_1(tmp_path: Path) -> None:
    result = runner.invoke(app, ["serve", "--model", str(tmp_path / "nothing")])
    assert result.exit_code == 1
    assert "there is no such folder" in result.stderr


def test_unknown_variable_is_warned_about(tmp_path: Path) -> None:
    arguments = ["serve", "--model", str(tmp_path / "nothing")]
    result = runner.invoke(app, arguments, env={"QUICKCHANGE_MAX_QEUE": "3"})
    assert "warning: the variable QUICKCHANGE_MAX_QEUE is not known" in result.stderr


def test_base_path_prints_the_folder_and_nothing_else(tmp_path: Path) -> None:
    result = runner.invoke(app, ["base", "path", "--model", str(tmp_path)])
    assert result.exit_code == 0
    assert result.stdout == f"{tmp_path.resolve()}\n"


def test_base_path_reads_variables_and_names_what_is_built_in() -> None:
    result = runner.invoke(app, ["base", "path"], env={"QUICKCHANGE_MODEL": "builtin:none"})
    assert result.exit_code == 1
    assert "builtin:smollm2-135m" in result.stderr


def test_command_line_loads_no_torch() -> None:
    program = "import sys, quickchange_server.cli; print(*sorted(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    loaded = set(done.stdout.split())
    assert "quickchange_server.config" in loaded
    assert loaded.isdisjoint({"torch", "transformers", "fastapi"})


def test_threads_keep_all_cores_when_openmp_binds_the_first(tmp_path: Path) -> None:
    program = (
        "import os; before = os.sched_getaffinity(0)\n"
        "from quickchange_server.thread_affinity import prepare_threads, restore_affinity\n"
        "prepare_threads(); import torch; bound = os.sched_getaffinity(0)\n"
        "restore_affinity(); print(len(before), len(bound), os.sched_getaffinity(0) == before)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        env={"OMP_PROC_BIND": "true", "PATH": "/usr/bin:/bin"},
    )
    num_before, num_bound, is_restored = done.stdout.split()
    assert num_bound == "1" or num_before == num_bound
    assert is_restored == "True"
