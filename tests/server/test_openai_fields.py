"""Every field of the contract through the official client, over the real engine: each has effect.

The tiny base is random, so an effect is judged against the same request without the field.
"""

from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import openai
import pytest
import pytest_asyncio
from quickchange_server.api.app import create_app
from transformers import AutoTokenizer

from tests.conftest import MakeAdapter
from tests.server.conftest import BASE_URL, serve_in_process
from tests.server.real_services import real_services

PROMPT = "the quick brown fox"
NUM_TOKENS = 16
Fields = dict[str, Any]


@pytest_asyncio.fixture
async def sdk(
    tiny_base: Path, tmp_path: Path, make_adapter: MakeAdapter
) -> AsyncIterator[openai.AsyncOpenAI]:
    """The client, with two uploaded adapters `one` and `two` behind it."""
    async for http in serve_in_process(create_app(real_services(tiny_base, tmp_path))):
        for seed, name in enumerate(("one", "two"), start=1):
            folder = make_adapter(seed=seed)
            files = {
                "adapter_config": (folder / "adapter_config.json").read_bytes(),
                "adapter_model": (folder / "adapter_model.safetensors").read_bytes(),
            }
            made = await http.post("/v1/adapters", data={"name": name}, files=files)
            assert made.status_code == 201, made.text
        any_client: Any = http
        yield openai.AsyncOpenAI(
            base_url=f"{BASE_URL}/v1", api_key="unused", http_client=any_client, max_retries=0
        )


async def complete(sdk: openai.AsyncOpenAI, **fields: Any) -> Any:
    """Complete greedily, past end tokens, unless the fields say otherwise."""
    extra = {"ignore_eos": True, **fields.pop("extra_body", {})}
    body = {"model": "tiny", "prompt": PROMPT, "temperature": 0, "max_tokens": NUM_TOKENS}
    return await sdk.completions.create(**{**body, **fields}, extra_body=extra)


async def chat(sdk: openai.AsyncOpenAI, **fields: Any) -> Any:
    extra = {"ignore_eos": True, **fields.pop("extra_body", {})}
    messages = [{"role": "user", "content": PROMPT}]
    body = {"model": "tiny", "messages": messages, "temperature": 0, "max_tokens": NUM_TOKENS}
    return await sdk.chat.completions.create(**{**body, **fields}, extra_body=extra)


def text_of(answer: Any, index: int = 0) -> str:
    choice = answer.choices[index]
    text = choice.message.content if hasattr(choice, "message") else choice.text
    assert isinstance(text, str)
    return text


CHANGES_TEXT: dict[str, Fields] = {
    "model": {"model": "one"},
    "adapters": {"extra_body": {"adapters": [{"model": "one"}, {"model": "two", "weight": -0.5}]}},
    "temperature": {"temperature": 2.0, "seed": 3},
    "presence_penalty": {"presence_penalty": 2.0},
    "frequency_penalty": {"frequency_penalty": 2.0},
    "repetition_penalty": {"extra_body": {"repetition_penalty": 5.0}},
    "logit_bias": {"logit_bias": {"300": 100}},
    "max_tokens": {"max_tokens": 3},
    "stop_token_ids": {"extra_body": {"stop_token_ids": [5, 6]}, "logit_bias": {"5": 90}},
}
KEEPS_TEXT: dict[str, Fields] = {
    "top_p at temperature 0": {"top_p": 0.5},
    "top_k at temperature 0": {"extra_body": {"top_k": 5}},
    "min_p at temperature 0": {"extra_body": {"min_p": 0.5}},
    "seed at temperature 0": {"seed": 5},
    "cache_salt": {"extra_body": {"cache_salt": "mine"}},
    "user": {"user": "somebody"},
    "min_tokens below the length": {"extra_body": {"min_tokens": 3}},
    "top_k 1 at any temperature": {"temperature": 2.0, "extra_body": {"top_k": 1}},
    "top_p near 0 at any temperature": {"temperature": 2.0, "top_p": 1e-6},
    "min_p 1 at any temperature": {"temperature": 2.0, "extra_body": {"min_p": 1.0}},
}
ASK: list[Callable[..., Any]] = [complete, chat]


@pytest.mark.parametrize("ask", ASK)
async def test_fields_that_change_the_text(
    sdk: openai.AsyncOpenAI, ask: Callable[..., Any]
) -> None:
    plain = text_of(await ask(sdk))
    for name, fields in CHANGES_TEXT.items():
        assert text_of(await ask(sdk, **fields)) != plain, name


@pytest.mark.parametrize("ask", ASK)
async def test_fields_that_keep_the_text(sdk: openai.AsyncOpenAI, ask: Callable[..., Any]) -> None:
    plain = text_of(await ask(sdk))
    for name, fields in KEEPS_TEXT.items():
        assert text_of(await ask(sdk, **fields)) == plain, name


@pytest.mark.parametrize("ask", ASK)
async def test_n_and_seed(sdk: openai.AsyncOpenAI, ask: Callable[..., Any]) -> None:
    fields = {"n": 3, "seed": 11, "temperature": 1.5}
    first, again = await ask(sdk, **fields), await ask(sdk, **fields)
    texts = [text_of(first, index) for index in range(3)]
    assert texts == [text_of(again, index) for index in range(3)]
    assert len(set(texts)) == 3
    assert [choice.index for choice in first.choices] == [0, 1, 2]
    assert first.usage.completion_tokens == 3 * NUM_TOKENS


