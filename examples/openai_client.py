"""Call adapters with OpenAI's own client: an adapter is a model.

pip install openai
python examples/openai_client.py sentiment
"""

import argparse
import os

import openai
from openai import OpenAI

REVIEW = "A film that I would gladly watch twice."


def main() -> None:
    """Ask an adapter in every way that differs."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", help="an adapter: NAME, NAME:3 or NAME@ALIAS")
    url = os.environ.get("QUICKCHANGE_URL", "http://127.0.0.1:8000")
    parser.add_argument("--url", default=url, help="the server's address")
    options = parser.parse_args()
    key = os.environ.get("QUICKCHANGE_API_KEY", "unused")
    client = OpenAI(base_url=f"{options.url}/v1", api_key=key)
    ask_whole(client, options.model)
    ask_stream(client, options.model)
    ask_mix(client, options.model)
    ask_for_nothing(client)


def ask_whole(client: OpenAI, model: str) -> None:
    """Ask once; the version that answered stands in a header."""
    raw = client.chat.completions.with_raw_response.create(
        model=model, messages=[{"role": "user", "content": REVIEW}], max_tokens=8
    )
    answer = raw.parse()
    print("whole:", repr(answer.choices[0].message.content))
    print("digest:", raw.headers["x-quickchange-adapter-digest"])


def ask_stream(client: OpenAI, model: str) -> None:
    """Take the answer as it comes; the last chunk has the usage."""
    stream = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": REVIEW}],
        max_tokens=8,
        stream=True,
        stream_options={"include_usage": True},
    )
    for chunk in stream:
        if chunk.usage:
            print("streamed tokens:", chunk.usage.completion_tokens)
        for choice in chunk.choices:
            print("chunk:", repr(choice.delta.content or ""), choice.finish_reason or "")


def ask_mix(client: OpenAI, model: str) -> None:
    """Mix adapters; what OpenAI has no name for goes into `extra_body`, and `model` is the base."""
    base = client.models.list().data[0].id
    answer = client.chat.completions.create(
        model=base,
        messages=[{"role": "user", "content": REVIEW}],
        max_tokens=8,
        extra_body={"adapters": [{"model": model, "weight": 0.5}]},
    )
    print("half of it:", repr(answer.choices[0].message.content))


def ask_for_nothing(client: OpenAI) -> None:
    """An adapter that is not there is an error, never an answer of the base."""
    try:
        client.chat.completions.create(
            model="no-such-adapter", messages=[{"role": "user", "content": REVIEW}]
        )
    except openai.NotFoundError as error:
        print("error:", error.code)


if __name__ == "__main__":
    main()
