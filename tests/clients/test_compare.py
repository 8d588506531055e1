"""`quickchange compare`: configs, norms and answers of two versions, side by side."""

import json
import math
from pathlib import Path

import pytest
from quickchange_client import ArgumentInvalid, ConnectionFailed, Quickchange
from quickchange_client.cli.prompt_file import read_prompts
from quickchange_client.comparison import AskOptions, Side, compare_outputs

from tests.clients.conftest import RunCommand, write_adapter
from tests.clients.fake_server import BASE, WORDS, FakeServer
from tests.conftest import MakeAdapter

SAID = "".join(WORDS)


@pytest.fixture
def two_versions(run_command: RunCommand, adapter_folder: Path, tmp_path: Path) -> None:
    """Push `s:1` and `s:2`, of which the second has another alpha and a task."""
    run_command("push", str(adapter_folder), "--name", "s")
    second = write_adapter(tmp_path / "second", b"other")
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 32, "target_modules": ["v", "q"]}
    (second / "adapter_config.json").write_text(json.dumps(config))
    (second / "task.json").write_text('{"max_tokens": 3}')
    run_command("push", str(second), "--name", "s")


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    """Return a file with two prompts and an empty line."""
    file = tmp_path / "prompts.txt"
    file.write_text("How was it?\n\nAnd the end?\r\n", encoding="utf-8")
    return file


def test_configs_norms_and_answers(
    run_command: RunCommand, fake_server: FakeServer, two_versions: None, prompts: Path
) -> None:
    fake_server.requests.clear()
    result = run_command("compare", "s:1", "s:2", "--prompts", str(prompts))
    assert result.exit_code == 0, result.output
    lines = [line.split() for line in result.stdout.splitlines()]
    assert ["lora_alpha", "-", "32", "≠"] in lines
    assert ["r", "8", "8"] in lines
    assert ["task", "max_tokens", "-", "3", "≠"] in lines
    assert ["q_proj", "1", "0.5", "0.5"] in lines
    assert result.stdout.endswith("0 of 2 answers are equal\n")
    assert f"And the end?  {SAID.split(chr(0x2028))[0]}" in result.stdout
    asked = sorted((body["model"], body["max_tokens"]) for _, _, body in fake_server.requests)
    assert asked == [("s:1", 64), ("s:1", 64), ("s:2", 3), ("s:2", 3)]
    assert all(body["temperature"] == 0 for _, _, body in fake_server.requests)


def test_as_json(run_command: RunCommand, two_versions: None, prompts: Path) -> None:
    words = ("compare", "s:1", "s:2", "--prompts", str(prompts), "--max-tokens", "2", "--json")
    result = run_command(*words)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert (found["a"]["version"], found["b"]["config"]["lora_alpha"]) == (1, 32)
    assert {each["name"] for each in found["differences"]} == {
        *("lora_alpha", "target_modules", "task max_tokens")
    }
    assert found["norms"][-1] == {"target": "all", "num_modules": 1, "a": 0.5, "b": 0.5}
    answers = [
        (each["prompt"], each["a"]["num_tokens"], each["equal"]) for each in found["outputs"]
    ]
    assert answers == [("How was it?", 2, True), ("And the end?", 2, True)]
    assert found["num_equal"] == 2


def test_with_the_base_and_without_prompts(
    run_command: RunCommand, fake_server: FakeServer, two_versions: None
) -> None:
    fake_server.requests.clear()
    result = run_command("compare", "s", BASE)
    assert result.exit_code == 0, result.output
    assert ["version", "s:1", "base"] in [line.split() for line in result.stdout.splitlines()]
    assert fake_server.requests == []
    both = json.loads(run_command("compare", BASE, BASE, "--json").stdout)
    assert (both["a"]["config"], both["norms"], both["differences"]) == (None, [], [])


def test_a_prompt_that_is_refused_stands_in_its_place(
    run_command: RunCommand, two_versions: None, tmp_path: Path
) -> None:
    file = tmp_path / "p.txt"
    file.write_text("too long\nfine\n")
    result = run_command("compare", "s:1", BASE, "--prompts", str(file))
    assert result.exit_code == 1
    assert "error: the prompt has 900 tokens" in result.stdout
    assert "1 of 2 answers are equal" in result.stdout


def test_what_is_not_there_ends_it(run_command: RunCommand, two_versions: None) -> None:
    assert run_command("compare", "s", "nobody").exit_code == 1
    assert run_command("compare", "s").exit_code == 2
    assert run_command("compare", "s", BASE, "--prompts", "no-such-file").exit_code == 2


def test_a_server_that_goes_away_ends_it() -> None:
    side = Side("x")
    with Quickchange("http://127.0.0.1:9") as client, pytest.raises(ConnectionFailed):
        compare_outputs(client, (side, side), ["a"] * 50, AskOptions())


def test_prompts(tmp_path: Path) -> None:
    lines = tmp_path / "a.txt"
    lines.write_text('one\n\n  \n"two"\u2028 still two\n', encoding="utf-8")
    assert read_prompts(str(lines), "prompt") == ["one", '"two"\u2028 still two']
    assert read_prompts(str(lines), "prompt", limit=1) == ["one"]
    rows = tmp_path / "a.jsonl"
    rows.write_text('"one\\ntwo"\n{"text": "three", "label": 1}\n')
    assert read_prompts(str(rows), "text") == ["one\ntwo", "three"]
    with pytest.raises(ArgumentInvalid, match=r"a.jsonl:2 has no text under 'prompt'"):
        read_prompts(str(rows), "prompt")
    rows.write_text("{\n")
    with pytest.raises(ArgumentInvalid, match=r"a.jsonl:1 is no JSON"):
        read_prompts(str(rows), "prompt")
    lines.write_text("\n")
    with pytest.raises(ArgumentInvalid, match="holds no prompt"):
        read_prompts(str(lines), "prompt")
    lines.write_bytes(b"\xff")
    with pytest.raises(ArgumentInvalid, match="cannot read"):
        read_prompts(str(lines), "prompt")


def test_on_a_real_server(
    real_server_url: str, run_command: RunCommand, make_adapter: MakeAdapter, prompts: Path
) -> None:
    with Quickchange(real_server_url) as client:
        client.adapters.upload(make_adapter(seed=1), name="c")
        client.adapters.upload(make_adapter(seed=2), name="c")
        words = ("compare", "c:1", "c:2", "--prompts", str(prompts), "--max-tokens", "6")
        done = run_command(*words, "--json", "--url", real_server_url)
        assert done.exit_code == 0, done.output
        found = json.loads(done.stdout)
        assert [each["target"] for each in found["norms"]] == [
            *("down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj", "all")
        ]
        total = math.hypot(*(each["a"] for each in found["norms"][:-1]))
        assert found["norms"][-1]["a"] == pytest.approx(total)
        assert [each["a"]["num_tokens"] for each in found["outputs"]] == [6, 6]
        same = run_command(*words[:1], "c:1", "c@default", *words[3:], "--url", real_server_url)
        assert "2 of 2 answers are equal" in same.stdout
        assert client.adapters.get("c").versions[0].requests == 6
        client.adapters.delete("c")
