"""The official `openai` client, unmodified, over everything of OpenAI's API that is served."""

import asyncio
import time
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

import openai
import pytest

QUICK = "the quick brown fox"
MESSAGES: Any = [{"role": "user", "content": QUICK}]


@pytest.fixture
def client(site: Any) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{site.url}/v1", api_key="unused") as each:
        yield each


@pytest.fixture
def keyed(site: Any) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{site.keyed_url}/v1", api_key=site.key) as each:
        yield each


def wait_until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


def num_running(url: str, key: str = "unused") -> float:
    headers = {"authorization": f"Bearer {key}"}
    with urllib.request.urlopen(urllib.request.Request(f"{url}/metrics", headers=headers)) as page:
        text = page.read().decode()
    lines = [line for line in text.splitlines() if line.startswith("quickchange_requests_running")]
    return float(lines[0].rpartition(" ")[2])


def test_models_are_the_base_and_the_adapters(client: openai.OpenAI, site: Any) -> None:
    ids = [model.id for model in client.models.list()]
    assert ids[0] == site.base
    assert set(site.adapters) < set(ids)
    assert client.models.retrieve("ada@default").id == "ada@default"


def test_a_chat_and_its_stream_say_the_same(client: openai.OpenAI) -> None:
    wanted: Any = {"model": "ada", "messages": MESSAGES, "max_tokens": 12, "temperature": 0}
    whole = client.chat.completions.create(**wanted)
    assert whole.choices[0].finish_reason in ("stop", "length")
    assert whole.usage is not None
    assert whole.usage.completion_tokens <= 12
    chunks = list(
        client.chat.completions.create(
            **wanted, stream=True, stream_options={"include_usage": True}
        )
    )
    *told, last = chunks
    assert told[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in told)
    assert text == whole.choices[0].message.content
    assert told[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    assert last.choices == []
    assert last.usage is not None
    assert last.usage.total_tokens == whole.usage.total_tokens
    assert len({chunk.id for chunk in chunks}) == 1


def test_the_stream_helper_puts_a_chat_together(client: openai.OpenAI) -> None:
    wanted: Any = {"model": "ada", "messages": MESSAGES, "max_tokens": 12, "temperature": 0}
    text = client.chat.completions.create(**wanted).choices[0].message.content or ""
    # The helper raises when an answer ends by its length, so this one ends by a stop string.
    with client.chat.completions.stream(**wanted, stop=[text[3:5]]) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert {"chunk", "content.delta"} <= kinds
    assert final.choices[0].message.content == text[: text.index(text[3:5])]


def test_a_completion_and_its_stream_say_the_same(client: openai.OpenAI) -> None:
    wanted: Any = {"model": "bob", "prompt": QUICK, "max_tokens": 12, "temperature": 0}
    whole = client.completions.create(**wanted)
    streamed = client.completions.create(**wanted, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == whole.choices[0].text
    assert (
        whole.choices[0].text
        != client.completions.create(**{**wanted, "model": "ada"}).choices[0].text
    )


def test_every_form_of_prompt_and_several_choices(client: openai.OpenAI, site: Any) -> None:
    prompts: list[Any] = [QUICK, [QUICK, "a"], [5, 6, 7], [[5, 6], [7]]]
    for prompt, num_prompts in zip(prompts, (1, 2, 1, 2), strict=True):
        answer = client.completions.create(model=site.base, prompt=prompt, n=2, max_tokens=3)
        assert [choice.index for choice in answer.choices] == list(range(2 * num_prompts))


def test_seed_stop_logprobs_echo_and_bias(client: openai.OpenAI, site: Any) -> None:
    def ask(**more: Any) -> Any:
        wanted: Any = {"model": site.base, "prompt": QUICK, "max_tokens": 8, **more}
        return client.completions.create(**wanted).choices[0]

    assert ask(seed=3).text == ask(seed=3).text
    text = ask(temperature=0).text
    assert ask(temperature=0, stop=[text[2:4]]).text == text[: text.index(text[2:4])]
    scored = ask(echo=True, logprobs=2, max_tokens=0)
    assert scored.text == QUICK
    assert scored.logprobs.token_logprobs[0] is None
    assert all(value <= 0 for value in scored.logprobs.token_logprobs[1:])
    forced = client.completions.create(
        model=site.base, prompt=QUICK, max_tokens=2, logit_bias={"70": 100}, logprobs=1
    )
    assert forced.choices[0].logprobs is not None
    tokens = forced.choices[0].logprobs.tokens
    assert tokens is not None
    assert tokens[0] == tokens[1]


def test_chat_logprobs_and_content_parts(client: openai.OpenAI) -> None:
    parts: Any = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": QUICK}]},
    ]
    answer = client.chat.completions.create(
        model="ada",
        messages=parts,
        logprobs=True,
        top_logprobs=3,
        max_completion_tokens=4,
        n=2,
        user="me",
    )
    assert len(answer.choices) == 2
    for choice in answer.choices:
        assert choice.logprobs is not None
        assert choice.logprobs.content
        assert {len(token.top_logprobs) for token in choice.logprobs.content} == {3}


def test_fields_of_other_engines_and_a_mix_go_in_extra_body(
    client: openai.OpenAI, site: Any
) -> None:
    mix = [{"model": "ada", "weight": 0.7}, {"model": "bob", "weight": 0.3}]
    answer = client.completions.with_raw_response.create(
        model=site.base,
        prompt=QUICK,
        max_tokens=4,
        extra_body={"adapters": mix, "top_k": 5, "min_p": 0.01, "ignore_eos": True},
    )
    assert len(answer.headers["x-quickchange-adapter-digest"].split(",")) == 2
    assert answer.parse().usage.completion_tokens == 4  # type: ignore[union-attr]
    assert answer.headers["x-request-id"] == answer.request_id


@pytest.mark.parametrize(
    ("kind", "code", "wanted"),
    [
        (openai.NotFoundError, "model_not_found", {"model": "nobody"}),
        (openai.BadRequestError, "invalid_request", {"temperature": 9}),
        (openai.BadRequestError, "context_length_exceeded", {"max_tokens": 100_000}),
        (openai.BadRequestError, "unsupported_field", {"suffix": "x"}),
    ],
)
def test_errors_become_the_client_s(
    client: openai.OpenAI, site: Any, kind: Any, code: str, wanted: dict[str, Any]
) -> None:
    with pytest.raises(kind) as raised:
        client.completions.create(**{"model": site.base, "prompt": QUICK, **wanted})
    assert raised.value.code == code
    assert raised.value.request_id


def test_tools_are_refused_by_name(client: openai.OpenAI) -> None:
    tool: Any = {"type": "function", "function": {"name": "f", "parameters": {}}}
    with pytest.raises(openai.BadRequestError, match="tools"):
        client.chat.completions.create(model="ada", messages=MESSAGES, tools=[tool])


def test_a_wrong_key_is_an_authentication_error(site: Any) -> None:
    with (
        openai.OpenAI(base_url=f"{site.keyed_url}/v1", api_key="wrong") as client,
        pytest.raises(openai.AuthenticationError) as raised,
    ):
        client.models.list()
    assert raised.value.code == "invalid_api_key"


def test_a_full_server_is_tried_again_until_it_answers(site: Any) -> None:
    """The small server runs one request and lets none wait."""

    async def main() -> tuple[int, list[Any]]:
        async with openai.AsyncOpenAI(
            base_url=f"{site.keyed_url}/v1", api_key=site.key, max_retries=0
        ) as client:
            wanted: Any = {"model": site.base, "prompt": QUICK, "max_tokens": 100}
            wanted["extra_body"] = {"ignore_eos": True}
            asked = [client.completions.create(**wanted) for _ in range(4)]
            refused = await asyncio.gather(*asked, return_exceptions=True)
            patient = client.with_options(max_retries=20)
            asked = [patient.completions.create(**wanted) for _ in range(3)]
            answers = await asyncio.gather(*asked)
        return sum(isinstance(each, openai.RateLimitError) for each in refused), list(answers)

    num_refused, answers = asyncio.run(main())
    assert num_refused >= 1
    assert [answer.usage.completion_tokens for answer in answers] == [100] * 3


def test_a_timeout_is_the_client_s_and_frees_the_server(keyed: openai.OpenAI, site: Any) -> None:
    long: Any = {"model": site.base, "prompt": QUICK, "max_tokens": 480}
    with pytest.raises(openai.APITimeoutError):
        keyed.with_options(max_retries=0, timeout=0.05).completions.create(
            **long, extra_body={"ignore_eos": True}
        )
    wait_until(lambda: num_running(site.keyed_url, site.key) == 0)
    assert keyed.completions.create(model=site.base, prompt=QUICK, max_tokens=1).choices


def test_leaving_a_stream_frees_the_server(keyed: openai.OpenAI, site: Any) -> None:
    stream = keyed.completions.create(
        model=site.base,
        prompt=QUICK,
        max_tokens=480,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    next(iter(stream))
    stream.close()
    wait_until(lambda: num_running(site.keyed_url, site.key) == 0)
    assert keyed.completions.create(model=site.base, prompt=QUICK, max_tokens=1).choices


def test_the_async_client_streams_many_adapters_side_by_side(site: Any) -> None:
    async def text_of(client: openai.AsyncOpenAI, model: str) -> str:
        stream = await client.chat.completions.create(
            model=model, messages=MESSAGES, max_tokens=10, temperature=0, stream=True
        )
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    async def main() -> tuple[list[str], list[str]]:
        async with openai.AsyncOpenAI(base_url=f"{site.url}/v1", api_key="unused") as client:
            models = ["ada", "bob", site.base] * 3
            together = await asyncio.gather(*(text_of(client, model) for model in models))
            alone = [await text_of(client, model) for model in models[:3]]
        return list(together), alone

    together, alone = asyncio.run(main())
    assert together == alone * 3


def test_an_async_task_that_is_cancelled_frees_the_server(site: Any) -> None:
    async def main() -> None:
        async with openai.AsyncOpenAI(base_url=f"{site.keyed_url}/v1", api_key=site.key) as client:
            wanted: Any = {"model": site.base, "prompt": QUICK, "max_tokens": 480}
            task = asyncio.create_task(
                client.completions.create(**wanted, extra_body={"ignore_eos": True})
            )
            await asyncio.sleep(0.1)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    asyncio.run(main())
    wait_until(lambda: num_running(site.keyed_url, site.key) == 0)
