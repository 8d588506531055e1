"""The plain client, over a real socket."""

import hashlib
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from quickchange_client import (
    NO_RETRIES,
    ArgumentInvalid,
    Conflict,
    ConnectionFailed,
    ContextLengthExceeded,
    FolderInvalid,
    InvalidApiKey,
    NotFound,
    PreconditionFailed,
    Quickchange,
    RequestTimedOut,
    RetryPolicy,
    Unavailable,
    UploadRefused,
)

from tests.clients.fake_server import BASE, WORDS, FakeServer, refusal

SAID = "".join(WORDS)


def test_chat_takes_a_string_or_a_conversation(
    client: Quickchange, fake_server: FakeServer
) -> None:
    answer = client.chat(BASE, "How was it?", max_tokens=3, temperature=None, stop=["x"])
    assert answer.text == "".join(WORDS[:3])
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 3
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    client.chat(BASE, messages, extra_body={"new_field": 1})
    bodies = [body for _, _, body in fake_server.requests]
    asked = {"role": "user", "content": "How was it?"}
    assert bodies == [
        {"model": BASE, "messages": [asked], "max_tokens": 3, "stop": ["x"]},
        {"model": BASE, "messages": messages, "new_field": 1},
    ]


def test_complete_takes_every_form_of_prompt(client: Quickchange, fake_server: FakeServer) -> None:
    prompts: list[str | list[str] | list[int] | list[list[int]]] = [
        "a",
        ["a", "b"],
        [1],
        [[1], [2]],
    ]
    for prompt in prompts:
        assert client.complete(BASE, prompt).text == SAID
    assert [body["prompt"] for _, _, body in fake_server.requests] == prompts


def test_what_came_in_headers_is_kept(client: Quickchange, adapter_folder: Path) -> None:
    client.adapters.upload(adapter_folder, name="sentiment")
    answer = client.chat("sentiment", "x", extra_body={"tempreature": 0})
    assert answer.meta.adapter_digest == "sha256:" + "ab" * 32
    assert (answer.meta.queue_ms, answer.meta.ttft_ms) == (1.5, 20.0)
    assert answer.meta.ignored_fields == ("tempreature",)
    assert answer.meta.request_id == "req-2"
    assert client.chat(BASE, "x").meta.adapter_digest is None


@pytest.mark.parametrize("given", ["\ud800", float("nan"), object()])
def test_what_no_json_holds_is_an_error_of_the_tree(
    client: Quickchange, fake_server: FakeServer, given: Any
) -> None:
    with pytest.raises(ArgumentInvalid, match="cannot be sent"):
        client.chat(BASE, "Hello", extra_body={"field": given})
    assert fake_server.requests == []


@pytest.mark.parametrize("name", ["", "..", "a/versions/1", "../keys"])
def test_a_name_never_leads_to_another_route(
    client: Quickchange, fake_server: FakeServer, name: str
) -> None:
    for call in (client.adapters.get, client.adapters.delete, client.adapters.merge):
        with pytest.raises(ArgumentInvalid, match="names nothing"):
            call(name)
    with pytest.raises(ArgumentInvalid, match="names nothing"):
        client.adapters.delete_alias("a", name)
    assert fake_server.requests == []


def test_errors_are_those_of_the_answer(client: Quickchange) -> None:
    with pytest.raises(NotFound, match="nobody") as caught:
        client.chat("nobody", "x")
    assert (caught.value.code, caught.value.status) == ("model_not_found", 404)
    with pytest.raises(ContextLengthExceeded):
        client.complete(BASE, "too long")


def test_an_adapter_from_upload_to_deletion(
    client: Quickchange, adapter_folder: Path, other_folder: Path
) -> None:
    first = client.adapters.upload(adapter_folder, name="sentiment")
    assert (first.version, first.meta.status) == (1, 201)
    assert first.report is not None
    assert first.report.modules.matched[0].update_norm == 0.5
    assert first.report.probe is not None
    assert (first.report.probe.num_top_changed, first.report.probe.max_change) == (7, 1.5)
    again = client.adapters.upload(adapter_folder, name="sentiment", alias="prod")
    assert (again.version, again.meta.status) == (1, 200)
    second = client.adapters.upload(other_folder, name="sentiment")
    assert second.version == 2
    adapter = client.adapters.get("sentiment")
    assert adapter.aliases == {"default": 1, "prod": 1}
    assert [version.digest for version in adapter.versions] == [first.digest, second.digest]
    assert client.adapters.get_version("sentiment", 2).digest == second.digest
    moved = client.adapters.set_alias("sentiment", "default", 2, if_match=adapter.meta.etag)
    assert moved.aliases["default"] == 2
    with pytest.raises(PreconditionFailed):
        client.adapters.set_alias("sentiment", "default", 1, if_match=adapter.meta.etag)
    with pytest.raises(Conflict):
        client.adapters.delete("sentiment", 1)
    client.adapters.delete_alias("sentiment", "prod")
    assert client.adapters.delete("sentiment", 1).version == 1
    gone = client.adapters.delete("sentiment")
    assert gone.deleted
    assert gone.freed_bytes["device"] == 4096
    with pytest.raises(NotFound):
        client.adapters.get("sentiment")


