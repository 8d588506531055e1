"""vLLM's flags on `serve`: mapped, accepted with a note, or refused with what to do."""

import re
from pathlib import Path

import pytest
from quickchange_server.cli import app
from quickchange_server.config import OPTIONS
from quickchange_server.errors import ConfigInvalid
from quickchange_server.vllm_flags import VLLM_FLAGS, VllmFlag, translate, unread_variables
from typer.testing import CliRunner

runner = CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"})
MAPPED = [each for each in VLLM_FLAGS if each.ours is not None]
OTHERS = [each for each in VLLM_FLAGS if each.ours is None]


def test_names_are_not_ours_and_what_they_mean_is() -> None:
    assert {each.name for each in VLLM_FLAGS}.isdisjoint(OPTIONS)
    assert {each.ours for each in MAPPED} <= set(OPTIONS)
    assert len({each.name for each in VLLM_FLAGS}) == len(VLLM_FLAGS)


def test_equivalents_set_our_own() -> None:
    meant, notes = translate({"max_num_seqs": "7", "max_num_batched_tokens": "64", "port": "1"})
    assert meant == {"max_batch_rows": "7", "max_step_tokens": "64", "port": "1", "dtype": None}
    assert notes == []
    assert translate({"dtype": "half"})[0]["dtype"] == "float16"


@pytest.mark.parametrize("each", MAPPED, ids=lambda each: each.name)
def test_both_spellings_at_once_are_refused(each: VllmFlag) -> None:
    assert each.ours is not None
    with pytest.raises(ConfigInvalid, match="give one of them"):
        translate({each.name: "1", each.ours: "2"})


@pytest.mark.parametrize("each", OTHERS, ids=lambda each: each.name)
def test_every_other_flag_says_what_becomes_of_it(each: VllmFlag) -> None:
    values = [True, False] if each.is_switch else ["auto", "0", "1", "16", "vllm", "0.95", "what"]
    for value in values:
        if each.accepts.holds(value):
            meant, notes = translate({each.name: value})
            assert each.name not in meant
            assert notes[0].endswith(f"has no effect here: {each.note}")
            assert each.note
        else:
            with pytest.raises(
                ConfigInvalid, match=f"is not available: {re.escape(each.instead)}$"
            ):
                translate({each.name: value})
            assert each.instead


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--api-key", "hunter2"], "--admin-key-file"),
        (["--gpu-memory-utilization", "0.5"], "--kv-cache-bytes"),
        (["--quantization", "awq"], "--quantize int8"),
        (["--tensor-parallel-size", "2"], "one device"),
        (["--enable-auto-tool-choice"], "tool calls are not served"),
        (["--allowed-origins", '["*"]'], "--cors-origin"),
        (["--no-enable-prefix-caching"], "cache_salt"),
    ],
)
def test_what_is_not_done_is_refused_and_says_what_does_it(
    arguments: list[str], sentence: str
) -> None:
    result = runner.invoke(app, ["serve", *arguments])
    assert result.exit_code == 2
    assert result.stderr.startswith(f"error: {arguments[0]}")
    assert sentence in result.stderr
    assert "hunter2" not in result.stderr


def test_a_whole_command_line_of_vllm_is_understood(tmp_path: Path) -> None:
    line = f"--model {tmp_path / 'nothing'} --served-model-name m --port 8000 --host 127.0.0.1 "
    line += "--max-model-len 512 --max-num-seqs 4 --enable-lora --max-loras 4 --max-lora-rank 16 "
    line += "--max-cpu-loras 8 --gpu-memory-utilization 0.9 --enable-prefix-caching --dtype half "
    line += "--trust-remote-code --disable-log-requests --tensor-parallel-size 1"
    result = runner.invoke(app, ["serve", *line.split()], env={"VLLM_API_KEY": "hunter2"})
    assert result.exit_code == 1
    assert "there is no such folder" in result.stderr
    assert "warning: --gpu-memory-utilization 0.9 has no effect here" in result.stderr
    assert "VLLM_API_KEY is not read" in result.stderr
    assert "hunter2" not in result.stderr


def test_variables_that_callers_rely_on_are_named() -> None:
    found = unread_variables({"VLLM_API_KEY": "x", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"})
    assert ["--admin-key-file" in found[0], "--lora-root" in found[1]] == [True, True]
    assert unread_variables({"PATH": "/bin"}) == []
