"""`text-generation`, unmodified: the client of TGI, sync and async, whole answers and streams."""

import asyncio
from typing import Any

import pytest
import text_generation
from text_generation import errors

QUICK = "the quick brown fox"


@pytest.fixture
def client(site: Any) -> Any:
    return text_generation.Client(site.url, timeout=60)


def test_an_answer_and_its_stream_say_the_same(client: Any) -> None:
    whole = client.generate(QUICK, max_new_tokens=10, decoder_input_details=True)
    events = list(client.generate_stream(QUICK, max_new_tokens=10))
    assert events[-1].generated_text == whole.generated_text
    assert whole.details.generated_tokens == len(events)
    assert "".join(token.text for token in whole.details.prefill) == QUICK


def test_sampling_stop_and_full_text(client: Any) -> None:
    wanted: Any = {"do_sample": True, "temperature": 0.8, "top_k": 5, "seed": 3}
    first = client.generate(QUICK, **wanted, return_full_text=True, repetition_penalty=1.1)
    again = client.generate(QUICK, **wanted, return_full_text=True, repetition_penalty=1.1)
    assert first.generated_text == again.generated_text
    assert first.generated_text.startswith(QUICK)
    assert first.details.seed == 3


def test_errors_are_the_client_s_own(client: Any) -> None:
    with pytest.raises(errors.ValidationError, match="truncate"):
        client.generate(QUICK, truncate=3)
    with pytest.raises(errors.ValidationError, match="best_of"):
        client.generate(QUICK, best_of=2, do_sample=True)
    with pytest.raises(errors.ValidationError):
        list(client.generate_stream(QUICK, max_new_tokens=100_000))


def test_its_chat_always_asks_for_a_model_called_tgi_which_is_not_there(client: Any) -> None:
    messages = [text_generation.types.Message(role="user", content=QUICK)]
    with pytest.raises(errors.NotFoundError, match="there is no model 'tgi'"):
        client.chat(messages=messages, max_tokens=5)


def test_the_async_client(site: Any) -> None:
    async def main() -> tuple[Any, list[Any]]:
        client = text_generation.AsyncClient(site.url, timeout=60)
        whole = await client.generate(QUICK, max_new_tokens=6)
        return whole, [event async for event in client.generate_stream(QUICK, max_new_tokens=6)]

    whole, events = asyncio.run(main())
    assert events[-1].generated_text == whole.generated_text
