from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import httpx
import pytest
import pytest_asyncio
from quickchange_server.api.app import AppServices, create_app
from quickchange_server.engine.request import SamplingParams

from tests.server.conftest import serve_in_process
from tests.server.scripted_engine import ScriptedEngine

PATH = "/v1/completions"
CHAT = "/v1/chat/completions"


@pytest_asyncio.fixture
async def strict_client(services: AppServices) -> AsyncIterator[httpx.AsyncClient]:
    async for each in serve_in_process(create_app(replace(services, is_strict=True))):
        yield each


async def post(client: httpx.AsyncClient, **fields: Any) -> httpx.Response:
    return await client.post(PATH, json={"model": "tiny", "prompt": "the", **fields})


async def post_chat(client: httpx.AsyncClient, **fields: Any) -> httpx.Response:
    messages = [{"role": "user", "content": "hi"}]
    return await client.post(CHAT, json={"model": "tiny", "messages": messages, **fields})


async def test_sampling_fields_reach_the_engine(
    client: httpx.AsyncClient, scripted_engine: ScriptedEngine
) -> None:
    fields: dict[str, Any] = {
        "temperature": 0.5,
        "top_k": 40,
        "top_p": 0.9,
        "min_p": 0.1,
        "seed": -7,
        "repetition_penalty": 1.2,
        "presence_penalty": -0.5,
        "frequency_penalty": 0.25,
    }
    answer = await post(client, **fields, logit_bias={"5": -100, "7": 1.5}, logprobs=4)
    assert answer.status_code == 200
    assert scripted_engine.requests[0].sampling == SamplingParams(
        **fields, logit_bias=((5, -100.0), (7, 1.5)), logprobs=4
    )


async def test_other_fields_reach_the_engine(
    client: httpx.AsyncClient, scripted_engine: ScriptedEngine
) -> None:
    await post(
        client,
        max_tokens=9,
        min_tokens=3,
        ignore_eos=True,
        stop_token_ids=[7, 8],
        cache_salt="pepper",
    )
    request = scripted_engine.requests[0]
    assert (request.max_tokens, request.min_tokens, request.ignore_eos) == (9, 3, True)
    assert request.stop_token_ids == {7, 8}
    assert request.cache_scope == "default/pepper"


async def test_defaults_are_openai_s(
    client: httpx.AsyncClient, scripted_engine: ScriptedEngine
) -> None:
    await post(client)
    assert scripted_engine.requests[0].sampling == SamplingParams()


async def test_null_means_default(
    client: httpx.AsyncClient, scripted_engine: ScriptedEngine
) -> None:
    names = ("temperature", "top_p", "n", "stop", "seed", "logit_bias", "stream", "max_tokens")
    answer = await post(client, **dict.fromkeys(names))
    assert answer.status_code == 200
    assert scripted_engine.requests[0].sampling == SamplingParams()


async def test_nearly_zero_temperature_is_greedy(
    client: httpx.AsyncClient, scripted_engine: ScriptedEngine
) -> None:
    await post(client, temperature=1e-300, top_k=-1)
    assert scripted_engine.requests[0].sampling == SamplingParams(temperature=0.0)


@pytest.mark.parametrize(
    ("field", "value", "limit"),
    [
        ("n", 17, "16"),
        ("n", 0, "1"),
        ("temperature", 2.1, "2"),
        ("temperature", -0.1, "0"),
        ("top_p", 0, "0"),
        ("top_p", 1.01, "1"),
        ("min_p", 1.5, "1"),
        ("top_k", -2, "-1"),
        ("presence_penalty", 2.5, "2"),
        ("frequency_penalty", -2.5, "-2"),
        ("repetition_penalty", 0, "0"),
        ("logprobs", 21, "20"),
        ("max_tokens", -1, "0"),
        ("max_tokens", 0, "1"),
        ("min_tokens", 17, "16"),
        ("seed", 1 << 64, str(1 << 63)),
        ("stop", ["x"] * 17, "16"),
        ("stop", "x" * 257, "256"),
        ("stop_token_ids", [1] * 17, "16"),
        ("logit_bias", {"5": 101}, "100"),
        ("logit_bias", {"99999": 1}, "381"),
        ("logit_bias", {"fox": 1}, "381"),
        ("prompt", ["x"] * 257, "256"),
        ("prompt", [99999], "381"),
        ("prompt", [], "1"),
        ("adapters", [{"model": "ada"}] * 5, "4"),
        ("adapters", [{"model": "ada", "weight": 1000}], "100"),
        ("cache_salt", "x" * 257, "256"),
    ],
)
async def test_every_limit_is_named(
    client: httpx.AsyncClient, field: str, value: Any, limit: str
) -> None:
    answer = await post(client, **{field: value})
    error = answer.json()["error"]
    assert answer.status_code == 400
    assert error["message"].startswith(field)
    assert limit in error["message"]
    assert error["param"].startswith(field)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "1e999"])
