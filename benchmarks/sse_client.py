"""A small HTTP/1.1 client for event streams, cheap enough to run beside a server on two cores.

One `EventConnection` is one keep-alive connection with one request at a time. It notes when each
event arrived and leaves reading the events to later. Plain HTTP only, no redirects, no proxies.
"""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

from benchmarks.failure import BenchmarkFailure
from benchmarks.timing import RequestTiming

MAX_LINE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Event:
    """The payload of one `data:` line, and when its bytes arrived."""

    at_s: float
    data: bytes


class EventConnection:
    """One connection to one server, opened at the first request and kept."""

    def __init__(self, url: str, api_key: str | None = None) -> None:
        parts = urlsplit(url)
        if parts.scheme != "http" or not parts.hostname:
            raise BenchmarkFailure(f"{url!r} is no http:// address")
        self._host, self._port = parts.hostname, parts.port or 80
        self._prefix = parts.path.rstrip("/")
        self._authorization = f"Authorization: Bearer {api_key}\r\n" if api_key else ""
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def post(self, path: str, payload: Mapping[str, object]) -> list[Event]:
        """Send JSON and return the events of the answer.

        Raises: BenchmarkFailure on any status but 200, OSError, asyncio.IncompleteReadError.
        """
        reader, status, headers = await self._answer(self._request(path, payload))
        chunks = _chunks(reader, headers)
        if status != 200:
            body = b"".join([chunk async for chunk in chunks])
            raise BenchmarkFailure(
                f"{path} answered {status}: {body[:500].decode(errors='replace')}"
            )
        events = await _read_events(chunks)
        if headers.get("connection", "").lower() == "close" or not _has_end(headers):
            self.close()
        return events

    async def _answer(self, request: bytes) -> tuple[asyncio.StreamReader, int, dict[str, str]]:
        """Send a request and read the head of its answer.

        A server may end a connection that it said it would keep; then a new one is opened, once.
        """
        is_kept = self._streams is not None
        reader, writer = await self._connected()
        writer.write(request)
        try:
            return reader, *await _read_head(reader)
        except (asyncio.IncompleteReadError, ConnectionError) as error:
            if not is_kept or (isinstance(error, asyncio.IncompleteReadError) and error.partial):
                raise
            self.close()
            return await self._answer(request)

    def close(self) -> None:
        """Close the connection; the next request opens another."""
        if self._streams:
            self._streams[1].close()
            self._streams = None

    async def _connected(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        if self._streams is None:
            self._streams = await asyncio.open_connection(
                self._host, self._port, limit=MAX_LINE_BYTES
            )
        return self._streams

    def _request(self, path: str, payload: Mapping[str, object]) -> bytes:
        body = json.dumps(payload).encode()
        head = (
            f"POST {self._prefix}{path} HTTP/1.1\r\nHost: {self._host}:{self._port}\r\n"
            f"{self._authorization}Accept: text/event-stream\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        return head.encode() + body


def timing_of(started_s: float, events: list[Event]) -> RequestTiming:
    """Read the events of one streamed completion.

    Tokens are counted by the server's usage chunk, else by pieces of text.

    Raises: BenchmarkFailure if the stream told of an error or broke off.
    """
    if not events or events[-1].data != b"[DONE]":
        last = events[-1].data.decode(errors="replace") if events else "nothing"
        raise BenchmarkFailure(f"the stream ended without [DONE], after {last[:500]}")
    pieces: list[float] = []
    num_tokens = None
    for event in events[:-1]:
        message = json.loads(event.data)
        if any(choice.get("text") for choice in message.get("choices", ())):
            pieces.append(event.at_s)
        num_tokens = (message.get("usage") or {}).get("completion_tokens", num_tokens)
    count = len(pieces) if num_tokens is None else num_tokens
    return RequestTiming(started_s, tuple(pieces), events[-1].at_s, count)


async def _read_head(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    pairs = (line.partition(":") for line in lines[1:] if line)
    return int(lines[0].split()[1]), {name.lower(): value.strip() for name, _, value in pairs}


async def _chunks(reader: asyncio.StreamReader, headers: Mapping[str, str]) -> AsyncIterator[bytes]:
    """Yield the body as it comes: chunked, of known length, or to the end of the connection."""
    if headers.get("transfer-encoding", "").lower() == "chunked":
        while size := int((await reader.readline()).partition(b";")[0], 16):
            yield (await reader.readexactly(size + 2))[:-2]
        await reader.readuntil(b"\r\n")
    elif "content-length" in headers:
        yield await reader.readexactly(int(headers["content-length"]))
    else:
        while data := await reader.read(65536):
            yield data


def _has_end(headers: Mapping[str, str]) -> bool:
    return "content-length" in headers or "transfer-encoding" in headers


async def _read_events(chunks: AsyncIterator[bytes]) -> list[Event]:
    """Cut the body at empty lines; comments and other fields than `data` are skipped."""
    events: list[Event] = []
    rest = b""
    async for chunk in chunks:
        now = time.perf_counter()
        *whole, rest = (rest + chunk).replace(b"\r\n", b"\n").split(b"\n\n")
        events.extend(Event(now, part[5:].strip()) for part in whole if part.startswith(b"data:"))
    return events
