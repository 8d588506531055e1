"""Uploads that come slowly, stand still, or are too large: refused before they hold anybody up."""

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
from quickchange_server.errors import TooSlow

from tests.server.scripted_adapters import ScriptedAdapters
from tests.server.socket_server import serve_on_socket
from tests.server.upload_forms import KIND, form

PACE = UploadPace(grace_s=1.0, min_bytes_per_s=1e6, max_s=30)
LIMITS = BodyLimits(upload_bytes=100_000, upload_pace=PACE)
BODY = form()


@pytest.fixture
async def server(services: AppServices) -> AsyncIterator[httpx.AsyncClient]:
    async with serve_on_socket(create_app(replace(services, limits=LIMITS))) as client:
        yield client


async def talk(client: httpx.AsyncClient, sent: list[bytes], *headers: str) -> tuple[int, Any]:
    """Send a head and then pieces of a body, one by one; return status and body of the answer."""
    place = urlsplit(str(client.base_url))
    reader, writer = await asyncio.open_connection(place.hostname, place.port)
    lines = ["POST /v1/adapters HTTP/1.1", "host: 127.0.0.1", f"content-type: {KIND}", *headers]
    writer.write("\r\n".join([*lines, "", ""]).encode())
    for piece in sent:
        writer.write(piece)
        await writer.drain()
        await asyncio.sleep(0.005)
    head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 30)
    length = next(line for line in head.lower().split(b"\r\n") if line.startswith(b"content-len"))
    answer = json.loads(await reader.readexactly(int(length.split(b":")[1])))
    writer.close()
    return int(head.split()[1]), answer


async def test_an_upload_that_stands_still_is_refused_and_forgotten(
    server: httpx.AsyncClient, adapters: ScriptedAdapters
) -> None:
    status, answer = await talk(server, [BODY[:-50]], f"content-length: {len(BODY)}")
    assert (status, answer["error"]["code"]) == (408, "upload_too_slow")
    assert answer["problems"][0]["code"] == "upload_too_slow"
    assert adapters.num_discarded == len(adapters.received) == 1  # the config; the other broke off
    assert (await server.get("/livez")).status_code == 200


async def test_an_upload_in_small_pieces_is_read(server: httpx.AsyncClient) -> None:
    pieces = [BODY[start : start + 1000] for start in range(0, len(BODY), 1000)]
    status, _ = await talk(server, pieces, f"content-length: {len(BODY)}")
    assert status == 201


async def test_too_large_is_said_before_the_body_is_sent(
    server: httpx.AsyncClient, adapters: ScriptedAdapters
) -> None:
    status, answer = await talk(server, [], "content-length: 100001", "expect: 100-continue")
    assert (status, answer["error"]["code"]) == (413, "too_large")
    assert adapters.received == {}


async def test_a_body_without_a_length_is_counted(server: httpx.AsyncClient) -> None:
    chunk = b"2710\r\n" + bytes(10_000) + b"\r\n"
    head = b"%x\r\n" % len(BODY[:500]) + BODY[:500] + b"\r\n"
    status, answer = await talk(server, [head, *[chunk] * 12], "transfer-encoding: chunked")
    assert (status, answer["error"]["code"]) == (413, "too_large")


async def watch(sizes: list[int], pause_s: float, pace: UploadPace) -> int:
    async def body() -> AsyncIterator[bytes]:
        for size in sizes:
            await asyncio.sleep(pause_s)
            yield bytes(size)

    return sum([len(chunk) async for chunk in pace.watch(body())])


async def test_what_came_buys_time_and_the_end_comes_for_all() -> None:
    assert PACE.allowed_s(0) == 1.0
    assert PACE.allowed_s(2_000_000) == 3.0
    assert PACE.allowed_s(10**12) == 30
    generous = UploadPace(grace_s=30, min_bytes_per_s=1)
    assert await watch([5] * 20, 0.001, generous) == 100
    for pace in (UploadPace(0.05, 1e9), UploadPace(30, 1, max_s=0.05)):
        with pytest.raises(TooSlow, match="bytes of the body came"):
            await watch([1] * 500, 0.01, pace)
