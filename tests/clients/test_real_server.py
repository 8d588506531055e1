"""The clients and the command against the real server: shapes, errors, cancel."""

import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from quickchange_client import (
    ArgumentInvalid,
    AsyncQuickchange,
    Conflict,
    ContextLengthExceeded,
    InvalidRequest,
    MixPart,
    NotFound,
    PreconditionFailed,
    Quickchange,
    UploadRefused,
)

from tests.clients.real_server import COMMAND
from tests.conftest import MakeAdapter

BASE = "smollm2-135m"


@pytest.fixture
def client(real_server_url: str) -> Iterator[Quickchange]:
    """Return a client of the real server, and leave no adapter behind."""
    with Quickchange(real_server_url) as client:
        yield client
        for adapter in list(client.adapters.iterate()):
            client.adapters.delete(adapter.name)


def test_generation(client: Quickchange) -> None:
    answer = client.chat(BASE, "hello", max_tokens=6, temperature=0, ignore_eos=True)
    assert answer.text
    assert answer.model == BASE
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 6
    assert answer.meta.ttft_ms is not None
    assert answer.meta.ttft_ms > 0
    assert answer.meta.request_id
    completion = client.complete(BASE, ["a", "b"], max_tokens=3, temperature=0, logprobs=1)
    assert len(completion.choices) == 2


def test_a_stream_is_the_same_answer(client: Quickchange) -> None:
    greedy = {"max_tokens": 12, "temperature": 0.0, "ignore_eos": True}
    whole = client.complete(BASE, "the quick", **greedy)  # type: ignore[arg-type]
    chunks = list(client.stream_complete(BASE, "the quick", **greedy))  # type: ignore[arg-type]
    assert "".join(chunk.text for chunk in chunks) == whole.text
    usage = chunks[-1].usage
    assert usage is not None
    assert usage.completion_tokens == 12
    assert usage.ttft_ms is not None


def test_misspelt_options_are_named(client: Quickchange) -> None:
    answer = client.chat(BASE, "x", max_tokens=1, extra_body={"tempreature": 0})
    assert answer.meta.ignored_fields == ("tempreature",)


def test_refusals_are_the_errors_of_the_tree(client: Quickchange) -> None:
    with pytest.raises(NotFound) as unknown:
        client.chat("nobody", "x")
    assert unknown.value.code == "model_not_found"
    with pytest.raises(ContextLengthExceeded):
        client.complete(BASE, "the quick brown fox " * 600)
    with pytest.raises(InvalidRequest, match="temperature"):
        client.chat(BASE, "x", temperature=-1)
    with pytest.raises(NotFound) as absent:
        client.adapters.get("nobody")
    assert absent.value.code == "adapter_not_found"


def test_an_adapter_from_upload_to_deletion(client: Quickchange, make_adapter: MakeAdapter) -> None:
    first = client.adapters.upload(make_adapter(seed=1), name="sentiment")
    assert (first.version, first.meta.status, first.rank) == (1, 201, 8)
    assert first.report is not None
    assert len(first.report.modules.matched) == 14
    assert all(module.update_norm for module in first.report.modules.matched)
    assert client.adapters.upload(make_adapter(seed=1), name="sentiment").meta.status == 200
    second = client.adapters.upload(make_adapter(seed=2), name="sentiment", alias="canary")
    adapter = client.adapters.get("sentiment")
    assert adapter.aliases == {"default": 1, "canary": 2}
    assert client.models.get("sentiment@canary").root == "sentiment:2"
    assert client.adapters.get_version("sentiment", 2).digest == second.digest
    assert client.chat("sentiment:2", "x", max_tokens=1).meta.adapter_digest == second.digest
    client.adapters.set_alias("sentiment", "default", 2, if_match=adapter.meta.etag)
    with pytest.raises(PreconditionFailed):
        client.adapters.set_alias("sentiment", "default", 1, if_match=adapter.meta.etag)
    with pytest.raises(Conflict) as in_use:
        client.adapters.delete("sentiment", 2)
    assert in_use.value.code == "alias_in_use"
    assert client.adapters.delete_alias("sentiment", "canary").aliases == {"default": 2}
    assert client.adapters.delete("sentiment", 1).deleted
    with pytest.raises(PreconditionFailed):
        client.adapters.delete("sentiment", if_match=adapter.meta.etag)
    gone = client.adapters.delete("sentiment")
    assert gone.deleted
    assert gone.freed_bytes["disk"] > 0
    with pytest.raises(NotFound):
        client.chat("sentiment", "x")


