"""Call adapters from LangChain, through its client for OpenAI.

pip install langchain-openai
python examples/langchain_chat.py sentiment
"""

import argparse
import os

from langchain_core.prompts import ChatPromptTemplate
from langchain_openai import ChatOpenAI
from pydantic import SecretStr

REVIEWS = ["A film that I would gladly watch twice.", "Dull from the first minute."]


def main() -> None:
    """Ask an adapter once, in a stream, and as a step of a chain over several inputs."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", help="an adapter: NAME, NAME:3 or NAME@ALIAS")
    url = os.environ.get("QUICKCHANGE_URL", "http://127.0.0.1:8000")
    parser.add_argument("--url", default=url, help="the server's address")
    options = parser.parse_args()
    chat = ChatOpenAI(
        model=options.model,
        base_url=f"{options.url}/v1",
        api_key=SecretStr(os.environ.get("QUICKCHANGE_API_KEY", "unused")),
        max_completion_tokens=8,
        temperature=0,
        stream_usage=True,
    )
    answer = chat.invoke(REVIEWS[0])
    print("whole:", repr(answer.content), answer.response_metadata["finish_reason"])
    chunks = list(chat.stream(REVIEWS[0]))
    print("streamed:", repr("".join(str(chunk.content) for chunk in chunks)))
    usage = [chunk.usage_metadata for chunk in chunks if chunk.usage_metadata]
    print("streamed tokens:", usage[-1]["output_tokens"] if usage else "not told")
    chain = ChatPromptTemplate.from_messages([("human", "{review}")]) | chat
    for review, reply in zip(REVIEWS, chain.batch([{"review": r} for r in REVIEWS]), strict=True):
        print("chain:", repr(review), "->", repr(reply.content))


if __name__ == "__main__":
    main()
