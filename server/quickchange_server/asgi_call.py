"""A request as plain data, and an ASGI app's answer to it as a stream of messages.

For whoever calls an app in this process on behalf of a connection in another one. Knows no Ray.
"""

import asyncio
from collections.abc import AsyncGenerator, Iterable, Iterator, MutableMapping
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from starlette.types import ASGIApp, Message

Address = tuple[str, int]
Headers = list[tuple[bytes, bytes]]
MAX_WAITING = 64
"""Messages that an app may be ahead of its reader."""


@dataclass(frozen=True, slots=True)
class AsgiCall:
    """What is told of a request. The body is whole."""

    method: str
    path: str
    query: bytes
    headers: Headers
    body: bytes
    client: Address | None = None
    http_version: str = "1.1"

    def scope(self) -> MutableMapping[str, Any]:
        """Return what an app is called with."""
        return {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": self.http_version,
            "method": self.method,
            "scheme": "http",
            "path": self.path,
            "raw_path": self.path.encode(),
            "query_string": self.query,
            "root_path": "",
            "headers": self.headers,
            "client": self.client,
            "server": None,
            "state": {},
        }


class AnsweringApp:
    """One call of an app, in a task of its own. `messages` may be left early: the app is told."""

    def __init__(self, app: ASGIApp, call: AsgiCall) -> None:
        self._app = app
        self._body: bytes | None = call.body
        self._scope = call.scope()
        self._has_left = asyncio.Event()
        self._messages: asyncio.Queue[Message | None] = asyncio.Queue(MAX_WAITING)

    async def messages(self) -> AsyncGenerator[Message]:
        """Yield what the app sends, as it sends it; what has come together is joined.

        Raises: whatever the app raises.
        """
        task = asyncio.create_task(self._run())
        _running.add(task)
        task.add_done_callback(_running.discard)
        is_over = False
        try:
            while not is_over:
                found = [await self._messages.get()]
                while not self._messages.empty():
                    found.append(self._messages.get_nowait())
                is_over = found[-1] is None
                for message in joined(message for message in found if message is not None):
                    yield message
            await task
        finally:
            self._leave()

    async def _run(self) -> None:
        try:
            await self._app(self._scope, self._receive, self._send)
        finally:
            if not self._has_left.is_set():
                await self._messages.put(None)

    async def _receive(self) -> Message:
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        await self._has_left.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Message) -> None:
        if not self._has_left.is_set():
            await self._messages.put(message)

    def _leave(self) -> None:
        """Tell the app that nobody reads any more, and let it go on to its end."""
        self._has_left.set()
        while not self._messages.empty():
            self._messages.get_nowait()


def joined(messages: Iterable[Message]) -> Iterator[Message]:
    """Yield messages with those of a body that follow each other as one."""
    for kind, group in groupby(messages, lambda message: message["type"]):
        if kind != "http.response.body":
            yield from group
            continue
        parts = list(group)
        body = b"".join(part.get("body", b"") for part in parts)
        yield {**parts[-1], "body": body}


_running: set[asyncio.Task[None]] = set()
"""Calls that nobody waits for any more are kept from the garbage collector."""
