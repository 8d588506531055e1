"""The command `quickchange` against a server on a socket: output, JSON, errors, exit codes."""

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from quickchange_client.cli import app
from quickchange_client.cli.adapter_reference import AdapterReference
from quickchange_client.cli.output import format_bytes, without_controls
from quickchange_client.errors import ArgumentInvalid

from tests.clients.conftest import RunCommand
from tests.clients.fake_server import BASE, WORDS, FakeServer, refusal

ROOT = Path(__file__).parents[2]
SAID = "".join(WORDS)
COMMANDS = sorted(str(command.name) for command in app.registered_commands)
HEADINGS = ["NAME", "ALIASES", "VERSIONS", "TIER", "RANK", "BYTES", "LAST USED", "REQUESTS"]
OWN = sorted(
    ("alias", "bench", "compare", "disable", "enable", "generate", "list", "load", "memory")
    + ("merge", "pin", "prune", "pull", "push", "rm", "rollback", "show", "unload", "unmerge")
    + ("unpin", "validate")
)


@pytest.fixture
def pushed(run_command: RunCommand, adapter_folder: Path) -> str:
    """Return the name of an adapter that is there."""
    assert run_command("push", str(adapter_folder), "--name", "sentiment").exit_code == 0
    return "sentiment"


def test_only_what_works_is_offered() -> None:
    assert set(OWN) <= set(COMMANDS)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(COMMANDS) - set(OWN) <= set(project["entry-points"]["quickchange.commands"])


@pytest.mark.parametrize("command", OWN)
def test_every_command_has_help_with_examples(run_command: RunCommand, command: str) -> None:
    result = run_command(command, "--help")
    assert result.exit_code == 0
    assert "Examples:" in result.stdout
    assert f"quickchange {command}" in result.stdout.partition("Examples:")[2]
    assert "--json" in result.stdout
    assert "QUICKCHANGE_URL" in result.stdout


def test_help_lists_the_commands(run_command: RunCommand) -> None:
    result = run_command("--help")
    assert result.exit_code == 0
    for command in OWN:
        assert f" {command} " in result.stdout


def test_version(run_command: RunCommand) -> None:
    result = run_command("--version")
    assert result.exit_code == 0
    assert result.stdout.strip().count(".") == 2


@pytest.mark.parametrize(
    "words",
    [
        ("frobnicate",),
        ("generate",),
        ("push", "no-such-folder", "--name", "x"),
        ("list", "--url", "nonsense"),
        ("alias", "sentiment", "prod"),
        ("alias", "sentiment", "prod", "1", "--delete"),
        ("rm", "sentiment:x"),
        ("generate", BASE, "x", "--raw", "--system", "s"),
        ("generate", "x", "--adapters", "a=much"),
        ("generate", "x", "--adapters", "a=nan"),
        ("generate", "x", "--adapters", "a=1,,b=2"),
        ("generate", "x", "--adapters", "a,b,c,d,e"),
    ],
    ids=" ".join,
)
def test_wrong_usage_is_2(run_command: RunCommand, words: tuple[str, ...]) -> None:
    result = run_command(*words)
    assert result.exit_code == 2
    assert result.stderr


def test_push_reports_and_says_what_is_live(
    run_command: RunCommand, adapter_folder: Path, other_folder: Path
) -> None:
    first = run_command("push", str(adapter_folder), "--name", "sentiment")
    assert first.exit_code == 0
    assert "uploaded sentiment:1; aliases: default" in first.stdout
    for shown in ("sha256:", "q_proj", "1 modules", "0.5", "trained on another path"):
        assert shown in first.stdout
    again = run_command("push", str(adapter_folder), "--name", "sentiment")
    assert "there already: sentiment:1" in again.stdout
    second = run_command("push", str(other_folder), "--name", "sentiment")
    assert "quickchange alias sentiment default 2" in second.stdout
    assert "another likeliest token at 7 of 35 places" in " ".join(second.stdout.split())
    third = run_command("push", str(other_folder), "--name", "sentiment", "--alias", "default")
    assert "aliases: default" in third.stdout


def test_push_as_json_is_the_version(run_command: RunCommand, adapter_folder: Path) -> None:
    result = run_command("push", str(adapter_folder), "--name", "x", "--json")
    assert result.exit_code == 0
    version = json.loads(result.stdout)
    assert (version["object"], version["name"], version["version"]) == ("adapter.version", "x", 1)
    assert "ok" in version["report"]


