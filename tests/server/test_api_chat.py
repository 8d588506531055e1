from collections.abc import Callable
from typing import Any

import httpx
import pytest
from quickchange_server.tokenizer import Tokenizer

from tests.server.scripted_engine import ScriptedEngine

Say = Callable[[str], None]
PATH = "/v1/chat/completions"


def chat(content: Any = "hi", **fields: Any) -> dict[str, Any]:
    return {"model": "tiny", "messages": [{"role": "user", "content": content}], **fields}


def prompt_of(engine: ScriptedEngine, tokenizer: Tokenizer) -> str:
    return tokenizer.decode(engine.requests[-1].prompt_ids, skip_special_tokens=False)


async def test_message_and_envelope(client: httpx.AsyncClient, say: Say) -> None:
    say("你好 🙂")
    answer = await client.post(PATH, json=chat())
    body = answer.json()
    assert body["object"] == "chat.completion"
    assert body["id"].startswith("chatcmpl-")
    (choice,) = body["choices"]
    assert choice["message"] == {"role": "assistant", "content": "你好 🙂", "refusal": None}
    assert choice["finish_reason"] == "stop"


async def test_prompt_is_the_base_s_template(
    client: httpx.AsyncClient, scripted_engine: ScriptedEngine, tokenizer: Tokenizer
) -> None:
    messages = [
        {"role": "developer", "content": "be brief"},
        {
            "role": "user",
            "content": [{"type": "text", "text": "hi"}, {"type": "text", "text": "!"}],
        },
        {"role": "assistant", "content": None},
        {"role": "user", "content": "go"},
    ]
    answer = await client.post(PATH, json={"model": "tiny", "messages": messages})
    assert answer.status_code == 200
    assert prompt_of(scripted_engine, tokenizer) == (
        "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nhi\n!<|im_end|>\n"
        "<|im_start|>assistant\n<|im_end|>\n<|im_start|>user\ngo<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


async def test_without_max_tokens_the_context_is_the_limit(
    client: httpx.AsyncClient, scripted_engine: ScriptedEngine
) -> None:
    await client.post(PATH, json=chat())
    request = scripted_engine.requests[0]
    assert request.max_tokens == scripted_engine.max_model_len - len(request.prompt_ids)


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
async def test_both_names_of_the_token_limit(
    client: httpx.AsyncClient, scripted_engine: ScriptedEngine, name: str
) -> None:
    await client.post(PATH, json=chat(**{name: 7}))
    assert scripted_engine.requests[0].max_tokens == 7


async def test_choices_are_separate_requests(
    client: httpx.AsyncClient, scripted_engine: ScriptedEngine, tokenizer: Tokenizer
) -> None:
    words = ["the", "fox", "dog"]
    scripted_engine.answer = lambda request: tokenizer.encode(words[request.choice])
    body = (await client.post(PATH, json=chat(n=3))).json()
    assert [choice["message"]["content"] for choice in body["choices"]] == words
    assert len({request.request_id for request in scripted_engine.requests}) == 3


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([{"role": "tool", "content": "x"}], "messages[0].role"),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
            "messages[0].content[0]",
        ),
        ([{"role": "user"}], "messages[0].content"),
        ([{"role": "user", "content": 5}], "messages[0].content"),
        ([{"content": "hi"}], "messages[0].role"),
        ([], "messages"),
    ],
)
async def test_message_that_cannot_be_served_is_named(
    client: httpx.AsyncClient, messages: list[Any], param: str
) -> None:
    answer = await client.post(PATH, json={"model": "tiny", "messages": messages})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param


async def test_assistant_with_tool_calls_is_refused(client: httpx.AsyncClient) -> None:
    messages = [{"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}]
    answer = await client.post(PATH, json={"model": "tiny", "messages": messages})
    assert answer.json()["error"]["code"] == "unsupported_field"


async def test_top_logprobs_needs_logprobs(client: httpx.AsyncClient) -> None:
    answer = await client.post(PATH, json=chat(top_logprobs=2))
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "top_logprobs"
