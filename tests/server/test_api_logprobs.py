from collections.abc import Callable
from typing import Any

import httpx
from quickchange_server.tokenizer import Tokenizer

from tests.server.scripted_engine import ScriptedEngine
from tests.server.sse import chunks_of

Say = Callable[[str], None]


async def completion(client: httpx.AsyncClient, **fields: Any) -> Any:
    body = {"model": "tiny", "prompt": "the lazy", "max_tokens": 50, **fields}
    return (await client.post("/v1/completions", json=body)).json()["choices"][0]


async def test_completion_columns_line_up_with_the_text(
    client: httpx.AsyncClient, say: Say, tokenizer: Tokenizer
) -> None:
    say(" dog jumps over")
    choice = await completion(client, logprobs=2)
    columns = choice["logprobs"]
    assert "".join(columns["tokens"]) == choice["text"] == " dog jumps over"
    for token, offset in zip(columns["tokens"], columns["text_offset"], strict=True):
        assert choice["text"][offset:].startswith(token)
    assert set(columns["token_logprobs"]) == {-0.5}
    for token, top in zip(columns["tokens"], columns["top_logprobs"], strict=True):
        assert top[token] == -0.5
        assert len(top) == 2


async def test_echo_puts_the_prompt_s_before(client: httpx.AsyncClient, say: Say) -> None:
    say(" dog")
    choice = await completion(client, logprobs=1, echo=True)
    columns = choice["logprobs"]
    assert "".join(columns["tokens"]) == choice["text"] == "the lazy dog"
    assert columns["token_logprobs"][0] is None
    assert columns["top_logprobs"][0] is None
    assert all(value == -0.5 for value in columns["token_logprobs"][1:])
    for token, offset in zip(columns["tokens"], columns["text_offset"], strict=True):
        assert choice["text"][offset:].startswith(token)


async def test_echo_without_logprobs_asks_for_none(
    client: httpx.AsyncClient, scripted_engine: ScriptedEngine
) -> None:
    assert (await completion(client, echo=True))["logprobs"] is None
    assert scripted_engine.requests[0].prompt_logprobs is None
    assert scripted_engine.requests[0].sampling.logprobs is None


async def test_zero_reports_the_chosen_token_only(client: httpx.AsyncClient, say: Say) -> None:
    say(" dog")
    columns = (await completion(client, logprobs=0))["logprobs"]
    assert [list(top) for top in columns["top_logprobs"]] == [[t] for t in columns["tokens"]]


async def test_half_characters_are_told_apart(
    client: httpx.AsyncClient, scripted_engine: ScriptedEngine, tokenizer: Tokenizer
) -> None:
    by_byte = {tokenizer.token_bytes(i): i for i in range(3, tokenizer.vocab_size)}
    scripted_engine.answer = lambda request: [by_byte[bytes([b])] for b in "é".encode()]
    choice = await completion(client, logprobs=0)
    assert choice["text"] == "é"
    assert choice["logprobs"]["tokens"] == ["bytes:\\xc3", "bytes:\\xa9"]
    assert choice["logprobs"]["text_offset"] == [0, 0]


async def test_tokens_behind_a_stop_string_are_left_out(
    client: httpx.AsyncClient, say: Say
) -> None:
    say("the fox jumps over")
    choice = await completion(client, logprobs=0, stop=" jumps")
    assert "".join(choice["logprobs"]["tokens"]) == choice["text"] == "the fox"


async def test_streamed_columns_equal_the_whole(client: httpx.AsyncClient, say: Say) -> None:
    say("naïve 🙂 fox jumps")
    fields = {"logprobs": 2, "echo": True, "stop": ["never"]}
    whole = await completion(client, **fields)
    body = {"model": "tiny", "prompt": "the lazy", "max_tokens": 50, "stream": True, **fields}
    chunks = chunks_of((await client.post("/v1/completions", json=body)).text)
    parts = [chunk["choices"][0] for chunk in chunks]
    assert "".join(part["text"] for part in parts) == whole["text"]
    for name, column in whole["logprobs"].items():
        streamed = [value for part in parts if part["logprobs"] for value in part["logprobs"][name]]
        assert streamed == column


async def test_chat_shape(client: httpx.AsyncClient, say: Say) -> None:
    say("你好")
    body = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "hi"}],
        "logprobs": True,
        "top_logprobs": 3,
    }
    choice = (await client.post("/v1/chat/completions", json=body)).json()["choices"][0]
    content = choice["logprobs"]["content"]
    assert bytes(byte for token in content for byte in token["bytes"]).decode() == "你好"
    assert all(len(token["top_logprobs"]) == 3 for token in content)
    assert all(token["top_logprobs"][0]["token"] == token["token"] for token in content)


async def test_chat_without_logprobs_has_none(
    client: httpx.AsyncClient, scripted_engine: ScriptedEngine
) -> None:
    body = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "logprobs": False}
    choice = (await client.post("/v1/chat/completions", json=body)).json()["choices"][0]
    assert choice["logprobs"] is None
    assert scripted_engine.requests[0].sampling.logprobs is None