def test_a_deletion_may_go_on_behind(client: Quickchange, adapter_folder: Path) -> None:
    client.adapters.upload(adapter_folder, name="busy")
    deletion = client.adapters.delete("busy", timeout_s=0.0)
    assert (deletion.deleted, deletion.state, deletion.meta.status) == (False, "deleting", 202)


def test_an_upload_is_the_files_byte_for_byte(
    client: Quickchange, fake_server: FakeServer, adapter_folder: Path
) -> None:
    (adapter_folder / "task.json").write_text('{"max_tokens": 3}')
    client.adapters.upload(
        adapter_folder, name="x", visibility="private", allow_noop=True, strict_base=True
    )
    _, _, form = fake_server.requests[-1]
    files = ("adapter_config.json", "adapter_model.safetensors", "task.json")
    fields = ("adapter_config", "adapter_model", "task")
    for field, name in zip(fields, files, strict=True):
        assert form[field] == hashlib.sha256((adapter_folder / name).read_bytes()).hexdigest()
    assert (form["name"], form["allow_noop"], form["strict_base"]) == ("x", "true", "true")
    assert form["visibility"] == "private"
    assert "alias" not in form


def test_progress_tells_how_far_an_upload_is(client: Quickchange, adapter_folder: Path) -> None:
    seen: list[tuple[int, int]] = []
    client.adapters.upload(
        adapter_folder, name="x", progress=lambda sent, total: seen.append((sent, total))
    )
    assert len(seen) > 4
    assert seen[-1][0] == seen[-1][1] > 1_000_000


def test_a_dry_run_lists_all_problems_and_keeps_nothing(
    client: Quickchange, adapter_folder: Path, pickle_folder: Path
) -> None:
    assert client.adapters.dry_run(adapter_folder, name="x").ok
    report = client.adapters.dry_run(pickle_folder, name="x")
    assert not report.ok
    assert [problem.code for problem in report.problems] == ["weights_not_safetensors"]
    assert list(client.adapters.iterate()) == []


def test_a_refused_upload_says_why(client: Quickchange, pickle_folder: Path) -> None:
    with pytest.raises(UploadRefused) as caught:
        client.adapters.upload(pickle_folder, name="x")
    assert caught.value.problems[0].where == "adapter_model.safetensors"


def test_a_wrong_folder_is_never_sent(
    client: Quickchange, fake_server: FakeServer, tmp_path: Path
) -> None:
    with pytest.raises(FolderInvalid):
        client.adapters.upload(tmp_path, name="x")
    assert fake_server.headers == []


def test_iterate_walks_all_pages(client: Quickchange, adapter_folder: Path) -> None:
    names = [f"a{number}" for number in range(5)]
    for name in names:
        client.adapters.upload(adapter_folder, name=name)
    assert [adapter.name for adapter in client.adapters.iterate()] == names
    page = client.adapters.list(after="a1", limit=2)
    assert ([adapter.name for adapter in page.data], page.has_more) == (["a2", "a3"], True)


def test_load_merge_and_back(client: Quickchange, adapter_folder: Path, other_folder: Path) -> None:
    client.adapters.upload(adapter_folder, name="x")
    client.adapters.upload(other_folder, name="x")
    merged = client.adapters.merge("x")
    assert (merged.version, merged.merged, merged.bytes["merged"]) == (1, True, 3000)
    assert client.adapters.merge("x", 2).version == 2
    assert client.adapters.load("x").tier == "host"
    assert client.adapters.unload("x", 2).tier == "disk"
    unmerged = client.adapters.unmerge("x")
    assert (unmerged.merged, unmerged.freed_bytes["merged"]) == (False, 3000)


