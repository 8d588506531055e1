"""LangChain's OpenAI classes, unmodified: invoke, stream, batch, async, a prompt in front."""

import asyncio
from typing import Any

import openai
import pytest
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_openai import ChatOpenAI, OpenAI

QUICK = "the quick brown fox"


def chat_of(site: Any, model: str = "ada", **more: Any) -> Any:
    wanted: Any = {"max_tokens": 10, "temperature": 0, **more}
    return ChatOpenAI(base_url=f"{site.url}/v1", api_key="unused", model=model, **wanted)


def test_invoke_and_stream_say_the_same(site: Any) -> None:
    chat = chat_of(site)
    answer = chat.invoke(QUICK)
    assert answer.usage_metadata["output_tokens"] <= 10
    assert answer.response_metadata["model_name"] == "ada"
    chunks = list(chat.stream(QUICK))
    assert "".join(chunk.content for chunk in chunks) == answer.content


def test_a_batch_is_each_answer(site: Any) -> None:
    chat = chat_of(site, "bob")
    prompts = [QUICK, "a", "the lazy dog"]
    together = [answer.content for answer in chat.batch(prompts)]
    assert together == [chat.invoke(prompt).content for prompt in prompts]


def test_a_chain_with_a_prompt_and_an_adapter_per_call(site: Any) -> None:
    prompt = ChatPromptTemplate.from_messages([("system", "be brief"), ("user", "{text}")])
    texts = {
        model: (prompt | chat_of(site, model) | StrOutputParser()).invoke({"text": QUICK})
        for model in (site.base, "ada", "bob")
    }
    assert len(set(texts.values())) == 3


def test_async_calls(site: Any) -> None:
    async def main() -> tuple[Any, list[Any]]:
        chat = chat_of(site)
        answer = await chat.ainvoke(QUICK)
        return answer, [chunk async for chunk in chat.astream(QUICK)]

    answer, chunks = asyncio.run(main())
    assert "".join(chunk.content for chunk in chunks) == answer.content


def test_completions(site: Any) -> None:
    wanted: Any = {"model": "ada", "max_tokens": 8, "temperature": 0}
    model = OpenAI(base_url=f"{site.url}/v1", api_key="unused", **wanted)
    text = model.invoke(QUICK)
    assert "".join(model.stream(QUICK)) == text
    assert model.batch([QUICK, QUICK]) == [text, text]


def test_an_unknown_adapter_is_openai_s_error(site: Any) -> None:
    with pytest.raises(openai.NotFoundError):
        chat_of(site, "nobody").invoke(QUICK)
