"""The official client works as it is: answers, streams, lists, errors."""

from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import openai
import pytest
import pytest_asyncio
from openai.types.chat import ChatCompletionMessageParam

from tests.server.conftest import BASE_URL
from tests.server.scripted_engine import ScriptedEngine

Say = Callable[[str], None]
MESSAGES: list[ChatCompletionMessageParam] = [{"role": "user", "content": "hi"}]


@pytest_asyncio.fixture
async def sdk(client: httpx.AsyncClient) -> AsyncIterator[openai.AsyncOpenAI]:
    any_client: Any = client
    yield openai.AsyncOpenAI(
        base_url=f"{BASE_URL}/v1", api_key="unused", http_client=any_client, max_retries=0
    )


async def test_chat(sdk: openai.AsyncOpenAI, say: Say) -> None:
    say("the quick fox")
    answer = await sdk.chat.completions.create(
        model="ada", messages=MESSAGES, logprobs=True, top_logprobs=2, user="me"
    )
    assert answer.choices[0].message.content == "the quick fox"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].logprobs is not None
    assert answer.choices[0].logprobs.content is not None
    assert len(answer.choices[0].logprobs.content[0].top_logprobs) == 2
    assert answer.usage is not None
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 0
    assert answer.system_fingerprint is not None


async def test_chat_stream(sdk: openai.AsyncOpenAI, say: Say) -> None:
    say("naïve 🙂 fox")
    stream = await sdk.chat.completions.create(
        model="ada", messages=MESSAGES, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    *answered, last = chunks
    assert answered[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in answered)
    assert text == "naïve 🙂 fox"
    assert answered[-1].choices[0].finish_reason == "stop"
    assert last.usage is not None
    assert last.usage.completion_tokens > 0


async def test_completion_of_several_prompts(sdk: openai.AsyncOpenAI) -> None:
    answer = await sdk.completions.create(
        model="tiny", prompt=["the", "fox"], n=2, echo=True, logprobs=1, max_tokens=4
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert [choice.text for choice in answer.choices] == ["thethe"] * 2 + ["foxfox"] * 2
    assert answer.choices[0].logprobs is not None


async def test_completion_stream(sdk: openai.AsyncOpenAI, say: Say) -> None:
    say("the quick fox")
    stream = await sdk.completions.create(model="tiny", prompt="a", stream=True)
    assert "".join([chunk.choices[0].text async for chunk in stream]) == "the quick fox"


async def test_models(sdk: openai.AsyncOpenAI) -> None:
    assert [model.id async for model in await sdk.models.list()][:2] == ["tiny", "ada"]
    assert (await sdk.models.retrieve("ada@blue")).id == "ada@blue"


async def test_errors_become_the_sdk_s(
    sdk: openai.AsyncOpenAI, scripted_engine: ScriptedEngine
) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        await sdk.completions.create(model="nobody", prompt="a")
    assert missing.value.code == "model_not_found"
    assert missing.value.param == "model"
    with pytest.raises(openai.BadRequestError) as long:
        await sdk.completions.create(model="tiny", prompt=[5] * 600)
    assert long.value.code == "context_length_exceeded"
    scripted_engine.max_queue = 0
    with pytest.raises(openai.RateLimitError) as full:
        await sdk.completions.create(model="tiny", prompt="a")
    assert full.value.code == "queue_full"


async def test_error_inside_a_stream_is_raised(
    sdk: openai.AsyncOpenAI, scripted_engine: ScriptedEngine, say: Say
) -> None:
    say("the quick brown fox")
    scripted_engine.fail_after = 2
    stream = await sdk.completions.create(model="tiny", prompt="a", stream=True)
    assert [(await anext(stream)).choices[0].text for _ in range(2)] == ["the", " quick"]
    with pytest.raises(openai.APIError, match="not finite"):
        await anext(stream)
