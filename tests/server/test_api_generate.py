"""`/generate`, `/generate_stream` and `/`: TGI's and LoRAX's fields, answers, events and errors.

The clients themselves run in tests/outside; here is the shape that they read.
"""

import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from quickchange_adapters.task import Task
from quickchange_server.engine.request import RequestFailure
from quickchange_server.tokenizer import Tokenizer

from tests.server.conftest import DIGEST_A, DIGEST_B
from tests.server.scripted_adapters import ScriptedAdapters
from tests.server.scripted_engine import ScriptedEngine
from tests.server.sse import data_of

Say = Callable[[str], None]
TOKEN_FIELDS = {"id", "text", "logprob", "special", "skipped"}


def asking(**parameters: object) -> dict[str, Any]:
    return {"inputs": "the lazy", "parameters": parameters}


async def test_whole_answer_is_the_text_alone(client: httpx.AsyncClient, say: Say) -> None:
    say("naïve 🙂 fox")
    answer = await client.post("/generate", json={"inputs": "the lazy dog"})
    assert answer.status_code == 200
    assert answer.json() == {"generated_text": "naïve 🙂 fox"}


async def test_details_tell_the_tokens_and_the_end(
    client: httpx.AsyncClient, say: Say, tokenizer: Tokenizer
) -> None:
    say("naïve fox")
    answer = await client.post(
        "/generate", json=asking(details=True, decoder_input_details=True, return_k_alternatives=2)
    )
    details = answer.json()["details"]
    *shown, end = details["tokens"]
    assert "".join(token["text"] for token in shown) == "naïve fox"
    assert (end["special"], end["text"], end["logprob"]) == (True, "<|im_end|>", -0.5)
    assert details["finish_reason"] == "eos_token"
    assert details["generated_tokens"] == len(details["tokens"])
    assert details["prompt_tokens"] == len(details["prefill"]) == len(tokenizer.encode("the lazy"))
    assert [token["logprob"] for token in details["prefill"]][:2] == [None, -0.5]
    assert details["skipped_tokens"] == 0
    assert details["seed"] is None
    assert set(end) == TOKEN_FIELDS | {"alternative_tokens"}
    assert [len(token["alternative_tokens"]) for token in shown] == [2] * len(shown)


