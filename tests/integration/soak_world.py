"""What a soak does: an HTTP client of three tenants, and which bytes each name may mean."""

import asyncio
import json
import math
import random
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from tests.integration.soak_oracle import MIX_WEIGHT, NUM_TOKENS, Oracle

TENANTS = ("default", "acme", "zeta")
NAMES = ("ada", "bob", "cid")
ALIASES = ("default", "canary")
VERBS = ("load", "unload", "pin", "unpin", "merge", "unmerge", "disable", "enable")
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
DIGEST = "x-quickchange-adapter-digest"
REFUSALS: dict[str, dict[int, set[str] | None]] = {
    "ask": {404: None, 409: None, 429: {"queue_full"}, 503: {"adapter_memory", "unavailable"}},
    "upload": {409: None},
    "state": {404: None, 409: None, 503: {"adapter_memory", "unavailable"}},
    "change": {404: None, 409: None},
}
"""By kind of action: the statuses that may come, and their codes where only some may."""


@dataclass(slots=True)
class Meaning:
    """A digest that a model string may mean, from when a change began until one was answered."""

    digest: str
    begun_s: float
    ended_s: float = math.inf


@dataclass
class World:
    """The server under test as three tenants see it, and what has been done to it."""

    client: httpx.AsyncClient
    keys: dict[str, str]
    folders: list[Path]
    oracle: Oracle
    rng: random.Random
    counts: Counter[str] = field(default_factory=Counter)
    log: deque[str] = field(default_factory=lambda: deque(maxlen=60))
    index_of: dict[str, int] = field(default_factory=dict)
    meanings: dict[tuple[str, str], list[Meaning]] = field(default_factory=dict)
    locks: dict[tuple[str, str], asyncio.Lock] = field(default_factory=dict)

    async def work(self, deadline_s: float) -> None:
        """Do one thing after another until the time is over."""
        while time.monotonic() < deadline_s:
            await self.act()

    async def act(self) -> None:
        """Do one thing by chance; what it was and how it ended goes into the log."""
        actions: list[Callable[[str, str], Awaitable[str]]] = [
            *([self.ask] * 20 + [self.ask_stream] * 8 + [self.ask_mix] * 4 + [self.ask_base] * 3),
            *([self.leave] * 6 + [self.set_state] * 14 + [self.upload] * 4),
            *([self.move_alias] * 4 + [self.delete_version] * 2 + [self.delete] * 1),
        ]
        action = self.rng.choice(actions)
        tenant, name = self.rng.choice(TENANTS), self.rng.choice(NAMES)
        what = f"{action.__name__} {tenant}/{name}"
        try:
            outcome = await action(tenant, name)
        except BaseException:
            self.log.append(f"{what}: failed")
            raise
        self.log.append(f"{what}: {outcome}")
        self.counts[f"{action.__name__} {outcome.split()[-1]}"] += 1

    async def call(self, tenant: str, method: str, path: str, **content: Any) -> httpx.Response:
        """Send a request with a tenant's key."""
        headers = {"authorization": f"Bearer {self.keys[tenant]}"}
        return await self.client.request(method, path, headers=headers, **content)

    def outcome(self, kind: str, answer: httpx.Response) -> str:
        """Name how an action ended. AssertionError if it may not end like this."""
        if answer.status_code < 300:
            return str(answer.status_code)
        allowed = REFUSALS[kind]
        code: str = answer.json()["error"]["code"]
        assert answer.status_code in allowed, (answer.request.url, answer.text)
        codes = allowed[answer.status_code]
        assert codes is None or code in codes, (answer.request.url, answer.text)
        assert answer.status_code not in (429, 503) or "retry-after" in answer.headers
        return code

    async def ask(self, tenant: str, name: str) -> str:
        """Ask for an adapter, under its name or an alias, whole."""
        model = self._model(name)
        prompt, begun_s = self._prompt(), time.monotonic()
        body = self._body(model, prompt)
        answer = await self.call(tenant, "POST", "/v1/completions", json=body)
        if answer.status_code == 200:
            self._check(tenant, [model], prompt, begun_s, answer.headers, answer.json())
        return self.outcome("ask", answer)

    async def ask_stream(self, tenant: str, name: str) -> str:
        """Ask for an adapter as a stream, to its end."""
        model = self._model(name)
        prompt, begun_s = self._prompt(), time.monotonic()
        body = {**self._body(model, prompt), "stream": True}
        async with self._stream(tenant, body) as answer:
            if answer.status_code != 200:
                await answer.aread()
                return self.outcome("ask", answer)
            lines = [line async for line in answer.aiter_lines() if line.startswith("data: ")]
        assert lines.pop() == "data: [DONE]", lines[-1:]
        for line in lines:
            chunk = json.loads(line.removeprefix("data: "))
            assert "error" not in chunk, chunk
        chunks = [json.loads(line.removeprefix("data: ")) for line in lines]
        tokens = [token for chunk in chunks for token in tokens_of(chunk)]
        self._check_tokens(tenant, [model], prompt, begun_s, answer.headers, tokens)
        return "200"

    async def ask_mix(self, tenant: str, name: str) -> str:
        """Ask for two adapters at half weight each."""
        other = self.rng.choice([each for each in NAMES if each != name])
        body = self._body("tiny", 0)
        models, begun_s = [name, other], time.monotonic()
        body["adapters"] = [{"model": model, "weight": MIX_WEIGHT} for model in models]
        answer = await self.call(tenant, "POST", "/v1/completions", json=body)
        if answer.status_code == 200 and not self._is_same_twice(answer):
            self._check(tenant, models, 0, begun_s, answer.headers, answer.json())
        return self.outcome("ask", answer)

    def _is_same_twice(self, answer: httpx.Response) -> bool:
        first, second = answer.headers[DIGEST].split(",")
        return first == second

    async def ask_base(self, tenant: str, name: str) -> str:
        """Ask for the base: no adapter shows in its answer."""
        prompt = self._prompt()
        answer = await self.call(tenant, "POST", "/v1/completions", json=self._body("tiny", prompt))
        if answer.status_code == 200:
            self.oracle.check((), prompt, tokens_of(answer.json()))
        return self.outcome("ask", answer)

    async def leave(self, tenant: str, name: str) -> str:
        """Begin a long stream and leave in its midst."""
        body = {**self._body(self._model(name), self._prompt()), "stream": True}
        body["max_tokens"] = 200
        async with self._stream(tenant, body) as answer:
            if answer.status_code != 200:
                await answer.aread()
                return self.outcome("ask", answer)
            num_lines = self.rng.randint(1, 12)
            async for _ in answer.aiter_lines():
                num_lines -= 1
                if not num_lines:
                    break
        return "left"

    async def set_state(self, tenant: str, name: str) -> str:
        """Load, unload, pin, merge, disable an adapter, or undo that."""
        verb = self.rng.choice([*VERBS, "enable", "unpin", "unmerge"])
        content: dict[str, Any] = {}
        if verb == "load":
            content["json"] = {"tier": self.rng.choice(["host", "device"])}
        answer = await self.call(tenant, "POST", f"/v1/adapters/{name}/{verb}", **content)
        return f"{verb} {self.outcome('state', answer)}"

    async def upload(self, tenant: str, name: str) -> str:
        """Upload one of the adapters, perhaps as what the name means from now on."""
        index = self.rng.randrange(len(self.folders))
        fields = {"name": name}
        alias = self.rng.choice(["", *ALIASES])
        if alias:
            fields["alias"] = alias
        files = {part: (self.folders[index] / part).read_bytes() for part in (CONFIG, WEIGHTS)}
        parts = {part.partition(".")[0]: data for part, data in files.items()}
        async with self._lock(tenant, name):
            begun_s = time.monotonic()
            path = "/v1/adapters"
            answer = await self.call(tenant, "POST", path, data=fields, files=parts)
            if answer.status_code < 300:
                self.index_of[answer.json()["digest"]] = index
            await self._look(tenant, name, begun_s)
        return self.outcome("upload", answer)

    async def move_alias(self, tenant: str, name: str) -> str:
        """Let an alias mean another version."""
        async with self._lock(tenant, name):
            begun_s = time.monotonic()
            digests = await self._look(tenant, name, begun_s)
            if not digests:
                return "nothing"
            alias, number = self.rng.choice(ALIASES), self.rng.choice(list(digests))
            path, body = f"/v1/adapters/{name}/aliases/{alias}", {"version": number}
            answer = await self.call(tenant, "PUT", path, json=body)
            await self._look(tenant, name, begun_s)
        return self.outcome("change", answer)

    async def delete_version(self, tenant: str, name: str) -> str:
        """Delete one version, if no alias means it."""
        async with self._lock(tenant, name):
            digests = await self._look(tenant, name, time.monotonic())
            if not digests:
                return "nothing"
            number = self.rng.choice(list(digests))
            path = f"/v1/adapters/{name}/versions/{number}?timeout_s=5"
            answer = await self.call(tenant, "DELETE", path)
        return self.outcome("change", answer)

    async def delete(self, tenant: str, name: str) -> str:
        """Delete an adapter with all its versions."""
        async with self._lock(tenant, name):
            begun_s = time.monotonic()
            answer = await self.call(tenant, "DELETE", f"/v1/adapters/{name}?timeout_s=5")
            await self._look(tenant, name, begun_s)
        return self.outcome("change", answer)

    async def _look(self, tenant: str, name: str, begun_s: float) -> dict[int, str]:
        """Take note of what aliases mean since a change began; return digests by version."""
        answer = await self.call(tenant, "GET", f"/v1/adapters/{name}")
        shown = answer.json() if answer.status_code == 200 else {"aliases": {}, "versions": []}
        digests = {each["version"]: each["digest"] for each in shown["versions"]}
        for alias in ALIASES:
            digest = digests.get(shown["aliases"].get(alias))
            meanings = self.meanings.setdefault((tenant, f"{name}@{alias}"), [])
            if meanings and meanings[-1].digest == digest and meanings[-1].ended_s == math.inf:
                continue
            if meanings:
                meanings[-1].ended_s = min(meanings[-1].ended_s, time.monotonic())
            if digest is not None:
                meanings.append(Meaning(digest, begun_s))
            del meanings[:-8]
        return digests

    def _lock(self, tenant: str, name: str) -> asyncio.Lock:
        """Changes of one name come one after another, so that their order is known here."""
        return self.locks.setdefault((tenant, name), asyncio.Lock())

    def _model(self, name: str) -> str:
        return name if self.rng.random() < 0.7 else f"{name}@{self.rng.choice(ALIASES)}"

    def _prompt(self) -> int:
        return self.rng.randrange(len(self.oracle.prompts))

    def _body(self, model: str, prompt: int) -> dict[str, Any]:
        return {
            "model": model,
            "prompt": list(self.oracle.prompts[prompt]),
            "temperature": 0,
            "max_tokens": self.rng.randint(1, NUM_TOKENS),
            "ignore_eos": True,
            "logprobs": 0,
        }

    def _stream(self, tenant: str, body: dict[str, Any]) -> Any:
        headers = {"authorization": f"Bearer {self.keys[tenant]}"}
        return self.client.stream("POST", "/v1/completions", json=body, headers=headers)

    def _check(
        self,
        tenant: str,
        models: list[str],
        prompt: int,
        begun_s: float,
        headers: httpx.Headers,
        body: Any,
    ) -> None:
        self._check_tokens(tenant, models, prompt, begun_s, headers, tokens_of(body))

    def _check_tokens(
        self,
        tenant: str,
        models: list[str],
        prompt: int,
        begun_s: float,
        headers: httpx.Headers,
        tokens: list[str],
    ) -> None:
        """Assert that each digest is one that its model string meant, and the oracle's answer."""
        now, digests = time.monotonic(), headers[DIGEST].split(",")
        for model, digest in zip(models, digests, strict=True):
            alias = model if "@" in model else f"{model}@default"
            meanings = self.meanings.get((tenant, alias), [])
            meant = [m.digest for m in meanings if m.begun_s <= now and m.ended_s >= begun_s]
            # what an upload under way may have made it mean is noted when it is answered
            assert digest in meant or self._lock(tenant, model.split("@")[0]).locked(), (
                model,
                digest,
                meant,
            )
        mix = [self.index_of[digest] for digest in digests if digest in self.index_of]
        if len(mix) == len(digests):
            self.oracle.check(mix, prompt, tokens)


def tokens_of(body: Any) -> list[str]:
    """Return the tokens that a completion, or a chunk of one, names."""
    logprobs = body["choices"][0]["logprobs"] if body["choices"] else None
    return [] if logprobs is None else list(logprobs["tokens"])
