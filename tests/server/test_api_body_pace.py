"""JSON bodies that come slowly or stand still are refused; slow answers are not."""

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from quickchange_server.api.app import AppServices, BodyLimits, create_app
from quickchange_server.api.upload_pace import UploadPace

from tests.server.scripted_engine import ScriptedEngine
from tests.server.socket_server import serve_on_socket

PACE = UploadPace(grace_s=0.5, min_bytes_per_s=1e6, max_s=30)
BODY = json.dumps({"model": "tiny", "prompt": "a", "max_tokens": 4}).encode()


@pytest.fixture
async def server(services: AppServices) -> AsyncIterator[httpx.AsyncClient]:
    limits = BodyLimits(json_pace=PACE)
    async with serve_on_socket(create_app(replace(services, limits=limits))) as client:
        yield client


async def send_half(client: httpx.AsyncClient, path: str) -> tuple[int, Any]:
    """Announce a body, send half of it, and wait for the answer."""
    place = urlsplit(str(client.base_url))
    reader, writer = await asyncio.open_connection(place.hostname, place.port)
    lines = [
        f"POST {path} HTTP/1.1",
        "host: 127.0.0.1",
        "content-type: application/json",
        f"content-length: {len(BODY)}",
    ]
    writer.write("\r\n".join([*lines, "", ""]).encode() + BODY[: len(BODY) // 2])
    await writer.drain()
    head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 30)
    length = next(line for line in head.lower().split(b"\r\n") if line.startswith(b"content-len"))
    answer = json.loads(await reader.readexactly(int(length.split(b":")[1])))
    writer.close()
    return int(head.split()[1]), answer


@pytest.mark.parametrize("path", ["/v1/completions", "/tokenize", "/v1/adapters/ada/load"])
async def test_a_body_that_stands_still_is_refused(server: httpx.AsyncClient, path: str) -> None:
    status, answer = await send_half(server, path)
    assert (status, answer["error"]["code"]) == (408, "body_too_slow")
    assert "bytes of the body came" in answer["error"]["message"]
    metrics = (await server.get("/metrics")).text
    is_generation = path == "/v1/completions"
    assert ('requests_total{outcome="rejected"} 1.0' in metrics) == is_generation


async def test_an_answer_may_take_longer_than_a_body(
    server: httpx.AsyncClient, scripted_engine: ScriptedEngine
) -> None:
    scripted_engine.pause_after = 1
    asking = asyncio.create_task(
        server.post("/v1/completions", content=BODY, headers={"content-type": "application/json"})
    )
    await asyncio.sleep(3 * PACE.grace_s)
    assert not asking.done()
    scripted_engine.resume.set()
    assert (await asking).status_code == 200
