from collections.abc import Callable

import httpx
import pytest
from quickchange_server.engine.request import RequestFailure
from quickchange_server.tokenizer import Tokenizer

from tests.server.scripted_adapters import ScriptedAdapters
from tests.server.scripted_engine import ScriptedEngine

Say = Callable[[str], None]
PATH = "/v1/completions"


async def test_text_usage_and_envelope(client: httpx.AsyncClient, say: Say) -> None:
    say("naïve 🙂 fox")
    answer = await client.post(PATH, json={"model": "tiny", "prompt": "the lazy dog"})
    body = answer.json()
    assert answer.status_code == 200
    assert body["object"] == "text_completion"
    assert body["id"].startswith("cmpl-")
    assert body["model"] == "tiny"
    assert body["choices"] == [
        {"index": 0, "text": "naïve 🙂 fox", "logprobs": None, "finish_reason": "stop"}
    ]
    usage = body["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


async def test_end_token_is_counted_and_not_shown(
    client: httpx.AsyncClient, scripted_engine: ScriptedEngine, tokenizer: Tokenizer
) -> None:
    ids = tokenizer.encode("the fox")
    scripted_engine.answer = lambda request: ids
    body = (await client.post(PATH, json={"model": "tiny", "prompt": "a"})).json()
    assert body["choices"][0]["text"] == "the fox"
    assert body["usage"]["completion_tokens"] == len(ids) + 1


async def test_length_is_the_reason_when_tokens_run_out(
    client: httpx.AsyncClient, say: Say
) -> None:
    say("the quick brown fox jumps")
    body = (await client.post(PATH, json={"model": "tiny", "prompt": "a", "max_tokens": 2})).json()
    assert body["choices"][0]["finish_reason"] == "length"
    assert body["usage"]["completion_tokens"] == 2


async def test_sixteen_tokens_unless_said(
    client: httpx.AsyncClient, scripted_engine: ScriptedEngine
) -> None:
    await client.post(PATH, json={"model": "tiny", "prompt": "a"})
    assert scripted_engine.requests[0].max_tokens == 16


@pytest.mark.parametrize(
    ("prompt", "num_prompts"),
    [("the", 1), (["the", "fox"], 2), ([5, 6, 7], 1), ([[5, 6], [7], [8]], 3)],
)
async def test_every_form_of_prompt(
    client: httpx.AsyncClient,
    scripted_engine: ScriptedEngine,
    tokenizer: Tokenizer,
    prompt: object,
    num_prompts: int,
) -> None:
    body = (await client.post(PATH, json={"model": "tiny", "prompt": prompt, "n": 2})).json()
    assert [choice["index"] for choice in body["choices"]] == list(range(2 * num_prompts))
    assert [request.choice for request in scripted_engine.requests] == [0, 1] * num_prompts
    texts = [tokenizer.decode(request.prompt_ids) for request in scripted_engine.requests]
    assert [choice["text"] for choice in body["choices"]] == texts
    lengths = [len(request.prompt_ids) for request in scripted_engine.requests[::2]]
    assert body["usage"]["prompt_tokens"] == sum(lengths)


async def test_stop_string_cuts_and_aborts(
    client: httpx.AsyncClient, scripted_engine: ScriptedEngine, say: Say
) -> None:
    say("the quick brown fox jumps over the lazy dog")
    body = (
        await client.post(
            PATH, json={"model": "tiny", "prompt": "a", "max_tokens": 99, "stop": [" fox", "cat"]}
        )
    ).json()
    assert body["choices"][0]["text"] == "the quick brown"
    assert body["choices"][0]["finish_reason"] == "stop"
    assert scripted_engine.aborted == [scripted_engine.requests[0].request_id]


async def test_echo_repeats_the_prompt(client: httpx.AsyncClient, say: Say) -> None:
    say(" fox")
    body = (
        await client.post(PATH, json={"model": "tiny", "prompt": "the brown", "echo": True})
    ).json()
    assert body["choices"][0]["text"] == "the brown fox"


async def test_prompt_can_be_scored_alone(client: httpx.AsyncClient, tokenizer: Tokenizer) -> None:
    prompt = "the lazy dog"
    body = (
        await client.post(
            PATH,
            json={
                "model": "tiny",
                "prompt": prompt,
                "max_tokens": 0,
                "echo": True,
                "logprobs": 1,
            },
        )
    ).json()
    (choice,) = body["choices"]
    assert choice["text"] == prompt
    assert len(choice["logprobs"]["tokens"]) == len(tokenizer.encode(prompt))
    assert body["usage"]["completion_tokens"] == 0


async def test_adapter_is_named_in_header_and_fingerprint(
    client: httpx.AsyncClient, scripted_engine: ScriptedEngine, adapters: ScriptedAdapters
) -> None:
    answer = await client.post(PATH, json={"model": "ada", "prompt": "a"})
    digest = adapters.digests["ada"]
    assert answer.headers["x-quickchange-adapter-digest"] == digest
    assert answer.json()["model"] == "ada"
    assert answer.json()["system_fingerprint"] == f"fp_{'ba5e' * 3}_{digest[:12]}"
    assert [ref.digest for ref in scripted_engine.requests[0].adapters] == [digest]
    assert adapters.acquired == [digest]


async def test_base_has_no_adapter_header(client: httpx.AsyncClient) -> None:
    answer = await client.post(PATH, json={"model": "tiny", "prompt": "a"})
    assert "x-quickchange-adapter-digest" not in answer.headers


async def test_mix_reaches_the_engine_with_its_weights(
    client: httpx.AsyncClient, scripted_engine: ScriptedEngine, adapters: ScriptedAdapters
) -> None:
    mix = [{"model": "ada", "weight": 0.7}, {"model": "bob"}]
    answer = await client.post(PATH, json={"model": "tiny", "prompt": "a", "adapters": mix})
    digests = [adapters.digests["ada"], adapters.digests["bob"]]
    assert answer.headers["x-quickchange-adapter-digest"] == ",".join(digests)
    refs = scripted_engine.requests[0].adapters
    assert [(ref.digest, ref.weight) for ref in refs] == [(digests[0], 0.7), (digests[1], 1.0)]


async def test_cached_tokens_are_reported_once_a_prompt(
    client: httpx.AsyncClient, scripted_engine: ScriptedEngine
) -> None:
    scripted_engine.num_cached_tokens = 3
    body = (
        await client.post(PATH, json={"model": "tiny", "prompt": ["the lazy", "fox fox"], "n": 2})
    ).json()
    assert body["usage"]["prompt_tokens_details"] == {"cached_tokens": 6}


async def test_times_are_in_headers(client: httpx.AsyncClient) -> None:
    answer = await client.post(PATH, json={"model": "tiny", "prompt": "a"})
    assert float(answer.headers["x-quickchange-queue-ms"]) == 2.0
    assert float(answer.headers["x-quickchange-ttft-ms"]) == 5.0


async def test_failed_row_is_a_500_that_is_not_retried(
    client: httpx.AsyncClient, scripted_engine: ScriptedEngine
) -> None:
    scripted_engine.fail_after = 1
    scripted_engine.failure = RequestFailure("not_finite", "the logits are not finite")
    answer = await client.post(PATH, json={"model": "ada", "prompt": "the lazy dog"})
    assert answer.status_code == 500
    assert answer.headers["x-should-retry"] == "false"
    assert answer.json()["error"]["code"] == "not_finite"


@pytest.mark.parametrize(
    ("code", "status"),
    [("draining", 503), ("out_of_memory", 503), ("adapter_quarantined", 409), ("x", 500)],
)
async def test_failures_of_the_engine_have_their_status(
    client: httpx.AsyncClient, scripted_engine: ScriptedEngine, code: str, status: int
) -> None:
    scripted_engine.fail_after = 0
    scripted_engine.failure = RequestFailure(code, "why")
    answer = await client.post(PATH, json={"model": "ada", "prompt": "the"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
    assert ("retry-after" in answer.headers) == (status == 503)


async def test_quarantined_adapter_is_409_also_for_a_stream(
    client: httpx.AsyncClient, scripted_engine: ScriptedEngine, adapters: ScriptedAdapters
) -> None:
    scripted_engine.quarantined.add(adapters.digests["ada"])
    answer = await client.post(PATH, json={"model": "ada", "prompt": "the", "stream": True})
    assert answer.status_code == 409
    assert answer.json()["error"]["code"] == "adapter_quarantined"
    assert answer.headers["x-should-retry"] == "false"
    assert (await client.post(PATH, json={"model": "bob", "prompt": "the"})).status_code == 200


async def test_one_failed_choice_ends_its_siblings(
    client: httpx.AsyncClient, scripted_engine: ScriptedEngine
) -> None:
    scripted_engine.fail_after = 1
    await client.post(PATH, json={"model": "tiny", "prompt": ["a b", "the lazy dog"], "n": 2})
    assert scripted_engine.live == set()


@pytest.mark.parametrize(
    ("prompt", "param"), [(["the"] * 3, "prompt"), ("the", "n")], ids=["prompts", "n"]
)
async def test_more_choices_than_can_ever_wait_are_the_caller_s_fault(
    client: httpx.AsyncClient, scripted_engine: ScriptedEngine, prompt: object, param: str
) -> None:
    scripted_engine.max_requests = scripted_engine.max_queue = 5
    body = {"model": "tiny", "prompt": prompt, "n": 2 if param == "prompt" else 6}
    answer = await client.post("/v1/completions", json=body)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (400, "invalid_request", param)
    assert "at most 5" in error["message"]
    assert "--max-batch-rows and --max-queue" in error["message"]
    assert scripted_engine.requests == []