@pytest.mark.parametrize("ask", ASK)
async def test_stop_cuts_the_text_before_it(
    sdk: openai.AsyncOpenAI, ask: Callable[..., Any]
) -> None:
    plain = text_of(await ask(sdk, max_tokens=60))
    stop = plain[len(plain) // 2 : len(plain) // 2 + 3]
    answer = await ask(sdk, max_tokens=60, stop=[stop, "never there"])
    assert text_of(answer) == plain[: plain.index(stop)]
    assert answer.choices[0].finish_reason == "stop"


async def test_ignore_eos_and_min_tokens(sdk: openai.AsyncOpenAI) -> None:
    bias = {"2": 100}  # the end token
    ended = await complete(sdk, logit_bias=bias, extra_body={"ignore_eos": False})
    assert ended.choices[0].finish_reason == "stop"
    assert ended.usage.completion_tokens == 1
    late = await complete(sdk, logit_bias=bias, extra_body={"ignore_eos": False, "min_tokens": 5})
    assert late.usage.completion_tokens == 6
    on = await complete(sdk, logit_bias=bias, extra_body={"ignore_eos": True})
    assert on.usage.completion_tokens == NUM_TOKENS


async def test_prompts_in_every_form(sdk: openai.AsyncOpenAI, tiny_base: Path) -> None:
    plain = text_of(await complete(sdk))
    ids = AutoTokenizer.from_pretrained(str(tiny_base)).encode(PROMPT)
    for prompt, count in ((ids, 1), ([PROMPT, PROMPT], 2), ([ids, ids, ids], 3)):
        answer = await complete(sdk, prompt=prompt)
        assert [choice.text for choice in answer.choices] == [plain] * count


async def test_echo_and_logprobs_of_completions(sdk: openai.AsyncOpenAI) -> None:
    plain = text_of(await complete(sdk))
    answer = await complete(sdk, echo=True, logprobs=3)
    assert text_of(answer) == PROMPT + plain
    logprobs = answer.choices[0].logprobs
    assert logprobs.token_logprobs[0] is None
    assert len(logprobs.tokens) == answer.usage.prompt_tokens + NUM_TOKENS
    assert "".join(logprobs.tokens).startswith(PROMPT)
    for chosen, top in zip(logprobs.token_logprobs[1:], logprobs.top_logprobs[1:], strict=True):
        assert len(top) >= 3
        assert chosen <= max(top.values()) + 1e-6


async def test_logprobs_of_chat(sdk: openai.AsyncOpenAI) -> None:
    answer = await chat(sdk, logprobs=True, top_logprobs=4)
    content = answer.choices[0].logprobs.content
    assert len(content) == NUM_TOKENS
    for token in content:
        assert len(token.top_logprobs) == 4
        assert token.logprob == pytest.approx(token.top_logprobs[0].logprob)
    plain = await chat(sdk)
    assert plain.choices[0].logprobs is None


async def test_cached_tokens_and_salts(sdk: openai.AsyncOpenAI) -> None:
    prompt = PROMPT * 5

    async def cached(**extra: Any) -> int:
        answer = await complete(sdk, prompt=prompt, max_tokens=1, extra_body=extra)
        count: int = answer.usage.prompt_tokens_details.cached_tokens
        return count

    assert await cached() == 0
    reused = await cached()
    assert reused > 0
    assert await cached(cache_salt="a") == 0
    assert await cached(cache_salt="a") == reused
    assert await cached(cache_salt="b") == 0


async def test_chat_roles_and_content_parts(sdk: openai.AsyncOpenAI) -> None:
    plain = text_of(await chat(sdk))
    parts = [{"role": "user", "content": [{"type": "text", "text": PROMPT}]}]
    assert text_of(await chat(sdk, messages=parts)) == plain
    told = [{"role": "developer", "content": "be brief"}, {"role": "user", "content": PROMPT}]
    assert text_of(await chat(sdk, messages=told)) != plain
    newer = await chat(sdk, max_tokens=openai.NOT_GIVEN, max_completion_tokens=4)
    assert newer.usage.completion_tokens == 4


@pytest.mark.parametrize("ask", ASK)
async def test_streams_carry_the_same_text_and_usage(
    sdk: openai.AsyncOpenAI, ask: Callable[..., Any]
) -> None:
    plain = await ask(sdk)
    chunks = [
        chunk async for chunk in await ask(sdk, stream=True, stream_options={"include_usage": True})
    ]
    *answered, last = chunks
    if ask is chat:
        text = "".join(chunk.choices[0].delta.content or "" for chunk in answered)
    else:
        text = "".join(chunk.choices[0].text for chunk in answered)
    assert text == text_of(plain)
    assert last.choices == []
    assert last.usage.completion_tokens == plain.usage.completion_tokens
    assert len({chunk.id for chunk in chunks}) == 1


REFUSED: list[Fields] = [
    {"n": 17},
    {"stop": [str(i) for i in range(17)]},
    {"temperature": -1},
    {"top_p": 0},
    {"presence_penalty": 3},
    {"max_tokens": -1},
    {"logit_bias": {"5": 101}},
    {"logit_bias": {"99999": 1}},
    {"extra_body": {"response_format": {"type": "json_object"}}},
    {"extra_body": {"adapters": [{"model": "one"}] * 5}},
    {"extra_body": {"min_p": 2}},
    {"extra_body": {"repetition_penalty": 0}},
]


@pytest.mark.parametrize("fields", REFUSED, ids=str)
async def test_limits_are_named(sdk: openai.AsyncOpenAI, fields: Fields) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        await complete(sdk, **fields)
    name = next(iter(fields.get("extra_body", fields)))
    assert name in str(caught.value)


async def test_too_long_a_prompt_has_its_code(sdk: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        await complete(sdk, prompt="fox " * 2000)
    assert caught.value.code == "context_length_exceeded"