def test_push_of_what_is_refused_lists_the_problems(
    run_command: RunCommand, pickle_folder: Path
) -> None:
    result = run_command("push", str(pickle_folder), "--name", "x")
    assert result.exit_code == 1
    assert result.stdout == ""
    assert "weights_not_safetensors" in result.stderr
    assert "save it with save_pretrained()" in result.stderr
    as_json = run_command("push", str(pickle_folder), "--name", "x", "--json")
    answer = json.loads(as_json.stderr)
    assert answer["error"]["code"] == "weights_not_safetensors"
    assert answer["problems"][0]["where"] == "adapter_model.safetensors"


def test_push_of_a_folder_without_an_adapter(run_command: RunCommand, tmp_path: Path) -> None:
    result = run_command("push", str(tmp_path), "--name", "x")
    assert result.exit_code == 1
    assert "adapter_config.json" in result.stderr


def test_dry_run_keeps_nothing(
    run_command: RunCommand, fake_server: FakeServer, adapter_folder: Path, pickle_folder: Path
) -> None:
    good = run_command("push", str(adapter_folder), "--name", "x", "--dry-run")
    assert (good.exit_code, "it can be served" in good.stdout) == (0, True)
    bad = run_command("push", str(pickle_folder), "--name", "x", "--dry-run")
    assert (bad.exit_code, "weights_not_safetensors" in bad.stdout) == (1, True)
    bad_json = run_command("push", str(pickle_folder), "--name", "x", "--dry-run", "--json")
    assert (bad_json.exit_code, json.loads(bad_json.stdout)["ok"]) == (1, False)
    assert fake_server.adapters == {}


def test_list(run_command: RunCommand, adapter_folder: Path) -> None:
    empty = run_command("list")
    assert (empty.exit_code, empty.stdout, "no adapters yet" in empty.stderr) == (0, "", True)
    assert json.loads(run_command("list", "--json").stdout) == []
    for name in ("a", "b", "c"):
        run_command("push", str(adapter_folder), "--name", name, "--alias", "prod")
    lines = run_command("list").stdout.splitlines()
    assert re.split(r"\s{2,}", lines[0].strip()) == HEADINGS
    assert [line.split()[0] for line in lines[1:]] == ["a", "b", "c"]
    assert "default=1, prod=1" in lines[1]
    adapters = json.loads(run_command("list", "--json").stdout)
    assert [adapter["name"] for adapter in adapters] == ["a", "b", "c"]


def test_show(run_command: RunCommand, fake_server: FakeServer, pushed: str) -> None:
    whole = run_command("show", pushed)
    assert whole.exit_code == 0
    assert "VERSION" in whole.stdout
    digest = fake_server.adapters[pushed].versions[1]["digest"]
    for reference in (f"{pushed}:1", f"{pushed}@default", f"{pushed}@{digest[:19]}"):
        one = run_command("show", reference)
        assert one.exit_code == 0
        assert digest in one.stdout
        assert json.loads(run_command("show", reference, "--json").stdout)["version"] == 1
    missing = run_command("show", f"{pushed}:7")
    assert (missing.exit_code, "error:" in missing.stderr) == (1, True)


def test_show_tells_the_task_as_it_was_written(
    run_command: RunCommand, fake_server: FakeServer, pushed: str
) -> None:
    task = {"prompt": "Review: {input}\nVerdict:", "stop": ["\n", "\x9b"], "max_tokens": 4}
    fake_server.adapters[pushed].versions[1]["task"] = task
    lines = run_command("show", f"{pushed}:1").stdout.splitlines()
    shown = [re.split(r"\s{2,}", line.strip()) for line in lines if line.startswith("task ")]
    assert shown == [
        ["task prompt", '"Review: {input}\\nVerdict:"'],
        ["task stop", '["\\n", "\ufffd"]'],
        ["task max_tokens", "4"],
    ]
    assert json.loads(run_command("show", f"{pushed}:1", "--json").stdout)["task"] == task


def test_alias(run_command: RunCommand, fake_server: FakeServer, pushed: str) -> None:
    assert run_command("alias", pushed, "canary", "1").exit_code == 0
    assert fake_server.adapters[pushed].aliases == {"default": 1, "canary": 1}
    result = run_command("alias", pushed, "canary", "--delete", "--json")
    assert json.loads(result.stdout)["aliases"] == {"default": 1}
    assert run_command("alias", pushed, "canary", "--delete").exit_code == 1


