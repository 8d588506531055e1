"""What a version's task fills in a request, and what it leaves alone; over a scripted engine."""

from collections.abc import Callable
from typing import Any

import httpx
import pytest
from quickchange_adapters.task import Task
from quickchange_server.tokenizer import Tokenizer

from tests.server.scripted_adapters import ScriptedAdapters
from tests.server.scripted_engine import ScriptedEngine

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
TASK = Task("review: {input}\nverdict:", "be brief", ("fox", "dog"), 5, 0.0, 0.25)

Json = dict[str, Any]


@pytest.fixture(autouse=True)
def task(adapters: ScriptedAdapters) -> None:
    """Give `ada` a task; `bob` and the base have none."""
    adapters.tasks["ada"] = TASK


async def post(client: httpx.AsyncClient, path: str, **fields: Any) -> Json:
    given: Json = (
        {"messages": [{"role": "user", "content": "a film"}]}
        if path == CHAT
        else {"prompt": "a film"}
    )
    answer = await client.post(path, json={"model": "ada", **given, **fields})
    assert answer.status_code == 200, answer.text
    body: Json = answer.json()
    return body


def prompts_of(engine: ScriptedEngine, tokenizer: Tokenizer) -> list[str]:
    ids = [request.prompt_ids for request in engine.requests]
    return [tokenizer.decode(each, skip_special_tokens=False) for each in ids]


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
async def test_what_a_request_leaves_out_is_the_task_s(
    client: httpx.AsyncClient,
    scripted_engine: ScriptedEngine,
    path: str,
    say: Callable[[str], None],
) -> None:
    say("the quick fox jumps")
    body = await post(client, path, temperature=None, stop=None, max_tokens=None)
    request = scripted_engine.requests[0]
    assert (request.sampling.temperature, request.sampling.top_p) == (0.0, 0.25)
    assert request.max_tokens == 5
    (choice,) = body["choices"]
    assert (choice.get("text") or choice["message"]["content"]) == "the quick "
    assert choice["finish_reason"] == "stop"


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
async def test_what_a_request_says_is_kept(
    client: httpx.AsyncClient,
    scripted_engine: ScriptedEngine,
    path: str,
    say: Callable[[str], None],
) -> None:
    say("the quick fox jumps")
    body = await post(client, path, temperature=1.5, top_p=1, stop=[], max_tokens=9)
    request = scripted_engine.requests[0]
    assert (request.sampling.temperature, request.sampling.top_p) == (1.5, 1.0)
    assert request.max_tokens == 9
    (choice,) = body["choices"]
    assert (choice.get("text") or choice["message"]["content"]) == "the quick fox jumps"


async def test_both_names_of_a_chat_s_token_limit_win_over_the_task_s(
    client: httpx.AsyncClient, scripted_engine: ScriptedEngine
) -> None:
    await post(client, CHAT, max_completion_tokens=7)
    await post(client, CHAT, max_tokens=8)
    assert [request.max_tokens for request in scripted_engine.requests] == [7, 8]


async def test_the_task_s_token_limit_gives_way_to_the_context_s_end(
    client: httpx.AsyncClient, adapters: ScriptedAdapters, scripted_engine: ScriptedEngine
) -> None:
    adapters.tasks["ada"] = Task(max_tokens=100_000)
    await post(client, CHAT)
    await post(client, COMPLETIONS)
    for request in scripted_engine.requests:
        assert request.max_tokens == scripted_engine.max_model_len - len(request.prompt_ids)


async def test_a_chat_is_rendered_in_the_task_s_form(
    client: httpx.AsyncClient, scripted_engine: ScriptedEngine, tokenizer: Tokenizer
) -> None:
    turns = [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "two"},
        {
            "role": "user",
            "content": [{"type": "text", "text": "th"}, {"type": "text", "text": "ree"}],
        },
    ]
    body = await post(client, CHAT, messages=turns)
    assert prompts_of(scripted_engine, tokenizer) == [
        "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\none<|im_end|>\n"
        "<|im_start|>assistant\ntwo<|im_end|>\n"
        "<|im_start|>user\nreview: th\nree\nverdict:<|im_end|>\n<|im_start|>assistant\n"
    ]
    assert body["usage"]["prompt_tokens"] == len(scripted_engine.requests[0].prompt_ids)


@pytest.mark.parametrize("role", ["system", "developer"])
async def test_a_system_message_of_the_caller_s_is_kept(
    client: httpx.AsyncClient, scripted_engine: ScriptedEngine, tokenizer: Tokenizer, role: str
) -> None:
    turns = [{"role": role, "content": "mine"}, {"role": "user", "content": "x"}]
    await post(client, CHAT, messages=turns)
    (prompt,) = prompts_of(scripted_engine, tokenizer)
    assert prompt.startswith("<|im_start|>system\nmine<|im_end|>")
    assert "be brief" not in prompt
    assert "review: x\nverdict:" in prompt


async def test_every_prompt_of_a_completion_is_in_the_form_and_none_has_the_system_message(
    client: httpx.AsyncClient, scripted_engine: ScriptedEngine, tokenizer: Tokenizer
) -> None:
    await post(client, COMPLETIONS, prompt=["one", ""])
    assert prompts_of(scripted_engine, tokenizer) == [
        "review: one\nverdict:",
        "review: \nverdict:",
    ]


