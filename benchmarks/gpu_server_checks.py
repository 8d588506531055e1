"""Does a server do what its API promises? Each check asks over HTTP and says what it found.

Knows nothing of devices: the same checks run on a CPU. Names of adapters are those of
`gpu_server_model`; the first eight are uploaded when these checks begin.
"""

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx

from benchmarks.gpu_server_api import Api, Json, Reply
from benchmarks.gpu_server_findings import Check, Outcome
from benchmarks.gpu_server_model import MISSHAPEN, SECOND, UPLOADED
from benchmarks.workload import adapter_name

FIRST, OTHER = adapter_name(0), adapter_name(1)
PROMPT = "time year people way day man thing woman life child world school state family student"
SETTLE_S = 20.0
MIX_TOKENS, MIX_NOISE = 32, 0.1
"""Of a prompt that is scored; what bfloat16 makes of the same sums in another order."""


def largest_difference(some: Sequence[float], others: Sequence[float]) -> float:
    """Return how far the two are apart where they are furthest."""
    return max(abs(one - other) for one, other in zip(some, others, strict=True))


class ApiChecks:
    """Checks against one server with the base's name `base`."""

    def __init__(self, api: Api, base: str, adapters: Mapping[str, Path], *, on_gpu: bool) -> None:
        self._api = api
        self._base = base
        self._adapters = adapters
        self._on_gpu = on_gpu

    def answers(self) -> dict[str, Check]:
        """Return the checks of what requests ask for."""
        return {
            "probes, version, models": self.probes,
            "chat through the template": self.chat,
            "a mix of two adapters": self.mix,
            "a seed gives one answer": self.seed,
            "several choices": self.choices,
            "a stop string ends the text": self.stop_string,
            "log probabilities": self.logprobs,
            "a stream says what a whole answer says": self.stream,
            "the openai client": self.openai,
        }

    def changes(self) -> dict[str, Check]:
        """Return the checks of adapters that come, change and go."""
        return {
            "a version goes live, and back": self.versions,
            "unload gives device memory back": self.unload,
            "pin, and load to the device": self.pin,
            "delete": self.delete,
        }

    def refusals(self) -> dict[str, Check]:
        """Return the checks of what must not work."""
        return {
            "an unknown model": lambda: refused(
                self._api.complete("nobody", PROMPT), 404, "model_not_found"
            ),
            "a prompt that is too long": self.long_prompt,
            "an adapter of another shape": lambda: refused(
                self._upload(MISSHAPEN), 400, "shape_mismatch"
            ),
            "weights that are none": self.garbage,
            "a token id that is none": lambda: refused(
                self._api.complete(self._base, [1 << 30]), 400, "invalid_request"
            ),
            "the server goes on": self.goes_on,
        }

    def ends(self) -> dict[str, Check]:
        """Return the checks of streams that are left, and of what is measured."""
        return {"streams that are left": self.abort, "metrics": self.metrics}

    def probes(self) -> Outcome:
        """All probes answer, and the models are the base and each adapter."""
        for path in ("/livez", "/readyz", "/health", "/version", "/openapi.json"):
            self._api.good("GET", path)
        names = {model["id"] for model in self._api.good("GET", "/v1/models").body["data"]}
        return f"{len(names)} models", {self._base, FIRST, OTHER, f"{FIRST}@default"} <= names

    def chat(self) -> Outcome:
        """A chat answers with as many tokens as asked for."""
        body = {"model": FIRST, "messages": [{"role": "user", "content": PROMPT}], "max_tokens": 8}
        reply = self._api.good("POST", "/v1/chat/completions", json={**body, "temperature": 0})
        usage, choice = reply.body["usage"], reply.body["choices"][0]
        has_text = isinstance(choice["message"]["content"], str)
        return f"{usage['completion_tokens']} tokens", has_text and usage["prompt_tokens"] > 8

    def mix(self) -> Outcome:
        """A mix scores a prompt as none of its parts does, and at weights 1 and 0 as its first."""
        parts = [self._scores(name) for name in (self._base, FIRST, OTHER)]
        mixed, only_first = self._mixed(0.5, 0.5), self._mixed(1.0, 0.0)
        nearest = min(largest_difference(mixed, part) for part in parts)
        own = largest_difference(only_first, parts[1])
        return f"{nearest:.3f} apart; at 1 and 0 {own:.3f}", nearest > 2 * MIX_NOISE > 2 * own

    def _mixed(self, *weights: float) -> list[float]:
        parts = [
            {"model": adapter_name(index), "weight": weight} for index, weight in enumerate(weights)
        ]
        return self._scores(self._base, adapters=parts)

    def _scores(self, model: str, **fields: Any) -> list[float]:
        """Return the log probabilities of a fixed prompt's tokens behind the first."""
        prompt = list(range(5, 5 + MIX_TOKENS))
        return list(self._api.answer(model, prompt, 1, **fields).logprobs)[: MIX_TOKENS - 1]

    def seed(self) -> Outcome:
        """One seed draws the same twice, and another one something else."""
        sampled = {"temperature": 1.5, "max_tokens": 24}
        texts = [self._api.text(OTHER, PROMPT, seed=seed, **sampled) for seed in (1, 1, 2)]
        return f"{len(set(texts))} answers of 2", texts[0] == texts[1] != texts[2]

    def choices(self) -> Outcome:
        """Four sampled choices of one prompt differ."""
        reply = self._api.complete(FIRST, PROMPT, n=4, temperature=1.5, seed=3, max_tokens=24)
        texts = {choice["text"] for choice in reply.body["choices"]}
        return f"{len(texts)} texts of 4", len(texts) == 4 and reply.status == 200

    def stop_string(self) -> Outcome:
        """The text ends where a stop string begins."""
        whole = self._api.text(FIRST, PROMPT, max_tokens=24)
        stop = whole[len(whole) // 2 :][:4]
        reply = self._api.complete(FIRST, PROMPT, max_tokens=24, stop=[stop])
        choice = reply.body["choices"][0]
        is_good = choice["text"] == whole[: whole.find(stop)] and choice["finish_reason"] == "stop"
        return f"{len(choice['text'])} of {len(whole)} characters", is_good

    def logprobs(self) -> Outcome:
        """Greedy tokens are the likeliest ones, and no log probability is above zero."""
        answer = self._api.answer(FIRST, [5, 6, 7, 8], 12)
        is_greedy = list(answer.tokens[4:]) == list(answer.likeliest[3:])
        worst = max(answer.logprobs)
        return f"highest {worst:.3f}", is_greedy and worst <= 0 and len(answer.logprobs) == 15

    def stream(self) -> Outcome:
        """The pieces of a stream are the text, then come usage and the end.

        Asked once before: a prompt whose KV is there already is computed in another step, which in
        half precision may round otherwise.
        """
        body = {"model": OTHER, "prompt": PROMPT, "max_tokens": 16, "temperature": 0}
        self._api.good("POST", "/v1/completions", json={**body, "ignore_eos": True})
        whole = self._api.good("POST", "/v1/completions", json={**body, "ignore_eos": True})
        events = self._events({**body, "ignore_eos": True})
        text = "".join(c["text"] for event in events[:-1] for c in json.loads(event)["choices"])
        is_same = text == whole.body["choices"][0]["text"]
        return f"{len(events)} events", is_same and events[-1] == "[DONE]"

    def _events(self, body: Json) -> list[str]:
        reply = self._api.good("POST", "/v1/completions", json={**body, "stream": True})
        lines = str(reply.body["text"]).splitlines()
        return [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]

    def openai(self) -> Outcome:
        """OpenAI's own client streams a chat, where it is installed."""
        try:
            from openai import OpenAI
        except ImportError as error:
            return f"not tried: {error}", True
        with OpenAI(base_url=f"{self._api.url}/v1", api_key="none", max_retries=0) as client:
            stream = client.chat.completions.create(
                model=OTHER,
                messages=[{"role": "user", "content": PROMPT}],
                max_tokens=8,
                temperature=0,
                stream=True,
            )
            chunks = list(stream)
        return f"{len(chunks)} chunks", chunks[-1].choices[0].finish_reason in ("length", "stop")

    def versions(self) -> Outcome:
        """A second version answers by its number, then by the name, and goes back."""
        before = self._api.text(FIRST, PROMPT)
        reply = self._upload(SECOND, name=FIRST)
        still = self._api.text(FIRST, PROMPT)
        second = self._api.text(f"{FIRST}:2", PROMPT)
        alias = f"/v1/adapters/{FIRST}/aliases/default"
        self._api.good("PUT", alias, json={"version": 2})
        forward = self._api.text(FIRST, PROMPT)
        self._api.good("PUT", alias, json={"version": 1})
        back = self._api.text(FIRST, PROMPT)
        is_good = before == still == back and second == forward and forward != before
        return f"upload {reply.status}, {len({before, second})} answers", is_good

    def unload(self) -> Outcome:
        """Device and host bytes come back, and the next request loads again."""
        before = self._api.text(OTHER, PROMPT)
        held = self._api.memory()
        self._api.good("POST", f"/v1/adapters/{OTHER}/unload", json={})
        freed = self._api.memory()
        pool = held["adapter_pool_used"] - freed["adapter_pool_used"]
        host = held["adapter_host"] - freed["adapter_host"]
        after = self._api.text(OTHER, PROMPT)
        is_good = pool > 0 and host > 0 and before == after
        return f"{pool >> 10} KiB of the pool, {host >> 10} KiB of the host", is_good

    def pin(self) -> Outcome:
        """A pinned version is on the device after it was loaded there."""
        path = f"/v1/adapters/{OTHER}"
        self._api.good("POST", f"{path}/pin", json={})
        self._api.good("POST", f"{path}/load", json={"tier": "device"})
        version = self._api.good("GET", f"{path}/versions/1").body
        self._api.good("POST", f"{path}/unpin", json={})
        return f"tier {version['tier']}", version["tier"] == "device" and version["pinned"]

    def delete(self) -> Outcome:
        """A deleted adapter is unknown, and its bytes came back."""
        before = self._api.memory()["adapter_pool_used"]
        reply = self._upload(UPLOADED)
        self._api.text(UPLOADED, PROMPT)
        used = self._api.memory()["adapter_pool_used"]
        self._api.good("DELETE", f"/v1/adapters/{UPLOADED}")
        gone = self._api.complete(UPLOADED, PROMPT).status
        after = self._api.memory()["adapter_pool_used"]
        is_good = reply.status == 201 and gone == 404 and after == before < used
        return f"{used - after} bytes freed, then {gone}", is_good

    def long_prompt(self) -> Outcome:
        """A prompt beyond the context is refused, and by its own code."""
        limit = self._api.good("GET", "/v1/models").body["data"][0]["max_model_len"]
        return refused(
            self._api.complete(self._base, [5] * (limit + 1)), 400, "context_length_exceeded"
        )

    def garbage(self) -> Outcome:
        """A file that is no safetensors is refused."""
        files = {
            "adapter_config": (self._adapters[FIRST] / "adapter_config.json").read_bytes(),
            "adapter_model": b"PK\x03\x04" + b"no weights" * 100,
        }
        reply = self._api.call("POST", "/v1/adapters", data={"name": "garbage"}, files=files)
        return refused(reply, 400, "weights_not_safetensors")

    def goes_on(self) -> Outcome:
        """After all refusals the base answers."""
        text = self._api.text(self._base, PROMPT)
        return f"{len(text)} characters", bool(text)

    def abort(self) -> Outcome:
        """Eight streams whose clients leave give their rows and blocks back."""
        limit = self._api.good("GET", "/v1/models").body["data"][0]["max_model_len"]
        body = {"model": FIRST, "prompt": PROMPT, "max_tokens": limit // 2, "ignore_eos": True}
        streams = [self._api.open_stream({**body, "seed": seed}) for seed in range(8)]
        running = self._api.metrics().total("quickchange_requests_running")
        for stream in streams:
            stream.close()
        started_s = time.monotonic()
        while time.monotonic() - started_s < SETTLE_S:
            if not self._api.metrics().total("quickchange_requests_running"):
                break
        seconds = time.monotonic() - started_s
        return f"{running:.0f} ran; free after {seconds:.2f} s", running > 0 and seconds < SETTLE_S

    def metrics(self) -> Outcome:
        """What ran was counted, and the device's memory is shown where there is one."""
        seen = self._api.metrics()
        counted = {
            name: seen.total(f"quickchange_{name}", **labels)
            for name, labels in counted_series(on_gpu=self._on_gpu)
        }
        missing = [name for name, value in counted.items() if not value > 0]
        parts = ("device_allocated", "device_reserved", "host_pinned", "adapter_host")
        held = {p: seen.total("quickchange_memory_bytes", part=p) / 2**30 for p in parts}
        sizes = ", ".join(f"{part} {size:.2f}" for part, size in held.items())
        what = f"GiB: {sizes}" if self._on_gpu else "no device"
        ahead = seen.total("quickchange_steps_ahead_total") / seen.total("quickchange_steps_total")
        lacking = f"; nothing counted of {', '.join(missing)}" if missing else ""
        return f"{what}, {100 * ahead:.0f} % of the steps ahead{lacking}", not missing

    def _upload(self, folder: str, name: str | None = None) -> Reply:
        return self._api.upload(name or folder, self._adapters[folder])


def counted_series(*, on_gpu: bool) -> Sequence[tuple[str, Mapping[str, str]]]:
    """Return the series that must be above zero after the checks, with their labels."""
    series: list[tuple[str, Mapping[str, str]]] = [
        ("time_to_first_token_seconds_count", {}),
        ("inter_token_latency_seconds_count", {}),
        ("adapter_load_seconds_count", {}),
        ("generation_tokens_total", {}),
        ("adapters", {"tier": "device"}),
        ("steps_total", {"weights": "base"}),
        ("requests_total", {"outcome": "ok"}),
    ]
    if not on_gpu:
        return series
    device = [("memory_bytes", {"part": "device_allocated"}), ("steps_ahead_total", {})]
    return [*series, *device]


def refused(reply: Reply, status: int, code: str) -> Outcome:
    """Say whether something was refused as it should be."""
    return f"{reply.status} {reply.code}", (reply.status, reply.code) == (status, code)


def is_answering(url: str) -> bool:
    """Whether a server takes connections."""
    try:
        httpx.get(f"{url}/livez", timeout=5)
    except httpx.TransportError:
        return False
    return True