def test_pin_and_disable(run_command: RunCommand, fake_server: FakeServer, pushed: str) -> None:
    pinned = run_command("pin", f"{pushed}:1", "--here")
    assert (pinned.exit_code, "pinned" in pinned.stdout) == (0, True)
    assert fake_server.requests[-1] == ("POST", f"/v1/adapters/{pushed}/pin", {"version": 1})
    assert not json.loads(run_command("unpin", pushed, "--json").stdout)["pinned"]
    assert "disabled" in run_command("disable", pushed).stdout
    assert run_command("enable", pushed).exit_code == 0
    assert fake_server.scopes == ["replica", "catalog", "catalog", "catalog"]


def test_merge_and_unmerge(run_command: RunCommand, fake_server: FakeServer, pushed: str) -> None:
    merged = run_command("merge", f"{pushed}@default")
    assert (merged.exit_code, "2.9 KiB" in merged.stdout) == (0, True)
    assert fake_server.requests[-1] == ("POST", f"/v1/adapters/{pushed}/merge", {"version": 1})
    unmerged = run_command("unmerge", pushed, "--json")
    assert json.loads(unmerged.stdout)["merged"] is False


def test_load_and_unload(run_command: RunCommand, fake_server: FakeServer, pushed: str) -> None:
    assert "host" in run_command("load", pushed).stdout
    assert fake_server.requests[-1][2] == {}
    assert run_command("load", f"{pushed}:1", "--tier", "device").exit_code == 0
    assert fake_server.requests[-1][2] == {"version": 1, "tier": "device"}
    assert run_command("load", pushed, "--tier", "disk").exit_code == 2
    assert json.loads(run_command("unload", f"{pushed}:1", "--json").stdout)["tier"] == "disk"


def test_rm(run_command: RunCommand, pushed: str, other_folder: Path) -> None:
    run_command("push", str(other_folder), "--name", pushed)
    in_use = run_command("rm", f"{pushed}:1")
    assert (in_use.exit_code, "alias points at it" in in_use.stderr) == (1, True)
    assert "deleted sentiment:2" in run_command("rm", f"{pushed}:2").stdout
    still_running = run_command("rm", pushed, "--timeout", "0")
    assert (still_running.exit_code, "finished" in still_running.stdout) == (0, True)
    gone = run_command("rm", pushed, "--json")
    assert gone.exit_code == 1
    assert json.loads(gone.stderr)["error"]["code"] == "adapter_not_found"


def test_rm_says_what_it_freed(run_command: RunCommand, pushed: str) -> None:
    stdout = run_command("rm", pushed).stdout
    assert stdout == "deleted sentiment; freed 4.0 KiB device, 2.0 KiB host, 1.0 KiB disk\n"


def test_generate_streams_a_chat(run_command: RunCommand, fake_server: FakeServer) -> None:
    result = run_command("generate", BASE, "How was it?", "--system", "s", "--temperature", "0")
    assert (result.exit_code, result.stdout, result.stderr) == (0, SAID + "\n", "")
    method, path, body = fake_server.requests[0]
    assert (method, path, body["stream"]) == ("POST", "/v1/chat/completions", True)
    assert [turn["role"] for turn in body["messages"]] == ["system", "user"]
    assert body["temperature"] == 0
    assert "seed" not in body


def test_generate_continues_raw_text_from_a_pipe(
    run_command: RunCommand, fake_server: FakeServer
) -> None:
    words = ("generate", BASE, "--raw", "--max-tokens", "2", "--stop", "a", "--stop", "b")
    result = run_command(*words, input="Once upon")
    assert result.stdout == "".join(WORDS[:2]) + "\n"
    assert "--max-tokens" in result.stderr
    _, path, body = fake_server.requests[0]
    assert (path, body["prompt"], body["stop"]) == ("/v1/completions", "Once upon", ["a", "b"])


@pytest.mark.parametrize("more", [[], ["--raw"]])
def test_generate_as_json_is_the_whole_answer(run_command: RunCommand, more: list[str]) -> None:
    answer = json.loads(run_command("generate", BASE, "x", "--json", *more).stdout)
    choice = answer["choices"][0]
    assert (choice.get("text") or choice["message"]["content"]) == SAID
    assert answer["usage"]["completion_tokens"] == len(WORDS)


@pytest.mark.parametrize("more", [[], ["--raw"]])
def test_generate_may_leave_the_task_aside(
    run_command: RunCommand, fake_server: FakeServer, more: list[str]
) -> None:
    run_command("generate", BASE, "x", *more)
    run_command("generate", BASE, "x", "--raw-prompt", *more)
    bodies = [body for _, _, body in fake_server.requests]
    assert [body.get("raw_prompt") for body in bodies] == [None, True]


