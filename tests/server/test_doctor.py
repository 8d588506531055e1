"""`doctor` tells what a server would see, hides no fault behind another, and changes nothing."""

import json
import socket
from pathlib import Path

import pytest
from quickchange_server.config import load_config
from quickchange_server.doctor_command import Finding, examine, render

from tests.server.server_process import run_command


def look(folder: Path, base: Path, **flags: object) -> dict[str, Finding]:
    named = {"model": str(base), "store": str(folder / "store"), "cache": str(folder / "cache")}
    return {each.what: each for each in examine(load_config({**named, **flags}))}


def test_it_sees_what_a_server_would_see_and_makes_nothing(tmp_path: Path, tiny_base: Path) -> None:
    found = look(tmp_path, tiny_base, port="0")
    assert {name: each.state for name, each in found.items() if each.state == "problem"} == {}
    assert "torch" in found["packages"].text
    assert str(tiny_base) in found["base"].text
    assert "made at the start" in found["store"].text
    assert found["budget"].state == "ok"
    assert list(tmp_path.iterdir()) == []


def test_faults_stand_side_by_side(tmp_path: Path, tiny_base: Path) -> None:
    broken = tmp_path / "base"
    broken.mkdir()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        found = look(
            tmp_path,
            broken,
            port=port,
            catalog="postgresql://ada:secret@127.0.0.1:1/none",
        )
    problems = {name for name, each in found.items() if each.state == "problem"}
    assert {"base", "catalog", "port"} <= problems
    text = render(list(found.values()))
    assert "secret" not in text
    assert text.endswith("problem(s)")
    assert "a server may run already" in found["port"].text


def test_a_base_that_is_not_here_yet_is_a_note(tmp_path: Path) -> None:
    found = look(tmp_path, Path("builtin:smollm2-135m"), port="0")
    assert found["base"].state == "note"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("is_sound", [True, False])
def test_the_command(tmp_path: Path, tiny_base: Path, is_sound: bool) -> None:
    model = tiny_base if is_sound else tmp_path / "nothing" / "here"
    places = ["--store", str(tmp_path / "store"), "--port", "0", "--model", str(model)]
    done = run_command("doctor", "--json", *places)
    states = {each["what"]: each["state"] for each in json.loads(done.stdout)["findings"]}
    assert states["quickchange"] == "ok"
    assert done.returncode == (0 if is_sound else 1), done.stdout + done.stderr


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://ada:se/cret@127.0.0.1:1/none",
        "postgresql://ada:a@secret@127.0.0.1:1/none",
        "postgresql://127.0.0.1:1/none?user=ada&password=secret&connect_timeout=1",
    ],
)
def test_no_form_of_a_password_is_shown(tmp_path: Path, tiny_base: Path, url: str) -> None:
    flags = {"model": str(tiny_base), "store": str(tmp_path), "port": "0", "catalog": url}
    text = render(examine(load_config(flags)))
    assert "cret" not in text
    assert "--catalog postgresql://" in text
    assert "***" in text