@pytest.mark.parametrize("path", ["/generate_stream", "/"])
async def test_stream_has_an_event_per_token_and_the_text_in_the_last(
    client: httpx.AsyncClient, say: Say, path: str
) -> None:
    say("naïve 🙂 fox")
    body = {**asking(details=True, return_full_text=True), "stream": True}
    answer = await client.post(path, json=body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    *tokens, last = [json.loads(each) for each in data_of(answer.text)]
    assert all(set(each) == {"token", "generated_text", "details"} for each in tokens)
    assert "".join(each["token"]["text"] for each in tokens) == "naïve 🙂 fox"
    assert {each["generated_text"] for each in tokens} == {None}
    assert last["generated_text"] == "the lazynaïve 🙂 fox"
    assert last["token"]["special"]
    assert last["details"]["finish_reason"] == "eos_token"
    assert last["details"]["generated_tokens"] == len(tokens) + 1


async def test_whole_answer_of_the_root_is_a_list_of_one(
    client: httpx.AsyncClient, say: Say
) -> None:
    say("fox")
    answer = await client.post("/", json=asking(details=True))
    assert [each["generated_text"] for each in answer.json()] == ["fox"]


@pytest.mark.parametrize("path", ["/generate", "/generate_stream"])
async def test_the_stop_string_ends_the_text_and_belongs_to_it(
    client: httpx.AsyncClient, say: Say, scripted_engine: ScriptedEngine, path: str
) -> None:
    say("the quick brown fox jumps over")
    answer = await client.post(path, json=asking(stop=["brown f", "zzz"], details=True))
    whole = json.loads(data_of(answer.text)[-1]) if path == "/generate_stream" else answer.json()
    assert whole["generated_text"] == "the quick brown f"
    assert whole["details"]["finish_reason"] == "stop_sequence"
    assert len(scripted_engine.aborted) == 1


@pytest.mark.parametrize("path", ["/generate", "/generate_stream"])
async def test_what_may_become_a_stop_string_is_shown_when_it_does_not(
    client: httpx.AsyncClient, say: Say, path: str
) -> None:
    say("the quick brown fox")
    answer = await client.post(path, json=asking(stop=["brown foxes"], max_new_tokens=400))
    whole = json.loads(data_of(answer.text)[-1]) if path == "/generate_stream" else answer.json()
    assert whole["generated_text"] == "the quick brown fox"


async def test_length_is_the_reason_when_tokens_run_out(
    client: httpx.AsyncClient, say: Say
) -> None:
    say("the quick brown fox")
    answer = await client.post("/generate", json=asking(max_new_tokens=2, details=True))
    assert answer.json()["details"]["finish_reason"] == "length"
    assert answer.json()["details"]["generated_tokens"] == 2


async def test_it_goes_on_to_the_context_s_end_unless_said(
    client: httpx.AsyncClient, scripted_engine: ScriptedEngine
) -> None:
    await client.post("/generate", json=asking())
    (request,) = scripted_engine.requests
    assert request.max_tokens + len(request.prompt_ids) == scripted_engine.max_model_len


@pytest.mark.parametrize(
    ("adapter_id", "digests"),
    [
        *((name, ()) for name in (None, "", "tiny", "__base_model__")),
        ("ada", (DIGEST_A,)),
        ("ada@blue", (DIGEST_B,)),
    ],
)
async def test_adapter_id_is_a_model_string(
    client: httpx.AsyncClient,
    scripted_engine: ScriptedEngine,
    adapter_id: str | None,
    digests: tuple[str, ...],
) -> None:
    answer = await client.post("/generate", json=asking(adapter_id=adapter_id))
    assert answer.status_code == 200
    assert tuple(ref.digest for ref in scripted_engine.requests[0].adapters) == digests


@pytest.mark.parametrize(
    ("parameters", "temperature"),
    [
        ({}, 0.0),
        ({"temperature": 1.0}, 0.0),
        ({"do_sample": True}, 1.0),
        ({"temperature": 0.7}, 0.7),
        ({"top_k": 3}, 1.0),
        ({"top_p": 1.0}, 0.0),
        ({"top_p": 0.5, "temperature": 0.3}, 0.3),
        ({"temperature": 0.0, "do_sample": True}, 0.0),
    ],
)
async def test_tokens_are_drawn_only_when_something_asks_for_it(
    client: httpx.AsyncClient,
    scripted_engine: ScriptedEngine,
    parameters: dict[str, object],
    temperature: float,
) -> None:
    answer = await client.post("/generate", json=asking(details=True, **parameters))
    assert scripted_engine.requests[0].sampling.temperature == temperature
    assert (answer.json()["details"]["seed"] is None) == (temperature == 0)


@pytest.mark.parametrize("seed", [0, 7, 2**63, 2**64 - 1])
async def test_seed_comes_back_with_all_its_bits(client: httpx.AsyncClient, seed: int) -> None:
    answer = await client.post("/generate", json=asking(do_sample=True, seed=seed, details=True))
    assert answer.json()["details"]["seed"] == seed


async def test_a_drawn_seed_can_be_sent_again(
    client: httpx.AsyncClient, scripted_engine: ScriptedEngine
) -> None:
    first = await client.post("/generate", json=asking(do_sample=True, details=True))
    seed = first.json()["details"]["seed"]
    await client.post("/generate", json=asking(do_sample=True, details=True, seed=seed))
    seeds = [request.sampling.seed for request in scripted_engine.requests]
    assert seeds[0] == seeds[1]


async def test_a_task_fills_what_is_left_out(
    client: httpx.AsyncClient,
    adapters: ScriptedAdapters,
    scripted_engine: ScriptedEngine,
    tokenizer: Tokenizer,
) -> None:
    adapters.tasks["ada"] = Task(prompt="say {input}:", max_tokens=5, temperature=0.4)
    for more in ({}, {"raw_prompt": True}, {"max_new_tokens": 3, "temperature": 0.9}):
        await client.post("/generate", json=asking(adapter_id="ada", **more))
    filled, raw, said = scripted_engine.requests
    assert list(filled.prompt_ids) == tokenizer.encode("say the lazy:")
    assert (filled.max_tokens, filled.sampling.temperature) == (5, 0.4)
    assert list(raw.prompt_ids) == tokenizer.encode("the lazy")
    assert (raw.max_tokens > 5, raw.sampling.temperature) == (True, 0.0)
    assert (said.max_tokens, said.sampling.temperature) == (3, 0.9)


@pytest.mark.parametrize(
    "parameters",
    [
        *({"best_of": 2}, {"typical_p": 0.5}, {"watermark": True}, {"truncate": 3}),
        *({"frequency_penalty": 0.5}, {"top_n_tokens": 2}, {"grammar": {"type": "json"}}),
        *({"response_format": {"type": "json_object"}}, {"apply_chat_template": True}),
        {"merged_adapters": {"ids": ["ada", "bob"], "weights": [0.5, 0.5], "density": 0}},
        *({"adapter_source": source} for source in ("hub", "s3", "pbase")),
    ],
)
async def test_what_would_change_the_answer_is_refused_by_name(
    client: httpx.AsyncClient, parameters: dict[str, object]
) -> None:
    answer = await client.post("/generate", json=asking(**parameters))
    assert answer.status_code == 422
    assert answer.json()["error"].startswith(f"{next(iter(parameters))}: ")
    assert answer.json()["error_type"] == "validation"
    assert answer.json()["code"] == "unsupported_field"


async def test_values_that_ask_for_nothing_pass_and_unknown_fields_are_named(
    client: httpx.AsyncClient,
) -> None:
    nothing: dict[str, object] = {
        "best_of": 1,
        "typical_p": 1.0,
        "watermark": False,
        "truncate": None,
        "stop": [],
    }
    more = {"adapter_source": "local", "api_token": "x", "frequency_penalty": 0.0, "foo": 1}
    answer = await client.post("/generate", json=asking(**nothing, **more))
    assert answer.status_code == 200
    assert answer.headers["x-quickchange-ignored-fields"] == "foo"


async def test_prompt_tokens_are_refused_in_a_stream(client: httpx.AsyncClient) -> None:
    answer = await client.post("/generate_stream", json=asking(decoder_input_details=True))
    assert (answer.status_code, answer.json()["code"]) == (422, "unsupported_field")


@pytest.mark.parametrize("path", ["/generate", "/generate_stream", "/"])
@pytest.mark.parametrize(
    ("body", "status", "error_type"),
    [
        ({"inputs": ""}, 422, "validation"),
        ({}, 422, "validation"),
        (asking(temperature=-1), 422, "validation"),
        (asking(max_new_tokens=10_000), 422, "validation"),
        (asking(adapter_id="nobody"), 404, "model_not_found"),
    ],
)
async def test_refusals_are_tgi_s(
    client: httpx.AsyncClient, path: str, body: dict[str, Any], status: int, error_type: str
) -> None:
    answer = await client.post(path, json=body)
    assert (answer.status_code, answer.json()["error_type"]) == (status, error_type)
    assert isinstance(answer.json()["error"], str)
    assert "detail" not in answer.json()


async def test_a_full_line_is_overloaded(
    client: httpx.AsyncClient, scripted_engine: ScriptedEngine
) -> None:
    scripted_engine.max_queue = 0
    answer = await client.post("/generate", json=asking())
    assert (answer.status_code, answer.json()["error_type"]) == (429, "overloaded")
    assert answer.headers["retry-after"] == "1"


async def test_a_failed_answer_is_a_generation_error_before_and_in_the_stream(
    client: httpx.AsyncClient, scripted_engine: ScriptedEngine, say: Say
) -> None:
    say("the quick brown fox")
    scripted_engine.fail_after = 2
    scripted_engine.failure = RequestFailure("non_finite", "values that are not finite")
    whole = await client.post("/generate", json=asking())
    assert (whole.status_code, whole.json()["error_type"]) == (424, "generation")
    streamed = await client.post("/generate_stream", json=asking())
    *tokens, failure = [json.loads(each) for each in data_of(streamed.text)]
    assert (streamed.status_code, len(tokens)) == (200, 2)
    assert failure == {
        "error": "values that are not finite",
        "error_type": "generation",
        "code": "non_finite",
    }


async def test_what_is_no_json_and_a_wrong_method_have_the_shape_too(
    client: httpx.AsyncClient,
) -> None:
    unread = await client.post("/generate", content=b"{", headers={"content-type": "text/json"})
    assert unread.status_code in (415, 422)
    assert isinstance(unread.json()["error"], str)
    wrong = await client.get("/generate")
    assert (wrong.status_code, wrong.json()["error_type"]) == (405, "method_not_allowed")


async def test_rejected_and_answered_requests_are_counted(
    client: httpx.AsyncClient, say: Say
) -> None:
    say("fox")
    for body in (asking(), asking(best_of=2), {}):
        await client.post("/generate", json=body)
    text = (await client.get("/metrics")).text
    assert 'quickchange_requests_total{outcome="ok"} 1.0' in text
    assert 'quickchange_requests_total{outcome="rejected"} 2.0' in text