@pytest.mark.parametrize("more", [[], ["--raw"], ["--json"]])
@pytest.mark.parametrize("words", [["x"], [BASE, "x"], ["-"], []])
def test_generate_mixes_adapters_on_the_base(
    run_command: RunCommand, fake_server: FakeServer, words: list[str], more: list[str]
) -> None:
    mix = ("--adapters", "a=0.7, b@canary=-0.3,c")
    assert run_command("generate", *mix, *words, *more, input="x").exit_code == 0
    _, _, body = fake_server.requests[-1]
    assert body["model"] == BASE
    assert (body.get("prompt") or body["messages"][0]["content"]) == "x"
    assert body["adapters"] == [
        {"model": "a", "weight": 0.7},
        {"model": "b@canary", "weight": -0.3},
        {"model": "c", "weight": 1.0},
    ]


@pytest.mark.parametrize("prompt", ["fail", "break off"])
def test_generate_that_fails_midway_is_1(run_command: RunCommand, prompt: str) -> None:
    result = run_command("generate", BASE, prompt)
    assert result.exit_code == 1
    assert result.stdout.startswith("".join(WORDS[:2]))
    assert "error:" in result.stderr


def test_memory(run_command: RunCommand) -> None:
    lines = [line.split() for line in run_command("memory").stdout.splitlines()]
    assert lines[1:3] == [["base", "1500000", "1.4", "MiB"], ["kv_used", "0", "0", "B"]]
    assert lines[-1] == ["sha256:abababababab", "2.0", "KiB", "4.0", "KiB", "0", "B", "1"]
    assert json.loads(run_command("memory", "--json").stdout)["bytes"]["base"] == 1_500_000


def test_a_missing_key_says_where_it_is_read(
    run_command: RunCommand, fake_server: FakeServer
) -> None:
    fake_server.api_key = "k"
    refused = run_command("list")
    assert (refused.exit_code, "QUICKCHANGE_API_KEY" in refused.stderr) == (1, True)
    assert run_command("list", QUICKCHANGE_API_KEY="k").exit_code == 0


def test_url_wins_over_the_variable(run_command: RunCommand, server_url: str) -> None:
    variables = {"QUICKCHANGE_URL": "http://127.0.0.1:9"}
    assert run_command("list", "--url", server_url, **variables).exit_code == 0


def test_what_the_server_sends_cannot_steer_the_terminal(
    run_command: RunCommand, fake_server: FakeServer
) -> None:
    fake_server.next_answers.append(refusal(404, "x", "gone \x1b[2J\x9b1m"))
    result = run_command("show", "x")
    assert "\x1b" not in result.stderr
    assert "\x9b" not in result.stderr
    assert without_controls("a\tb\nc\x1b\x7f\x85 é🙂") == "a\tb\nc\ufffd\ufffd\ufffd é🙂"


def test_as_a_process_of_its_own(command_env: dict[str, str]) -> None:
    command = [str(Path(sys.executable).with_name("quickchange"))]
    done = subprocess.run([*command, "generate", BASE, "x"], env=command_env, capture_output=True)
    assert (done.returncode, done.stdout.decode()) == (0, SAID + "\n")
    failed = subprocess.run([*command, "show", "nobody"], env=command_env, capture_output=True)
    assert failed.returncode == 1
    assert failed.stderr.startswith(b"error: there is no adapter 'nobody'")


def test_references() -> None:
    assert AdapterReference.parse("a.b-c") == AdapterReference("a.b-c")
    assert AdapterReference.parse("a:12") == AdapterReference("a", 12)
    for wrong in ("", ":1", "a:", "a:b", "a:1:2", "a:-1"):
        with pytest.raises(ArgumentInvalid):
            AdapterReference.parse(wrong)


def test_bytes_are_readable() -> None:
    shown = [format_bytes(n) for n in (0, 1023, 1024, 921_600, 5 << 29, 1 << 51)]
    assert shown == ["0 B", "1023 B", "1.0 KiB", "900.0 KiB", "2.5 GiB", "2048.0 TiB"]


def test_many_problems_are_cut_short(run_command: RunCommand, fake_server: FakeServer) -> None:
    problems = [
        {"code": "shape_mismatch", "where": f"layer.{n}", "message": "m", "hint": ""}
        for n in range(30)
    ]
    fake_server.next_answers.append(refusal(400, "shape_mismatch", "why", problems=problems))
    stderr = run_command("merge", "x").stderr
    assert "layer.9: m" in stderr
    assert "layer.10: m" not in stderr
    assert "and 20 more" in stderr
