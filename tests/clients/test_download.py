"""Getting a version back: byte for byte, as a whole, or not at all."""

import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from quickchange_client import (
    AnswerInvalid,
    ArgumentInvalid,
    AsyncQuickchange,
    FolderNotWritten,
    NotFound,
    Quickchange,
    StreamInterrupted,
)

from tests.clients.conftest import RunCommand
from tests.clients.fake_server import GAP, FakeServer

CONFIG, WEIGHTS, TASK = "adapter_config.json", "adapter_model.safetensors", "task.json"


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """Return an empty place to download into."""
    folder = tmp_path / "here"
    folder.mkdir()
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("task", [None, '{ "max_tokens": 3 }\n'])
def test_a_version_comes_back_byte_for_byte(
    client: Quickchange, adapter_folder: Path, here: Path, task: str | None
) -> None:
    if task is not None:
        (adapter_folder / TASK).write_text(task)
    client.adapters.upload(adapter_folder, name="a")
    seen: list[tuple[int, int]] = []
    version = client.adapters.download(
        "a", 1, here / "deep" / "folder", progress=lambda *each: seen.append(each)
    )
    assert contents(here / "deep" / "folder") == contents(adapter_folder)
    assert list((here / "deep").iterdir()) == [here / "deep" / "folder"]
    total = version.bytes.file
    assert seen == sorted(seen)
    assert (seen[-1], len(seen) > 10) == ((total, total), True)
    again = client.adapters.upload(here / "deep" / "folder", name="a")
    assert (again.version, again.meta.status) == (1, 200)


async def test_the_async_client_downloads_too(
    async_client: AsyncQuickchange, adapter_folder: Path, here: Path
) -> None:
    await async_client.adapters.upload(adapter_folder, name="a")
    await async_client.adapters.download("a", 1, here)
    assert contents(here) == contents(adapter_folder)


def test_a_folder_that_holds_something_is_left_alone(
    client: Quickchange, fake_server: FakeServer, adapter_folder: Path, here: Path
) -> None:
    client.adapters.upload(adapter_folder, name="a")
    (here / "mine").write_text("kept")
    for place in (here, here / "mine"):
        with pytest.raises(ArgumentInvalid, match="there already"):
            client.adapters.download("a", 1, place)
    assert contents(here) == {"mine": b"kept"}


def test_changed_bytes_are_not_kept(
    client: Quickchange, fake_server: FakeServer, adapter_folder: Path, here: Path
) -> None:
    client.adapters.upload(adapter_folder, name="a")
    files = fake_server.adapters["a"].files
    whole = files[1, WEIGHTS]
    files[1, WEIGHTS] = whole[:-1] + b"?"
    with pytest.raises(AnswerInvalid, match="digest"):
        client.adapters.download("a", 1, here / "x")
    files[1, WEIGHTS] = whole + b"more"
    with pytest.raises(AnswerInvalid, match="more than"):
        client.adapters.download("a", 1, here / "x")
    assert list(here.iterdir()) == []


def test_a_download_that_breaks_off_leaves_nothing(
    client: Quickchange, fake_server: FakeServer, adapter_folder: Path, here: Path
) -> None:
    client.adapters.upload(adapter_folder, name="a")
    files = fake_server.adapters["a"].files
    files[1, WEIGHTS] = bytes(70_000) + GAP + files[1, WEIGHTS][70_000 + len(GAP) :]
    with pytest.raises(StreamInterrupted, match=WEIGHTS):
        client.adapters.download("a", 1, here / "x")
    assert list(here.iterdir()) == []


def test_a_place_that_cannot_be_written_is_named(
    client: Quickchange, adapter_folder: Path, here: Path
) -> None:
    client.adapters.upload(adapter_folder, name="a")
    (here / "file").write_text("")
    with pytest.raises(FolderNotWritten, match="file"):
        client.adapters.download("a", 1, here / "file" / "below")
    with pytest.raises(NotFound):
        client.adapters.download("a", 2, here / "x")


def test_what_a_version_is_called_does_not_choose_the_place(here: Path) -> None:
    version = {"name": "../../evil", "version": 1, "digest": "0" * 64, "bytes": {"file": 9}}
    transport = httpx.MockTransport(
        lambda request: (
            httpx.Response(200, json=version)
            if request.url.path.endswith("/1")
            else httpx.Response(200, content=b"x")
        )
    )
    with (
        Quickchange("http://fake", transport=transport) as client,
        pytest.raises(AnswerInvalid),
    ):
        client.adapters.download("a", 1, here / "x")
    assert list(here.parent.iterdir()) == [here]
    assert list(here.iterdir()) == []


def test_pull(run_command: RunCommand, adapter_folder: Path, here: Path) -> None:
    (adapter_folder / TASK).write_text('{"max_tokens": 3}')
    run_command("push", str(adapter_folder), "--name", "a", "--alias", "canary")
    for number, reference in enumerate(("a", "a:1", "a@canary")):
        target = here / str(number)
        result = run_command("pull", reference, str(target))
        assert (result.exit_code, f"is in {target}" in result.stdout) == (0, True), result.stderr
        assert contents(target) == contents(adapter_folder)
    again = run_command("pull", "a", str(here / "0"))
    assert (again.exit_code, "there already" in again.stderr) == (2, True)
    as_json = run_command("pull", "a", str(here / "json"), "--json")
    assert '"max_tokens": 3' in as_json.stdout
    assert run_command("pull", "nobody", str(here / "y")).exit_code == 1
    assert not (here / "y").exists()


def test_pull_without_a_folder_takes_the_name(
    client: Quickchange, command_env: dict[str, str], adapter_folder: Path, here: Path
) -> None:
    client.adapters.upload(adapter_folder, name="a")
    command = str(Path(sys.executable).with_name("quickchange"))
    subprocess.run([command, "pull", "a"], cwd=here, env=command_env, check=True)
    assert contents(here / "a") == contents(adapter_folder)


def test_pull_of_a_name_without_default_asks_which(
    run_command: RunCommand, fake_server: FakeServer, adapter_folder: Path, here: Path
) -> None:
    run_command("push", str(adapter_folder), "--name", "a")
    fake_server.adapters["a"].aliases.clear()
    result = run_command("pull", "a", str(here / "x"))
    assert (result.exit_code, "a:1" in result.stderr) == (2, True)


def test_validate_checks_and_keeps_nothing(
    run_command: RunCommand, fake_server: FakeServer, adapter_folder: Path, pickle_folder: Path
) -> None:
    good = run_command("validate", str(adapter_folder))
    assert (good.exit_code, "it can be served" in good.stdout) == (0, True)
    bad = run_command("validate", str(pickle_folder), "--strict-base")
    assert (bad.exit_code, "weights_not_safetensors" in bad.stdout) == (1, True)
    run_command("validate", str(adapter_folder), "--name", "a", "--allow-noop", "--json")
    forms = [form for _, _, form in fake_server.requests]
    assert [form["name"] for form in forms] == ["to-be-named", "to-be-named", "a"]
    assert (forms[1]["strict_base"], forms[2]["allow_noop"]) == ("true", "true")
    assert fake_server.adapters == {}