async def test_token_ids_stay_as_they_are_and_get_the_defaults(
    client: httpx.AsyncClient, scripted_engine: ScriptedEngine
) -> None:
    await post(client, COMPLETIONS, prompt=[5, 6, 7])
    await post(client, COMPLETIONS, prompt=[[5, 6], [7]])
    assert [r.prompt_ids for r in scripted_engine.requests] == [(5, 6, 7), (5, 6), (7,)]
    assert {r.max_tokens for r in scripted_engine.requests} == {5}


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
async def test_raw_prompt_leaves_the_whole_task_aside(
    client: httpx.AsyncClient, scripted_engine: ScriptedEngine, path: str
) -> None:
    await post(client, path, model="bob")
    await post(client, path, raw_prompt=True)
    plain, raw = scripted_engine.requests
    for name in ("prompt_ids", "sampling", "max_tokens"):
        assert getattr(raw, name) == getattr(plain, name)
    await post(client, path, raw_prompt=False)
    await post(client, path, raw_prompt=None)
    assert {r.max_tokens for r in scripted_engine.requests[2:]} == {5}


async def test_raw_prompt_changes_nothing_where_there_is_no_task(
    client: httpx.AsyncClient, scripted_engine: ScriptedEngine
) -> None:
    for model in ("tiny", "bob"):
        await post(client, COMPLETIONS, model=model)
        await post(client, COMPLETIONS, model=model, raw_prompt=True)
    first, *rest = scripted_engine.requests
    assert all(request.prompt_ids == first.prompt_ids for request in rest)
    assert all(request.max_tokens == 16 for request in scripted_engine.requests)


async def test_raw_prompt_is_a_truth_value(client: httpx.AsyncClient) -> None:
    body = {"model": "ada", "prompt": "a", "raw_prompt": "perhaps"}
    answer = await client.post(COMPLETIONS, json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "raw_prompt")


async def test_a_mix_has_no_task(
    client: httpx.AsyncClient, scripted_engine: ScriptedEngine, tokenizer: Tokenizer
) -> None:
    for parts in ([{"model": "ada"}], [{"model": "ada"}, {"model": "bob"}]):
        await post(client, COMPLETIONS, model="tiny", adapters=parts)
    assert prompts_of(scripted_engine, tokenizer) == ["a film"] * 2
    assert {request.max_tokens for request in scripted_engine.requests} == {16}


async def test_an_echo_is_the_rendered_prompt_and_its_logprobs_fit_it(
    client: httpx.AsyncClient, say: Callable[[str], None]
) -> None:
    say("good")
    body = await post(client, COMPLETIONS, echo=True, logprobs=0)
    (choice,) = body["choices"]
    assert choice["text"] == "review: a film\nverdict:good"
    logprobs = choice["logprobs"]
    assert "".join(logprobs["tokens"]) == choice["text"]
    assert logprobs["text_offset"][0] == 0
    assert choice["text"][logprobs["text_offset"][-1] :] == logprobs["tokens"][-1]
    whole = await post(client, COMPLETIONS, echo=True, max_tokens=0)
    assert whole["choices"][0]["text"] == "review: a film\nverdict:"


async def test_a_stream_is_filled_too(
    client: httpx.AsyncClient, scripted_engine: ScriptedEngine, say: Callable[[str], None]
) -> None:
    say("the quick fox jumps")
    body = {"model": "ada", "prompt": "x", "stream": True}
    async with client.stream("POST", COMPLETIONS, json=body) as answer:
        text = "".join([line async for line in answer.aiter_lines()])
    assert " quick" in text
    assert "fox" not in text
    assert scripted_engine.requests[0].max_tokens == 5


async def test_a_form_that_fills_the_context_is_said(
    client: httpx.AsyncClient, adapters: ScriptedAdapters
) -> None:
    adapters.tasks["ada"] = Task(prompt="x " * 600 + "{input}")
    answer = await client.post(COMPLETIONS, json={"model": "ada", "prompt": "a"})
    assert answer.json()["error"]["code"] == "context_length_exceeded"
    raw = {"model": "ada", "prompt": "a", "raw_prompt": True}
    assert (await client.post(COMPLETIONS, json=raw)).status_code == 200


async def test_tokenize_gives_the_ids_that_generation_gets(
    client: httpx.AsyncClient, scripted_engine: ScriptedEngine
) -> None:
    messages = [{"role": "user", "content": "a film"}]
    for raw in (None, True):
        for path, given in ((CHAT, {"messages": messages}), (COMPLETIONS, {"prompt": "a film"})):
            await post(client, path, raw_prompt=raw)
            body = {"model": "ada", **given, "raw_prompt": raw}
            tokens = (await client.post("/tokenize", json=body)).json()["tokens"]
            assert tuple(tokens) == scripted_engine.requests[-1].prompt_ids
    lengths = [len(request.prompt_ids) for request in scripted_engine.requests]
    assert lengths[0] > lengths[2]
    assert lengths[1] > lengths[3]
    plain = (await client.post("/tokenize", json={"prompt": "a film"})).json()["tokens"]
    assert tuple(plain) == scripted_engine.requests[3].prompt_ids
