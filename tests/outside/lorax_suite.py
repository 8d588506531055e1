"""`lorax-client`, unmodified: the client of LoRAX, sync and async, whole answers and streams."""

import asyncio
from typing import Any

import lorax
import pytest
from lorax import errors

QUICK = "the quick brown fox"


@pytest.fixture
def client(site: Any) -> Any:
    return lorax.Client(site.url, timeout=60)


def test_an_answer_with_its_details(client: Any) -> None:
    answer = client.generate(QUICK, adapter_id="ada", max_new_tokens=8)
    details = answer.details
    assert details.generated_tokens == len(details.tokens) <= 8
    shown = "".join(token.text for token in details.tokens if not token.special)
    assert shown == answer.generated_text
    assert all(token.logprob <= 0 for token in details.tokens)
    assert details.finish_reason in ("length", "eos_token")


def test_adapters_answer_differently_and_the_base_too(client: Any, site: Any) -> None:
    texts = {
        name: client.generate(QUICK, adapter_id=name, max_new_tokens=10).generated_text
        for name in (None, "ada", "bob")
    }
    assert len(set(texts.values())) == 3
    base = client.generate(QUICK, adapter_id=site.base, max_new_tokens=10)
    assert base.generated_text == texts[None]


def test_a_stream_says_what_the_whole_answer_says(client: Any) -> None:
    wanted: Any = {"adapter_id": "ada", "max_new_tokens": 10}
    whole = client.generate(QUICK, **wanted)
    events = list(client.generate_stream(QUICK, **wanted))
    assert [event.token.id for event in events] == [token.id for token in whole.details.tokens]
    assert events[-1].generated_text == whole.generated_text
    assert events[-1].details.finish_reason == whole.details.finish_reason
    assert all(event.generated_text is None for event in events[:-1])


def test_prompt_tokens_alternatives_and_full_text(client: Any) -> None:
    answer = client.generate(
        QUICK,
        max_new_tokens=3,
        decoder_input_details=True,
        return_k_alternatives=4,
        return_full_text=True,
    )
    assert answer.generated_text.startswith(QUICK)
    assert "".join(token.text for token in answer.details.prefill) == QUICK
    assert answer.details.prefill[0].logprob is None
    assert {len(token.alternative_tokens) for token in answer.details.tokens} == {4}


def test_sampling_is_repeated_by_the_seed_that_comes_back(client: Any) -> None:
    wanted: Any = {"do_sample": True, "temperature": 1.3, "top_p": 0.9, "max_new_tokens": 12}
    first = client.generate(QUICK, **wanted)
    again = client.generate(QUICK, **wanted, seed=first.details.seed)
    assert again.generated_text == first.generated_text


def test_a_stop_sequence_ends_the_text(client: Any) -> None:
    text = client.generate(QUICK, max_new_tokens=12).generated_text
    stop = text[3:5]
    cut = client.generate(QUICK, max_new_tokens=12, stop_sequences=[stop])
    assert cut.generated_text == text[: text.index(stop) + len(stop)]
    assert cut.details.finish_reason == "stop_sequence"


def test_errors_are_the_client_s_own(client: Any) -> None:
    with pytest.raises(errors.NotFoundError):
        client.generate(QUICK, adapter_id="nobody")
    with pytest.raises(errors.ValidationError, match="watermark"):
        client.generate(QUICK, watermark=True)
    with pytest.raises(errors.ValidationError, match="more than the"):
        client.generate(QUICK, max_new_tokens=100_000)
    with pytest.raises(errors.ValidationError, match="adapter_source"):
        client.generate(QUICK, adapter_id="ada", adapter_source="hub")
    with pytest.raises(errors.NotFoundError):
        list(client.generate_stream(QUICK, adapter_id="nobody"))


def test_a_key_goes_in_the_client_s_headers(site: Any) -> None:
    headers = {"Authorization": f"Bearer {site.key}"}
    client = lorax.Client(site.keyed_url, headers=headers, timeout=60)
    assert client.generate(QUICK, max_new_tokens=2).generated_text is not None
    with pytest.raises(errors.UnknownError, match="401"):
        lorax.Client(site.keyed_url).generate(QUICK, max_new_tokens=2)


def test_the_async_client(site: Any) -> None:
    async def main() -> tuple[Any, list[Any]]:
        client = lorax.AsyncClient(site.url, timeout=60)
        whole = await client.generate(QUICK, adapter_id="bob", max_new_tokens=6)
        stream = client.generate_stream(QUICK, adapter_id="bob", max_new_tokens=6)
        return whole, [event async for event in stream]

    whole, events = asyncio.run(main())
    assert events[-1].generated_text == whole.generated_text
