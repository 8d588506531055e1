"""Adapters from the Hub: from one commit, only their files, whole, within limits."""

import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from quickchange_client import ArgumentInvalid, HubFetchFailed
from quickchange_client.hub import Hub, HubSource
from quickchange_client.settings import HubSettings

from tests.clients.cli_world import hub_of
from tests.clients.conftest import RunCommand
from tests.clients.fake_hub import COMMIT, HUB, REPO, STORAGE, FakeHub
from tests.clients.fake_server import FakeServer

FILES = {
    "README.md": b"# A LoRA",
    "adapter_config.json": b'{"peft_type": "LORA"}',
    "adapter_model.safetensors": bytes(range(256)) * 2000,
    "optimizer.bin": b"pickle",
}


def fetch(hub: FakeHub, folder: Path, text: str = f"hf:{REPO}", token: str | None = None) -> str:
    settings = HubSettings(HUB, token)
    with Hub(settings, transport=httpx.MockTransport(hub)) as each:
        return each.fetch(HubSource.parse(text), folder)


def test_the_files_of_an_adapter_come_from_one_commit(tmp_path: Path) -> None:
    hub = FakeHub(FILES)
    assert fetch(hub, tmp_path, f"hf:{REPO}@v1") == COMMIT
    wanted = ("adapter_config.json", "adapter_model.safetensors")
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == {
        name: FILES[name] for name in wanted
    }
    assert all(COMMIT in url or STORAGE in url for url, _ in hub.seen[1:])


def test_a_folder_of_a_repository_and_a_task(tmp_path: Path) -> None:
    files = {f"epoch-3/{name}": data for name, data in FILES.items()}
    files["epoch-3/task.json"] = b"{}"
    fetch(FakeHub(files), tmp_path, f"hf:{REPO}/epoch-3@refs/pr/1")
    assert {file.name for file in tmp_path.iterdir()} == {
        *("adapter_config.json", "adapter_model.safetensors", "task.json")
    }


def test_a_token_is_shown_to_the_hub_and_to_nobody_else(tmp_path: Path) -> None:
    hub = FakeHub(FILES, token="secret")
    fetch(hub, tmp_path, token="secret")
    shown = {url.startswith(HUB): token for url, token in hub.seen}
    assert shown == {True: "Bearer secret", False: None}
    with pytest.raises(HubFetchFailed, match="HF_TOKEN"):
        fetch(hub, tmp_path)


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"adapter_config.json": b"{}", "adapter_model.bin": b"x"}, "only adapter_model.bin"),
        ({"adapter_model.safetensors": b"x"}, "has no adapter_config.json"),
        ({**FILES, "adapter_config.json": b" " * (257 << 10)}, "larger than the 262144 bytes"),
        ({}, "has no adapter_config.json"),
    ],
    ids=["pickle", "no config", "too large", "empty"],
)
def test_what_is_no_adapter_is_not_fetched(
    files: dict[str, bytes], said: str, tmp_path: Path
) -> None:
    hub = FakeHub(files)
    with pytest.raises(HubFetchFailed, match=said):
        fetch(hub, tmp_path)
    assert (len(hub.seen), list(tmp_path.iterdir())) == (1, [])


def test_more_than_was_announced_is_cut_off(tmp_path: Path) -> None:
    def tell_nothing(request: httpx.Request) -> httpx.Response:
        if "revision" in str(request.url):
            names = ("adapter_config.json", "adapter_model.safetensors")
            siblings = [{"rfilename": name} for name in names]
            return httpx.Response(200, json={"sha": COMMIT, "siblings": siblings})
        return httpx.Response(200, content=bytes(300 << 10))

    with (
        Hub(HubSettings(HUB), transport=httpx.MockTransport(tell_nothing)) as hub,
        pytest.raises(HubFetchFailed, match="adapter_config.json is larger"),
    ):
        hub.fetch(HubSource(REPO), tmp_path)


