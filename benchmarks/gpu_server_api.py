"""The API as the checks of a run on a GPU ask it: statuses, answers with their tokens, metrics."""

import re
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx

from benchmarks.failure import BenchmarkFailure

Json = dict[str, Any]
TIMEOUT_S = 60.0
SCRAPE_AGE_S = 0.6
"""So old may a text of metrics be that the server hands out."""
_SAMPLE = re.compile(r"^([a-zA-Z_:][\w:]*)(?:\{(.*)\})? (\S+)(?: .*)?$")
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')


@dataclass(frozen=True, slots=True)
class Reply:
    """What the server answered."""

    status: int
    body: Json
    headers: Mapping[str, str]

    @property
    def code(self) -> str | None:
        """The code of an error."""
        error = self.body.get("error")
        return error.get("code") if isinstance(error, dict) else None


@dataclass(frozen=True, slots=True)
class Answer:
    """A greedy answer to token ids, the prompt included.

    `tokens` are texts; from the second one on, `likeliest` has the likeliest token's text and
    `logprobs` the log probability of the token that is there.
    """

    text: str
    tokens: Sequence[str]
    likeliest: Sequence[str]
    logprobs: Sequence[float]


class Api:
    """One server over HTTP, from any thread."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._client = httpx.Client(base_url=url, timeout=TIMEOUT_S)

    def call(self, method: str, path: str, **content: Any) -> Reply:
        """Ask, and return whatever was answered."""
        answer = self._client.request(method, path, **content)
        is_json = "json" in answer.headers.get("content-type", "")
        body = answer.json() if is_json else {"text": answer.text}
        return Reply(answer.status_code, body, answer.headers)

    def good(self, method: str, path: str, **content: Any) -> Reply:
        """Ask, and return the answer. Raises: BenchmarkFailure for a status that is no success."""
        reply = self.call(method, path, **content)
        if reply.status >= 300:
            raise BenchmarkFailure(f"{method} {path} answered {reply.status}: {reply.body}")
        return reply

    def upload(self, name: str, folder: Path, **form: str) -> Reply:
        """Upload an adapter's folder; whatever is answered."""
        files = {
            "adapter_config": (folder / "adapter_config.json").read_bytes(),
            "adapter_model": (folder / "adapter_model.safetensors").read_bytes(),
        }
        return self.call("POST", "/v1/adapters", data={"name": name, **form}, files=files)

    def complete(self, model: str, prompt: Sequence[int] | str, **fields: Any) -> Reply:
        """Ask for a completion that shares no KV with any other; whatever is answered."""
        body = {
            "model": model,
            "prompt": prompt if isinstance(prompt, str) else list(prompt),
            "cache_salt": uuid.uuid4().hex,
            "max_tokens": 16,
            "temperature": 0,
            "ignore_eos": True,
            **fields,
        }
        return self.call("POST", "/v1/completions", json=body)

    def text(self, model: str, prompt: Sequence[int] | str, **fields: Any) -> str:
        """Return a completion's text. Raises: BenchmarkFailure."""
        reply = self.complete(model, prompt, **fields)
        if reply.status != 200:
            raise BenchmarkFailure(f"{model} answered {reply.status}: {reply.body}")
        return str(reply.body["choices"][0]["text"])

    def answer(self, model: str, prompt: Sequence[int], num_tokens: int, **fields: Any) -> Answer:
        """Return a greedy answer, with what was likeliest. Raises: BenchmarkFailure."""
        fields |= {"max_tokens": num_tokens, "echo": True, "logprobs": 1}
        reply = self.complete(model, prompt, **fields)
        if reply.status != 200:
            raise BenchmarkFailure(f"{model} answered {reply.status}: {reply.body}")
        choice = reply.body["choices"][0]
        held = choice["logprobs"]
        likeliest = [max(top, key=top.__getitem__) for top in held["top_logprobs"][1:]]
        return Answer(choice["text"], held["tokens"], likeliest, held["token_logprobs"][1:])

    def answers(self, asked: Iterable[tuple[str, Sequence[int]]], num_tokens: int) -> list[Answer]:
        """Return several answers that were asked for at one time."""
        asked = list(asked)
        with ThreadPoolExecutor(max(len(asked), 1)) as threads:
            ask = partial(self._answer_one, num_tokens)
            return list(threads.map(ask, asked))

    def _answer_one(self, num_tokens: int, asked: tuple[str, Sequence[int]]) -> Answer:
        return self.answer(*asked, num_tokens)

    def open_stream(self, body: Json) -> "OpenStream":
        """Begin a streamed completion, and return it open when its first piece is there."""
        request = self._client.build_request(
            "POST", "/v1/completions", json={**body, "stream": True}
        )
        response = self._client.send(request, stream=True)
        if response.status_code != 200:
            raise BenchmarkFailure(f"a stream answered {response.status_code}: {response.read()!r}")
        return OpenStream(response)

    def memory(self) -> dict[str, int]:
        """Return bytes by part."""
        parts: dict[str, int] = self.good("GET", "/v1/memory").body["bytes"]
        return parts

    def metrics(self) -> "Metrics":
        """Scrape, when no text from before this call is handed out any more."""
        time.sleep(SCRAPE_AGE_S)
        return Metrics(self.good("GET", "/metrics").body["text"])


class OpenStream:
    """A stream whose first piece has come."""

    def __init__(self, response: httpx.Response) -> None:
        self._response = response
        self._pieces = response.iter_text()
        self._text = next(self._pieces)

    def rest(self) -> str:
        """Read it to its end; return all of it."""
        return self._text + "".join(self._pieces)

    def close(self) -> None:
        """Leave it."""
        self._response.close()


class Metrics:
    """One scrape in Prometheus' text format."""

    def __init__(self, text: str) -> None:
        found = (_SAMPLE.match(line) for line in text.splitlines() if not line.startswith("#"))
        self._samples = [
            (each[1], dict(_LABEL.findall(each[2] or "")), float(each[3])) for each in found if each
        ]

    def total(self, name: str, **labels: str) -> float:
        """Return the sum of the series with this name and these labels; NaN if there is none."""
        values = [
            value
            for its_name, its_labels, value in self._samples
            if its_name == name and labels.items() <= its_labels.items()
        ]
        return sum(values) if values else float("nan")