async def test_numbers_that_are_none_are_refused(client: httpx.AsyncClient, number: str) -> None:
    text = f'{{"model": "tiny", "prompt": "a", "temperature": {number}}}'
    answer = await client.post(PATH, content=text, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "temperature"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tools", [{"type": "function"}]),
        ("tool_choice", "required"),
        ("response_format", {"type": "json_object"}),
        ("reasoning_effort", "high"),
        ("modalities", ["audio"]),
        ("chat_template", "{{ 7 }}"),
        ("chat_template_kwargs", {"tokenize": True}),
        ("echo", True),
        ("guided_json", {}),
        ("skip_special_tokens", False),
    ],
)
async def test_known_field_that_would_change_the_answer_is_refused(
    client: httpx.AsyncClient, field: str, value: Any
) -> None:
    answer = await post_chat(client, **{field: value})
    error = answer.json()["error"]
    assert answer.status_code == 400
    assert error["param"] == field
    assert error["code"] == "unsupported_field"
    assert field in error["message"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tools", []),
        ("tools", None),
        ("tool_choice", "auto"),
        ("response_format", {"type": "text"}),
        ("modalities", ["text"]),
        ("user", "u-1"),
        ("metadata", {"a": "b"}),
        ("store", True),
        ("service_tier", "flex"),
        ("parallel_tool_calls", True),
        ("n", None),
    ],
)
async def test_values_that_change_nothing_pass_even_when_strict(
    strict_client: httpx.AsyncClient, field: str, value: Any
) -> None:
    answer = await post_chat(strict_client, **{field: value})
    assert answer.status_code == 200
    assert "x-quickchange-ignored-fields" not in answer.headers


@pytest.mark.parametrize(("best_of", "status"), [(1, 200), (2, 200), (3, 400)])
async def test_best_of_may_only_repeat_n(
    client: httpx.AsyncClient, best_of: int, status: int
) -> None:
    answer = await post(client, n=2, best_of=best_of)
    assert answer.status_code == status
    if status == 400:
        assert "null or 1 or 2)" in answer.json()["error"]["message"]
        once = (await post(client, best_of=best_of)).json()["error"]["message"]
        assert "null or 1)" in once


async def test_unknown_fields_are_named_in_a_header(client: httpx.AsyncClient) -> None:
    answer = await post(client, wibble=1, **{"wo\r\nbble": 2, "日本": 3})
    assert answer.status_code == 200
    assert answer.headers["x-quickchange-ignored-fields"] == "wibble,?,?"


async def test_unknown_fields_are_refused_when_strict(strict_client: httpx.AsyncClient) -> None:
    answer = await post(strict_client, wibble=1)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "wibble"


async def test_mix_needs_the_base_as_model(client: httpx.AsyncClient) -> None:
    answer = await client.post(
        PATH, json={"model": "ada", "prompt": "a", "adapters": [{"model": "bob"}]}
    )
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "model"


async def test_base_cannot_be_part_of_a_mix(client: httpx.AsyncClient) -> None:
    answer = await post(client, adapters=[{"model": "ada"}, {"model": "tiny"}])
    assert answer.json()["error"]["param"] == "adapters[1].model"


async def test_unknown_adapter_in_a_mix_is_404(client: httpx.AsyncClient) -> None:
    answer = await post(client, adapters=[{"model": "ada"}, {"model": "nobody"}])
    assert (answer.status_code, answer.json()["error"]["param"]) == (404, "adapters[1].model")


@pytest.mark.parametrize("token_id", [-1, 10**6])
async def test_a_stop_token_id_that_is_none_is_named(
    client: httpx.AsyncClient, token_id: int
) -> None:
    answer = await post(client, stop_token_ids=[1, token_id])
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], error["code"]) == (
        *(400, "stop_token_ids"),
        "invalid_token_id",
    )
    assert f"{token_id} is not a token id" in error["message"]
