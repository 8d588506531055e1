import asyncio
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Any

import httpx
import pytest
from quickchange_server.api.app import AppServices, create_app
from quickchange_server.tokenizer import Tokenizer

from tests.server.conftest import serve_in_process
from tests.server.scripted_engine import ScriptedEngine
from tests.server.sse import chunks_of, data_of

Say = Callable[[str], None]


async def stream_completion(client: httpx.AsyncClient, **fields: Any) -> httpx.Response:
    body = {"model": "ada", "prompt": "the", "max_tokens": 50, "stream": True, **fields}
    return await client.post("/v1/completions", json=body)


async def stream_chat(client: httpx.AsyncClient, **fields: Any) -> httpx.Response:
    messages = [{"role": "user", "content": "hi"}]
    body = {"model": "ada", "messages": messages, "stream": True, **fields}
    return await client.post("/v1/chat/completions", json=body)


async def test_headers_of_a_stream(client: httpx.AsyncClient) -> None:
    answer = await stream_completion(client)
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["cache-control"] == "no-cache"
    assert answer.headers["x-accel-buffering"] == "no"
    assert answer.headers["x-request-id"]
    assert answer.headers["x-quickchange-adapter-digest"] == "a" * 64


async def test_completion_chunks_join_to_the_text(client: httpx.AsyncClient, say: Say) -> None:
    say("naïve café 🙂 fox")
    chunks = chunks_of((await stream_completion(client)).text)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "naïve café 🙂 fox"
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks[-2:]] == [None, "stop"]
    assert len({(chunk["id"], chunk["created"], chunk["model"]) for chunk in chunks}) == 1
    assert not any("usage" in chunk for chunk in chunks)


async def test_chat_role_comes_first_and_once(client: httpx.AsyncClient, say: Say) -> None:
    say("the quick fox")
    chunks = chunks_of((await stream_chat(client)).text)
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0]["role"] == "assistant"
    assert not any("role" in delta for delta in deltas[1:])
    assert "".join(delta.get("content", "") for delta in deltas) == "the quick fox"
    assert deltas[-1] == {}
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}


async def test_empty_answer_still_has_role_and_finish(client: httpx.AsyncClient, say: Say) -> None:
    say("")
    choices = [chunk["choices"][0] for chunk in chunks_of((await stream_chat(client)).text)]
    assert [choice["delta"] for choice in choices] == [{"role": "assistant", "content": ""}, {}]
    assert choices[-1]["finish_reason"] == "stop"


async def test_usage_chunk_when_asked_for(client: httpx.AsyncClient, say: Say) -> None:
    say("the fox")
    answer = await stream_chat(client, stream_options={"include_usage": True})
    *others, last = chunks_of(answer.text)
    assert all(chunk["usage"] is None for chunk in others)
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] >= 2
    assert last["usage"]["queue_ms"] == 2.0
    assert last["usage"]["ttft_ms"] == 5.0


async def test_choices_of_a_stream_are_told_apart(
    client: httpx.AsyncClient, scripted_engine: ScriptedEngine, tokenizer: Tokenizer
) -> None:
    words = ["the quick fox", "dog", "lazy 🙂"]
    scripted_engine.answer = lambda request: tokenizer.encode(words[request.choice])
    texts = dict.fromkeys(range(3), "")
    ends = []
    for chunk in chunks_of((await stream_completion(client, n=3)).text):
        (choice,) = chunk["choices"]
        texts[choice["index"]] += choice["text"]
        ends += [choice["index"]] if choice["finish_reason"] else []
    assert list(texts.values()) == words
    assert sorted(ends) == [0, 1, 2]


async def test_no_part_of_a_stop_string_is_sent(client: httpx.AsyncClient, say: Say) -> None:
    say("the quick brown fox")
    answer = await stream_completion(client, stop=["wn f"])
    text = "".join(chunk["choices"][0]["text"] for chunk in chunks_of(answer.text))
    assert text == "the quick bro"


