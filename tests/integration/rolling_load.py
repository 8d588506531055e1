"""People who stream, upload and download through a balancer, and note whatever they lose.

They try again what was refused as `draining`, and nothing else.
"""

import asyncio
import json
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import httpx
import numpy as np
from safetensors.numpy import load_file, save

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MAX_TRIES = 50
RETRY_S = 0.1
PAUSE_S = 0.3
STREAM_TOKENS = (30, 120, 300)


@dataclass
class Load:
    """Steady work against one address until `stop` is set; what went wrong is in `lost`."""

    url: str
    adapter: Path
    models: Mapping[str, str | None]
    """What streams ask for, and the digest that must answer."""
    stop: asyncio.Event = field(default_factory=asyncio.Event)
    done: Counter[str] = field(default_factory=Counter)
    lost: list[str] = field(default_factory=list)
    uploads: dict[str, str] = field(default_factory=dict)
    """Name and digest of each upload that was acknowledged."""

    async def run(self) -> None:
        """Work until `stop`; everybody keeps a connection of their own alive."""
        streams = (self._stream_all(number) for number in range(4))
        await asyncio.gather(*streams, self._upload_all(), self._download_all())

    async def _stream_all(self, number: int) -> None:
        models = list(self.models)
        async with self._client() as client:
            while not self.stop.is_set():
                turn = number + self.done["streams"]
                body: dict[str, object] = {
                    "model": models[turn % len(models)],
                    "prompt": "the quick",
                }
                body |= {"max_tokens": STREAM_TOKENS[turn % len(STREAM_TOKENS)]}
                body |= {"stream": True, "ignore_eos": True, "temperature": 0}
                await self._attempt("streams", partial(self._stream, client, body))

    async def _stream(self, client: httpx.AsyncClient, body: dict[str, object]) -> bool:
        async with client.stream("POST", "/v1/completions", json=body) as answer:
            if answer.status_code != 200:
                await answer.aread()
                return self._is_refused(answer)
            lines = [line async for line in answer.aiter_lines() if line]
        wanted = self.models[str(body["model"])]
        if answer.headers.get("x-quickchange-adapter-digest") != wanted:
            self.lost.append(f"{body['model']} was answered by other bytes")
        chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-1] if line[0] == "d"]
        reason = chunks[-1]["choices"][0]["finish_reason"] if chunks else None
        if lines[-1] != "data: [DONE]" or reason != "length":
            self.lost.append(f"a stream ended with {lines[-1]}, {reason}")
        return False

    async def _upload_all(self) -> None:
        async with self._client() as client:
            while not self.stop.is_set():
                name = f"up-{len(self.uploads)}"
                await self._attempt("uploads", partial(self._upload, client, name))
                await asyncio.sleep(PAUSE_S)

    async def _upload(self, client: httpx.AsyncClient, name: str) -> bool:
        files = {
            "adapter_config": (CONFIG, (self.adapter / CONFIG).read_bytes()),
            "adapter_model": (WEIGHTS, other_weights(self.adapter, len(self.uploads))),
        }
        answer = await client.post("/v1/adapters", data={"name": name}, files=files)
        if answer.status_code == 201:
            self.uploads[name] = answer.json()["digest"]
            return False
        return self._is_refused(answer)

    async def _download_all(self) -> None:
        """Read all the time on one connection, as a page does that polls."""
        name = next(name for name, digest in self.models.items() if digest)
        wanted = (self.adapter / WEIGHTS).stat().st_size
        path = f"/v1/adapters/{name}/versions/1/files/{WEIGHTS}"
        async with self._client() as client:
            while not self.stop.is_set():
                await self._attempt("downloads", partial(self._download, client, path, wanted))
                await asyncio.sleep(PAUSE_S)

    async def _download(self, client: httpx.AsyncClient, path: str, wanted: int) -> bool:
        answer = await client.get(path)
        if answer.status_code != 200 or len(answer.content) != wanted:
            self.lost.append(f"a download: {answer.status_code}, {len(answer.content)} bytes")
        return False

    async def _attempt(self, kind: str, work: Callable[[], Awaitable[bool]]) -> None:
        """Do something until it is not refused any more."""
        for _ in range(MAX_TRIES):
            try:
                if not await work():
                    self.done[kind] += 1
                    return
            except httpx.TransportError as error:
                self.lost.append(f"{kind}: {error!r}")
                return
            self.done["refused"] += 1
            await asyncio.sleep(RETRY_S)
        self.lost.append(f"{kind}: refused {MAX_TRIES} times")

    def _is_refused(self, answer: httpx.Response) -> bool:
        """Return whether to try again: only where a server said that it goes."""
        if answer.status_code == 503 and answer.json()["error"]["code"] == "draining":
            return True
        self.lost.append(f"{answer.request.url.path}: {answer.status_code} {answer.text}")
        return False

    def _client(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(base_url=self.url, timeout=120)


def other_weights(adapter: Path, number: int) -> bytes:
    """Return an adapter's file with other numbers in it."""
    tensors = load_file(adapter / WEIGHTS)
    factor = np.float32(1 + (number + 1) / 1000)
    scaled = {name: tensor * factor for name, tensor in tensors.items()}
    return bytes(save(scaled, {"format": "pt"}))