def test_a_rollback_takes_an_alias_back_and_forth(
    client: Quickchange, make_adapter: MakeAdapter
) -> None:
    client.adapters.upload(make_adapter(seed=1), name="r")
    with pytest.raises(ArgumentInvalid, match="no other version"):
        client.adapters.rollback("r")
    client.adapters.upload(make_adapter(seed=2), name="r", alias="default")
    client.adapters.upload(make_adapter(seed=3), name="r", alias="default")
    assert client.adapters.rollback("r").aliases == {"default": 2}
    assert client.adapters.rollback("r").aliases == {"default": 3}
    client.adapters.disable("r", 2)
    assert client.adapters.rollback("r").aliases == {"default": 1}
    for _ in range(50):  # more events than a page holds
        client.adapters.set_alias("r", "canary", 1)
        client.adapters.set_alias("r", "canary", 3)
    done = client.adapters.events("r")
    assert len(done) > 100
    assert [event.action for event in done[:3]] == ["publish", "publish", "set_alias"]
    assert len({event.id for event in done}) == len(done)
    assert client.adapters.rollback("r", "canary").aliases["canary"] == 1


def test_pinned_until_unpinned(client: Quickchange, make_adapter: MakeAdapter) -> None:
    client.adapters.upload(make_adapter(seed=4), name="p")
    assert client.adapters.pin("p").pinned
    with pytest.raises(Conflict, match="unpin it first"):
        client.adapters.unload("p")
    assert not client.adapters.unpin("p").pinned
    assert client.adapters.unload("p").tier == "disk"


def test_merged_and_unmerged_answer_alike(client: Quickchange, make_adapter: MakeAdapter) -> None:
    client.adapters.upload(make_adapter(seed=3), name="m")
    unmerged = client.complete("m", "the quick", max_tokens=8, temperature=0)
    action = client.adapters.merge("m")
    assert action.merged
    assert action.bytes["merged"] > 0
    assert client.memory().bytes["merged"] == action.bytes["merged"]
    assert client.complete("m", "the quick", max_tokens=8, temperature=0).text == unmerged.text
    assert client.adapters.unmerge("m").freed_bytes["merged"] == action.bytes["merged"]
    assert client.adapters.load("m").tier in ("host", "device")
    assert client.adapters.load("m", tier="device").tier == "device"
    assert client.adapters.unload("m").tier == "disk"


def test_a_mix_of_ranks_and_signs_on_both_routes(
    client: Quickchange, real_server_url: str, make_adapter: MakeAdapter
) -> None:
    for seed, rank in ((1, 4), (2, 12)):
        client.adapters.upload(make_adapter(seed=seed, r=rank), name=f"mix-{seed}")
    mixes: list[list[MixPart]] = [
        [{"model": "mix-1", "weight": 0.7}, {"model": "mix-2@default", "weight": -0.5}],
        [{"model": "mix-1", "weight": 0.7}, {"model": "mix-2", "weight": 0.5}],
        [{"model": "mix-1"}],
    ]
    whole = [
        client.complete(BASE, "the quick", max_tokens=8, temperature=0, adapters=m).text
        for m in mixes
    ]
    assert len(set(whole)) == len(mixes)
    assert whole[2] == client.complete("mix-1", "the quick", max_tokens=8, temperature=0).text
    chats = [
        client.chat(BASE, "hello", max_tokens=8, temperature=0, adapters=m).text for m in mixes
    ]
    assert len(set(chats)) == len(mixes)
    words = ["generate", "--adapters", "mix-1=0.7,mix-2=-0.5", "the quick", "--raw"]
    words += ["--max-tokens", "8", "--temperature", "0", "--url", real_server_url]
    done = subprocess.run([COMMAND, *words], capture_output=True, text=True, check=True)
    assert done.stdout == whole[0] + "\n"