def test_pin_and_disable_everywhere_or_here(
    client: Quickchange, fake_server: FakeServer, adapter_folder: Path
) -> None:
    client.adapters.upload(adapter_folder, name="x")
    assert client.adapters.pin("x").pinned
    assert not client.adapters.unpin("x", 1, here_only=True).pinned
    assert client.adapters.disable("x", if_match='"7"').state == "disabled"
    assert fake_server.headers[-1]["if-match"] == '"7"'
    assert client.adapters.enable("x", here_only=True).state == "ready"
    assert client.adapters.merge("x", here_only=True).merged
    assert fake_server.scopes == ["catalog", "replica", "catalog", "replica", "replica"]


def test_models_memory_and_health(client: Quickchange, adapter_folder: Path) -> None:
    client.adapters.upload(adapter_folder, name="x")
    assert [model.id for model in client.models.list().data] == [BASE, "x"]
    model = client.models.get("x@default")
    assert (model.root, model.parent, model.max_model_len) == ("x:1", BASE, 512)
    assert client.memory().bytes["base"] == 1_500_000
    assert client.memory().adapters[0].device == 4096
    assert client.health().status == "ok"


def test_the_key_is_shown_to_the_server(server_url: str, fake_server: FakeServer) -> None:
    fake_server.api_key = "k-1"
    with Quickchange(server_url, api_key="k-1") as client:
        assert client.health().status == "ok"
    with Quickchange(server_url, api_key="k-2") as client, pytest.raises(InvalidApiKey):
        client.health()


@pytest.mark.parametrize(("status", "code"), [(429, "queue_full"), (503, "draining")])
def test_a_busy_server_is_asked_again(
    client: Quickchange, fake_server: FakeServer, adapter_folder: Path, status: int, code: str
) -> None:
    """Generation and uploads too: the server did not begin."""
    busy = {"headers": {"retry-after": "0"}}
    fake_server.next_answers += [refusal(status, code, "busy", **busy) for _ in range(2)]
    assert client.chat(BASE, "x").text == SAID
    fake_server.next_answers += [refusal(status, code, "busy", **busy)]
    assert client.adapters.upload(adapter_folder, name="x").version == 1
    fake_server.next_answers += [refusal(status, code, "busy", **busy)]
    assert "".join(chunk.text for chunk in client.stream_chat(BASE, "x")) == SAID
    assert len(fake_server.headers) == 3 + 2 + 2


def test_retry_after_is_waited_for(client: Quickchange, fake_server: FakeServer) -> None:
    fake_server.next_answers.append(refusal(503, "draining", "", headers={"retry-after": "1"}))
    start_s = time.monotonic()
    client.health()
    assert time.monotonic() - start_s >= 1.0


def test_it_gives_up_in_the_end(client: Quickchange, fake_server: FakeServer) -> None:
    fake_server.next_answers += [refusal(503, "draining", "going down") for _ in range(9)]
    with pytest.raises(Unavailable, match="going down"):
        client.health()
    assert len(fake_server.headers) == 3


def test_no_server_is_said_with_the_address() -> None:
    with (
        Quickchange("http://127.0.0.1:9", retry=NO_RETRIES) as client,
        pytest.raises(ConnectionFailed, match=r"http://127\.0\.0\.1:9/.*QUICKCHANGE_URL"),
    ):
        client.health()


def broken_once(kind: type[httpx.TransportError]) -> tuple[httpx.MockTransport, list[str]]:
    """Return a transport that fails the first request, and the list of what it was asked."""
    asked: list[str] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request.method)
        if len(asked) == 1:
            raise kind("broken", request=request)
        return httpx.Response(200, json={"status": "ok", "id": "1", "model": "m", "choices": []})

    return httpx.MockTransport(answer), asked


def test_reading_again_does_no_harm_but_generating_again_might() -> None:
    retry = RetryPolicy(base_wait_s=0.001)
    transport, asked = broken_once(httpx.ReadError)
    Quickchange("http://fake", transport=transport, retry=retry).health()
    assert asked == ["GET", "GET"]
    transport, asked = broken_once(httpx.ReadError)
    with pytest.raises(ConnectionFailed):
        Quickchange("http://fake", transport=transport, retry=retry).chat(BASE, "x")
    assert asked == ["POST"]
    transport, asked = broken_once(httpx.ConnectError)
    Quickchange("http://fake", transport=transport, retry=retry).chat(BASE, "x")
    assert asked == ["POST", "POST"]


def test_a_slow_answer_is_its_own_error() -> None:
    transport, asked = broken_once(httpx.ReadTimeout)
    with pytest.raises(RequestTimedOut, match="timeout_s"):
        Quickchange("http://fake", transport=transport).health()
    assert asked == ["GET"]
