"""Server-sent events, and noticing that a client has left. Knows no answer's shape."""

import asyncio
import logging
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic_core import to_json
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from quickchange_server.api.answer_format import AnswerFormat
from quickchange_server.api.error_handlers import as_quickchange_error, note_error
from quickchange_server.api.error_shapes import error_body
from quickchange_server.api.generation_session import GenerationSession
from quickchange_server.errors import QuickchangeError

PING = b": ping\n\n"
DONE = b"data: [DONE]\n\n"
_LINE_MARKS = {
    mark.encode(): f"\\u{ord(mark):04x}".encode() for mark in ("\u0085", "\u2028", "\u2029")
}
_log = logging.getLogger(__name__)


def event(data: Mapping[str, Any]) -> bytes:
    """Return one event on one line, also for readers that break lines at Unicode's marks."""
    text = to_json(data, inf_nan_mode="null")
    for mark, escaped in _LINE_MARKS.items():
        text = text.replace(mark, escaped)
    return b"data: " + text + b"\n\n"


async def wait_for_disconnect(receive: Receive) -> None:
    """Return when the client has left; the body must have been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def while_connected(receive: Receive, work: Coroutine[Any, Any, None]) -> None:
    """Do something for a client; when it leaves first, the work is cancelled.

    Raises: ClientDisconnect, and what the work raises.
    """
    working = asyncio.create_task(work)
    leaving = asyncio.create_task(wait_for_disconnect(receive))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.wait((working, leaving))
    working.result()


@dataclass(frozen=True, slots=True)
class StreamShape:
    """How a dialect frames a stream: a usage event or none, what ends it, how it says an error."""

    has_usage: bool = False
    end: bytes = DONE
    failure: Callable[[QuickchangeError], Mapping[str, Any]] = error_body


class EventStream(Response):
    """The answer to a streaming request. Owns the session: it is closed whatever happens.

    An error after the headers becomes an event, and the stream ends without what else ends it.
    """

    def __init__(
        self,
        session: GenerationSession,
        answer: AnswerFormat,
        shape: StreamShape,
        ping_s: float,
        headers: Mapping[str, str],
    ) -> None:
        self.status_code = 200
        self.background = None
        self.media_type = "text/event-stream"
        self.init_headers({"cache-control": "no-cache", "x-accel-buffering": "no", **headers})
        self._session = session
        self._answer = answer
        self._shape = shape
        self._ping_s = ping_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the stream until it ends or the client leaves."""
        tasks = (
            asyncio.create_task(self._send_all(scope, send)),
            asyncio.create_task(wait_for_disconnect(receive)),
        )
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await self._session.close()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _send_all(self, scope: Scope, send: Send) -> None:
        await send(
            {"type": "http.response.start", "status": 200, "headers": list(self.raw_headers)}
        )
        try:
            await self._send_answer(send)
        except OSError:
            return
        except Exception as error:
            told = _told(error)
            note_error(told, scope)
            await _send_bytes(send, event(self._shape.failure(told)))
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send_answer(self, send: Send) -> None:
        while not self._session.is_complete:
            try:
                async with asyncio.timeout(self._ping_s):
                    deltas = await self._session.next_deltas()
            except TimeoutError:
                await _send_bytes(send, PING)
                continue
            chunks = [chunk for delta in deltas for chunk in self._answer.chunks(delta)]
            if chunks:
                await _send_bytes(send, b"".join(map(event, chunks)))
        if self._shape.has_usage:
            await _send_bytes(send, event(self._answer.usage_chunk(self._session.usage)))
        if self._shape.end:
            await _send_bytes(send, self._shape.end)


async def _send_bytes(send: Send, data: bytes) -> None:
    await send({"type": "http.response.body", "body": data, "more_body": True})


def _told(error: Exception) -> QuickchangeError:
    if not isinstance(error, QuickchangeError):
        _log.error("a stream failed", exc_info=error)
    return as_quickchange_error(error)