async def test_text_with_unicode_line_marks_stays_on_its_line(
    client: httpx.AsyncClient, say: Say
) -> None:
    text = "a\u2028b\u2029c\u0085d\ne\rf\x0bg"
    say(text)
    answer = await stream_completion(client)
    lines = [line for line in answer.text.splitlines() if line]
    assert all(line.startswith("data: ") for line in lines)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks_of(answer.text)) == text


async def test_echo_begins_the_stream(client: httpx.AsyncClient, say: Say) -> None:
    say(" fox")
    chunks = chunks_of((await stream_completion(client, echo=True)).text)
    assert chunks[0]["choices"][0]["text"].startswith("the")
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "the fox"


async def test_failure_in_a_stream_ends_it_without_done(
    client: httpx.AsyncClient, scripted_engine: ScriptedEngine, say: Say
) -> None:
    say("the quick brown fox")
    scripted_engine.fail_after = 2
    answer = await stream_completion(client)
    assert answer.status_code == 200
    *chunks, last = data_of(answer.text)
    assert len(chunks) == 2
    assert json.loads(last)["error"]["code"] == "not_finite"


@pytest.mark.parametrize(
    ("max_queue", "fields", "status", "code"),
    [
        (0, {}, 429, "queue_full"),
        (2, {"n": 3}, 429, "queue_full"),
        (9, {"model": "nobody"}, 404, "model_not_found"),
        (9, {"prompt": [5] * 600}, 400, "context_length_exceeded"),
        (9, {"max_tokens": 600}, 400, "context_length_exceeded"),
    ],
)
async def test_refusals_keep_their_status(
    client: httpx.AsyncClient,
    scripted_engine: ScriptedEngine,
    max_queue: int,
    fields: dict[str, Any],
    status: int,
    code: str,
) -> None:
    scripted_engine.max_queue = max_queue
    answer = await stream_completion(client, **fields)
    assert answer.status_code == status
    assert answer.json()["error"]["code"] == code
    assert ("retry-after" in answer.headers) == (status == 429)
    assert scripted_engine.live == set()


async def test_refusal_after_admission_was_checked_keeps_its_status(
    client: httpx.AsyncClient, scripted_engine: ScriptedEngine
) -> None:
    """The engine refuses at the first step what it had room for a moment before."""
    scripted_engine.max_queue_at_submit = 0
    answer = await stream_completion(client)
    assert answer.status_code == 429


async def test_silence_is_filled_with_comments(
    services: AppServices, scripted_engine: ScriptedEngine, say: Say
) -> None:
    say("the quick fox")
    scripted_engine.pause_after = 1
    asyncio.get_running_loop().call_later(0.2, scripted_engine.resume.set)
    async for client in serve_in_process(create_app(replace(services, ping_s=0.03))):
        text = (await stream_completion(client)).text
    assert text.count(": ping\n\n") >= 2
    assert "".join(c["choices"][0]["text"] for c in chunks_of(text)) == "the quick fox"


async def test_session_is_closed_when_the_client_leaves_before_the_first_byte(
    services: AppServices, scripted_engine: ScriptedEngine
) -> None:
    """Drive the app by hand: the client is gone as soon as its body is read."""
    scripted_engine.pause_after = 0
    app = create_app(services)
    body = json.dumps({"model": "ada", "prompt": "the", "stream": True}).encode()
    messages: AsyncIterator[dict[str, Any]] = _body_then_gone(body)
    async with app.router.lifespan_context(app):
        await app(_scope(len(body)), lambda: anext(messages), _swallow)
    assert scripted_engine.live == set()
    assert len(scripted_engine.aborted) == 1


async def _body_then_gone(body: bytes) -> AsyncIterator[dict[str, Any]]:
    yield {"type": "http.request", "body": body, "more_body": False}
    while True:
        yield {"type": "http.disconnect"}


async def _swallow(message: Any) -> None:
    pass


def _scope(num_bytes: int) -> dict[str, Any]:
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": "/v1/completions",
        "raw_path": b"/v1/completions",
        "query_string": b"",
        "root_path": "",
        "headers": [
            (b"host", b"127.0.0.1"),
            (b"content-type", b"application/json"),
            (b"content-length", str(num_bytes).encode()),
        ],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 80),
    }
