"""The benchmark's HTTP client against servers that cut their answers in awkward places."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

import pytest

from benchmarks.failure import BenchmarkFailure
from benchmarks.sse_client import Event, EventConnection, timing_of

CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
BODY = (
    b'data: {"choices":[{"text":"a"}]}\n\n: ping\n\n'
    b'data: {"choices":[{"text":""}]}\r\n\r\ndata: {"choices":[{"text":"b"}]}\n\n'
    b'data: {"choices":[],"usage":{"completion_tokens":3}}\n\ndata: [DONE]\n\n'
)


def chunked(pieces: Sequence[bytes]) -> bytes:
    parts = [b"%x;ext=1\r\n%s\r\n" % (len(piece), piece) for piece in pieces]
    return CHUNKED + b"".join(parts) + b"0\r\n\r\n"


@asynccontextmanager
async def answering(
    answer: bytes, write_size: int = 1 << 16, is_closing: bool = False
) -> AsyncIterator[tuple[str, list[bytes]]]:
    """Serve one fixed answer in writes of a given size; yield the address and the requests."""
    requests: list[bytes] = []

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
                requests.append(head + await reader.readexactly(length))
                for start in range(0, len(answer), write_size):
                    writer.write(answer[start : start + write_size])
                    await writer.drain()
                    await asyncio.sleep(0)
                if is_closing:
                    break
        except asyncio.IncompleteReadError:
            pass
        writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}/root", requests


def payloads(events: list[Event]) -> list[bytes]:
    return [event.data for event in events]


WHOLE = [part[6:].strip() for part in BODY.replace(b"\r", b"").split(b"\n\n") if b"data:" in part]


@pytest.mark.parametrize("write_size", [1, 7, 1 << 16])
@pytest.mark.parametrize(
    "cut", [lambda b: [b], lambda b: [b[i : i + 5] for i in range(0, len(b), 5)]]
)
async def test_events_are_whole_however_they_are_cut(
    write_size: int, cut: Callable[[bytes], list[bytes]]
) -> None:
    async with answering(chunked(cut(BODY)), write_size) as (url, _):
        connection = EventConnection(url)
        assert payloads(await connection.post("/v1/completions", {})) == WHOLE
        assert payloads(await connection.post("/v1/completions", {})) == WHOLE
        connection.close()


async def test_a_stream_may_end_with_its_connection() -> None:
    async with answering(b"HTTP/1.1 200 OK\r\n\r\n" + BODY, is_closing=True) as (url, requests):
        connection = EventConnection(url)
        for _ in range(2):
            assert payloads(await connection.post("/v1/completions", {})) == WHOLE
        assert len(requests) == 2
        connection.close()


async def test_the_request_is_json_under_the_servers_path_with_the_key() -> None:
    async with answering(chunked([BODY])) as (url, requests):
        connection = EventConnection(url, api_key="secret")
        await connection.post("/v1/completions", {"prompt": "é"})
        connection.close()
    head, _, body = requests[0].partition(b"\r\n\r\n")
    assert head.startswith(b"POST /root/v1/completions HTTP/1.1\r\n")
    assert b"Authorization: Bearer secret" in head
    assert json.loads(body) == {"prompt": "é"}


async def test_an_error_status_is_told_with_its_body() -> None:
    answer = b"HTTP/1.1 404 Not Found\r\nContent-Length: 7\r\n\r\nno such"
    async with answering(answer) as (url, _):
        connection = EventConnection(url)
        with pytest.raises(BenchmarkFailure, match="answered 404: no such"):
            await connection.post("/v1/completions", {})
        connection.close()


def test_only_plain_http_addresses_are_taken() -> None:
    with pytest.raises(BenchmarkFailure, match="no http:// address"):
        EventConnection("localhost:8000")


def test_a_completion_is_timed_by_its_text_and_counted_by_its_usage() -> None:
    events = [Event(float(at), data) for at, data in enumerate(WHOLE, start=1)]
    timing = timing_of(0.5, events)
    assert timing.piece_times_s == (1.0, 3.0)
    assert timing.num_tokens == 3
    assert timing.ended_s == 5.0


def test_without_usage_pieces_are_counted() -> None:
    events = [Event(1.0, WHOLE[0]), Event(2.0, WHOLE[0]), Event(3.0, b"[DONE]")]
    assert timing_of(0.0, events).num_tokens == 2


@pytest.mark.parametrize("events", [[], [Event(1.0, b'{"error":{"message":"broken"}}')]])
def test_a_stream_that_breaks_off_is_a_failure(events: list[Event]) -> None:
    with pytest.raises(BenchmarkFailure, match="without \\[DONE\\]"):
        timing_of(0.0, events)


async def test_a_kept_connection_that_the_server_ended_is_opened_again() -> None:
    async with answering(chunked([BODY]), is_closing=True) as (url, requests):
        connection = EventConnection(url)
        first = await connection.post("/v1/completions", {"n": 1})
        second = await connection.post("/v1/completions", {"n": 2})
        assert payloads(first) == payloads(second)
        assert len(requests) == 2
