"""Whatever JSON is sent, the answer is never a 5xx, and never has another shape than an error's."""

import json
from typing import Any

import httpx
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from quickchange_server.api.schemas import ChatBody, CompletionBody

VALUES = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.floats(),
        st.text(st.characters(), max_size=8),
        st.sampled_from(["tiny", "ada", "user", "text", 1, 5, 0.5]),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(
            st.sampled_from(["role", "content", "type", "text", "model", "weight", "5", "x"]),
            inner,
            max_size=3,
        ),
    ),
    max_leaves=6,
)
COMPLETION_FIELDS = sorted({*CompletionBody.model_fields, "suffix", "best_of", "tools", "wibble"})
CHAT_FIELDS = sorted({*ChatBody.model_fields, "tools", "response_format", "echo", "wibble"})
PROFILE = settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@PROFILE
@given(fields=st.dictionaries(st.sampled_from(COMPLETION_FIELDS), VALUES, max_size=4))
async def test_completions(client: httpx.AsyncClient, fields: dict[str, Any]) -> None:
    await check(client, "/v1/completions", {"model": "tiny", "prompt": "the", **fields})


@PROFILE
@given(fields=st.dictionaries(st.sampled_from(CHAT_FIELDS), VALUES, max_size=4))
async def test_chat(client: httpx.AsyncClient, fields: dict[str, Any]) -> None:
    messages = [{"role": "user", "content": "hi"}]
    await check(client, "/v1/chat/completions", {"model": "ada", "messages": messages, **fields})


@PROFILE
@given(body=VALUES)
async def test_any_body(client: httpx.AsyncClient, body: Any) -> None:
    for path in ("/tokenize", "/detokenize", "/v1/completions"):
        await check(client, path, body)


async def check(client: httpx.AsyncClient, path: str, body: Any) -> None:
    content = json.dumps(body).encode()
    answer = await client.post(path, content=content, headers={"content-type": "application/json"})
    assert answer.status_code < 500, (content, answer.text)
    if answer.status_code >= 400:
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