def test_bytes_that_changed_on_their_way_are_refused(tmp_path: Path) -> None:
    with pytest.raises(HubFetchFailed, match="sha256"):
        fetch(FakeHub(FILES, sha256="ab" * 32), tmp_path)


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (httpx.Response(404), "look at the repository's name and revision"),
        (httpx.Response(500), "HTTP 500"),
        (httpx.Response(200, text="<html>"), "does not answer as the Hub does"),
        (httpx.Response(200, json={"sha": "../../x", "siblings": []}), "does not answer"),
        (httpx.ConnectError("refused"), "HF_ENDPOINT"),
        (httpx.Response(302, headers={"location": HUB}), "cannot fetch"),
    ],
    ids=["absent", "failing", "a page", "a path for a commit", "away", "a loop"],
)
def test_a_hub_that_does_not_help_is_said_so(
    answer: httpx.Response | Exception, said: str, tmp_path: Path
) -> None:
    def handle(request: httpx.Request) -> httpx.Response:
        if isinstance(answer, Exception):
            raise answer
        return answer

    with (
        Hub(HubSettings(HUB), transport=httpx.MockTransport(handle)) as hub,
        pytest.raises(HubFetchFailed, match=said),
    ):
        hub.fetch(HubSource(REPO), tmp_path)


def test_places() -> None:
    assert HubSource.parse("hf:a/b") == HubSource("a/b", "", "main")
    assert HubSource.parse("hf:a/b/c/d@x/y") == HubSource("a/b", "c/d", "x/y")
    for wrong in ("hf:", "hf:a", "hf:a/", "hf:../b", "hf:a/b/../c", "hf:a b/c", "hf:a/b?x=1"):
        with pytest.raises(ArgumentInvalid):
            HubSource.parse(wrong)


def test_where_the_hub_is() -> None:
    assert HubSettings.read({}) == HubSettings("https://huggingface.co", None)
    variables = {"HF_ENDPOINT": "http://mirror/hf/", "HF_TOKEN": "t"}
    assert HubSettings.read(variables) == HubSettings("http://mirror/hf", "t")
    assert "t" not in repr(HubSettings("u", "t")).replace("HubSettings", "")
    with pytest.raises(ArgumentInvalid, match="HF_ENDPOINT"):
        HubSettings.read({"HF_ENDPOINT": "nonsense"})


@pytest.fixture
def hub_url(adapter_folder: Path) -> Iterator[str]:
    """Return the address of a fake Hub on a socket, with the adapter's files."""
    with hub_of(adapter_folder) as url:
        yield url


def test_push_from_the_hub_keeps_the_commit_as_a_tag(
    run_command: RunCommand, fake_server: FakeServer, hub_url: str
) -> None:
    words = ("push", f"hf:{REPO}@v1", "--name", "x")
    done = run_command(*words, HF_ENDPOINT=hub_url)
    assert (done.exit_code, "uploaded x:1" in done.stdout) == (0, True), done.output
    form = fake_server.requests[-1][2]
    assert form["tags"] == f"hf:{REPO}@{COMMIT[:12]}"
    fake_server.adapters["x"].tags = ["mine", form["tags"]]
    run_command(*words, "--json", HF_ENDPOINT=hub_url)
    assert fake_server.requests[-1][2]["tags"] == f"mine,{form['tags']}"
    checked = run_command("validate", f"hf:{REPO}", HF_ENDPOINT=hub_url)
    assert (checked.exit_code, "it can be served" in checked.stdout) == (0, True)


def test_a_push_from_a_hub_that_has_no_such_thing_is_1(
    run_command: RunCommand, fake_server: FakeServer, hub_url: str
) -> None:
    failed = run_command("push", f"hf:{REPO}@v9", "--name", "x", "--json", HF_ENDPOINT=hub_url)
    assert failed.exit_code == 1
    assert "v9" in json.loads(failed.stderr)["error"]["message"]
    assert run_command("push", "hf:nonsense", "--name", "x").exit_code == 2
    assert fake_server.requests == []
