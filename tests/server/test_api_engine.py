"""The HTTP edge over the real engine on the tiny base: what it says is what the model says."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio
import torch
from quickchange_server.api.app import create_app
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.server.conftest import serve_in_process
from tests.server.real_services import real_services


@pytest_asyncio.fixture
async def real_client(tiny_base: Path, tmp_path: Path) -> AsyncIterator[httpx.AsyncClient]:
    async for each in serve_in_process(create_app(real_services(tiny_base, tmp_path))):
        yield each


async def complete(client: httpx.AsyncClient, **fields: Any) -> dict[str, Any]:
    body = {"model": "tiny", "prompt": "the quick brown", "temperature": 0, "max_tokens": 12}
    answer = await client.post("/v1/completions", json={**body, **fields})
    assert answer.status_code == 200, answer.text
    result: dict[str, Any] = answer.json()
    return result


@pytest.fixture(scope="module")
def hf_model(tiny_base: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(str(tiny_base), dtype=torch.float32)


async def test_greedy_text_equals_hugging_face(
    real_client: httpx.AsyncClient, tiny_base: Path, hf_model: Any
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(str(tiny_base))
    ids = tokenizer("the quick brown", return_tensors="pt").input_ids
    out = hf_model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
    expected = tokenizer.decode(out, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert (await complete(real_client))["choices"][0]["text"] == expected


async def test_prompt_logprobs_equal_hugging_face(
    real_client: httpx.AsyncClient, tiny_base: Path, hf_model: Any
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(str(tiny_base))
    ids = tokenizer("the quick brown fox", return_tensors="pt").input_ids
    with torch.no_grad():
        logprobs = torch.log_softmax(hf_model(ids).logits[0, :-1].float(), dim=-1)
    expected = logprobs.gather(1, ids[0, 1:, None])[:, 0].tolist()
    body = await complete(
        real_client, prompt="the quick brown fox", max_tokens=0, echo=True, logprobs=2
    )
    first, *others = body["choices"][0]["logprobs"]["token_logprobs"]
    assert first is None
    assert others == pytest.approx(expected, abs=1e-4)


async def test_seed_makes_a_sampled_answer_repeatable(real_client: httpx.AsyncClient) -> None:
    fields = {"temperature": 1.5, "n": 3, "ignore_eos": True, "max_tokens": 20}
    texts = [
        [choice["text"] for choice in (await complete(real_client, seed=seed, **fields))["choices"]]
        for seed in (7, 7, 8)
    ]
    assert texts[0] == texts[1]
    assert texts[0] != texts[2]
    assert len(set(texts[0])) == 3


async def test_logit_bias_bans_and_forces(real_client: httpx.AsyncClient) -> None:
    fox = (await real_client.post("/tokenize", json={"prompt": " fox"})).json()["tokens"][0]
    body = await complete(real_client, logit_bias={str(fox): 100}, max_tokens=3)
    assert body["choices"][0]["text"] == " fox fox fox"


async def test_stop_token_ids_end_the_answer_unseen(real_client: httpx.AsyncClient) -> None:
    fox = (await real_client.post("/tokenize", json={"prompt": " fox"})).json()["tokens"][0]
    body = await complete(real_client, logit_bias={str(fox): 100}, stop_token_ids=[fox])
    assert body["choices"][0]["text"] == ""
    assert body["choices"][0]["finish_reason"] == "stop"
    assert body["usage"]["completion_tokens"] == 1


async def test_min_tokens_are_reached(real_client: httpx.AsyncClient) -> None:
    fox = (await real_client.post("/tokenize", json={"prompt": " fox"})).json()["tokens"][0]
    fields = {"logit_bias": {str(fox): 100}, "stop_token_ids": [fox], "min_tokens": 5}
    body = await complete(real_client, **fields, max_tokens=9)
    assert body["usage"]["completion_tokens"] >= 5


async def test_chat_to_the_context_s_end(real_client: httpx.AsyncClient) -> None:
    messages = [{"role": "user", "content": "the lazy dog"}]
    answer = await real_client.post(
        "/v1/chat/completions", json={"model": "tiny", "messages": messages, "ignore_eos": True}
    )
    body = answer.json()
    models = (await real_client.get("/v1/models")).json()["data"]
    assert body["usage"]["total_tokens"] == models[0]["max_model_len"]
    assert body["choices"][0]["finish_reason"] == "length"


async def test_steps_and_memory_show_in_the_metrics(real_client: httpx.AsyncClient) -> None:
    await complete(real_client)
    text = (await real_client.get("/metrics")).text
    assert 'quickchange_step_seconds_count{kind="decode"}' in text
    assert 'quickchange_steps_total{weights="base"}' in text
    assert 'quickchange_memory_bytes{part="base"}' in text
    assert "quickchange_requests_running 0.0" in text


async def test_more_requests_than_may_wait_are_refused(real_client: httpx.AsyncClient) -> None:
    body = {"model": "tiny", "prompt": ["the"] * 10, "max_tokens": 100, "ignore_eos": True}
    both = await asyncio.gather(*(real_client.post("/v1/completions", json=body) for _ in "ab"))
    served, refused = sorted(both, key=lambda answer: answer.status_code)
    assert served.status_code == 200
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "queue_full")
    assert int(refused.headers["retry-after"]) >= 1


async def test_a_request_that_no_idle_engine_holds_is_400(real_client: httpx.AsyncClient) -> None:
    body = {"model": "tiny", "prompt": ["the"] * 17, "max_tokens": 2}
    answer = await real_client.post("/v1/completions", json=body)
    assert answer.status_code == 400
    assert "at most 16" in answer.json()["error"]["message"]