def test_a_refused_upload_lists_its_problems(
    client: Quickchange, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    folder = shutil.copytree(make_adapter(seed=1), tmp_path / "bad")
    (folder / "adapter_model.safetensors").write_bytes(b"\x80\x04pickle")
    with pytest.raises(UploadRefused) as refused:
        client.adapters.upload(folder, name="bad")
    assert refused.value.problems[0].code == "weights_not_safetensors"
    report = client.adapters.dry_run(folder, name="bad")
    assert (report.ok, report.problems[0].code) == (False, "weights_not_safetensors")
    assert client.adapters.dry_run(make_adapter(seed=1), name="good").ok
    assert list(client.adapters.iterate()) == []


def test_a_task_goes_up_with_its_folder_and_fills_what_is_left_out(
    client: Quickchange, make_adapter: MakeAdapter, real_server_url: str, tmp_path: Path
) -> None:
    folder = shutil.copytree(make_adapter(seed=1), tmp_path / "with-task")
    task = {"prompt": "the {input} fox", "max_tokens": 3, "temperature": 0}
    (folder / "task.json").write_text(json.dumps(task))
    assert client.adapters.upload(folder, name="t").task == task
    assert client.adapters.get("t").versions[0].task == task
    for ask in (client.chat, client.complete):
        filled = ask("t", "quick", ignore_eos=True)
        raw = ask("t", "quick", ignore_eos=True, raw_prompt=True, max_tokens=4)
        assert filled.usage is not None
        assert raw.usage is not None
        assert (filled.usage.completion_tokens, raw.usage.completion_tokens) == (3, 4)
        assert filled.usage.prompt_tokens > raw.usage.prompt_tokens
    words = (COMMAND, "generate", "t", "quick", "--json", "--url", real_server_url)
    lengths = []
    for more in ([], ["--raw-prompt", "--max-tokens", "3"]):
        done = subprocess.run((*words, *more), capture_output=True, text=True, check=True)
        lengths.append(json.loads(done.stdout)["usage"]["prompt_tokens"])
    assert lengths[0] > lengths[1]
    copy = tmp_path / "copy"
    client.adapters.download("t", 1, copy)
    for file in folder.iterdir():
        assert file.name == "README.md" or (copy / file.name).read_bytes() == file.read_bytes()
    (folder / "task.json").write_text('{"promt": "{input}"}')
    report = client.adapters.dry_run(folder, name="t")
    assert [(each.code, each.where) for each in report.problems] == [("task_invalid", "task.promt")]


def test_iterate_walks_all_pages(client: Quickchange, make_adapter: MakeAdapter) -> None:
    names = [f"a{number:02}" for number in range(22)]
    for name in names:
        client.adapters.upload(make_adapter(seed=1), name=name)
    assert client.adapters.list().has_more
    assert [adapter.name for adapter in client.adapters.iterate()] == names


def test_leaving_a_stream_frees_what_it_held(client: Quickchange) -> None:
    with client.stream_complete(BASE, "x", max_tokens=400, ignore_eos=True) as stream:
        next(iter(stream))
    deadline_s = time.monotonic() + 5.0
    while client.memory().bytes["kv_used"] and time.monotonic() < deadline_s:
        time.sleep(0.02)
    assert client.memory().bytes["kv_used"] == 0


async def test_the_async_client(real_server_url: str, make_adapter: MakeAdapter) -> None:
    async with AsyncQuickchange(real_server_url) as client:
        seen: list[int] = []
        await client.adapters.upload(
            make_adapter(seed=4), name="y", progress=lambda sent, total: seen.append(total - sent)
        )
        assert seen[-1] == 0
        async with await client.stream_chat("y", "hello", max_tokens=5) as stream:
            chunks = [chunk async for chunk in stream]
        assert chunks[-1].usage is not None
        assert (await client.adapters.delete("y")).deleted


def test_the_command(client: Quickchange, real_server_url: str, make_adapter: MakeAdapter) -> None:
    def run(*words: str) -> subprocess.CompletedProcess[str]:
        words = (COMMAND, *words, "--url", real_server_url)
        return subprocess.run(words, capture_output=True, text=True)

    pushed = run("push", str(make_adapter(seed=5)), "--name", "z")
    assert (pushed.returncode, "uploaded z:1; aliases: default" in pushed.stdout) == (0, True)
    assert "14 modules" in pushed.stdout
    assert json.loads(run("list", "--json").stdout)[0]["name"] == "z"
    assert run("generate", "z", "hello", "--max-tokens", "4").returncode == 0
    assert "merged" in run("merge", "z@default").stdout
    assert "kv_total" in run("memory").stdout
    assert run("rm", "z").stdout.startswith("deleted z; freed")
    assert run("show", "z").returncode == 1
