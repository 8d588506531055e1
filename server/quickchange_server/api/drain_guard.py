"""Refuses new work while the server drains; reading goes on, so that probes and people see it."""

import asyncio
from contextlib import suppress

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from quickchange_server.api.error_handlers import refusal_of
from quickchange_server.drain import Drain
from quickchange_server.errors import Unavailable

READING = frozenset({"GET", "HEAD", "OPTIONS"})
RETRY_AFTER_S = 1
LINGER_S = 5.0
"""How long the body of what is refused is read and dropped. A connection that is closed over unread
bytes is reset, and a caller who still sends would lose the answer."""


class DrainGuard:
    """Counts requests, downloads too, and answers 503 `draining` to new work once a drain began."""

    def __init__(self, app: ASGIApp, drain: Drain) -> None:
        self._app = app
        self._drain = drain

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        if self._drain.is_begun and scope["method"] not in READING:
            return await self._refuse(scope, receive, send)
        with self._drain.accepted():
            return await self._app(scope, receive, send)

    async def _refuse(self, scope: Scope, receive: Receive, send: Send) -> None:
        error = Unavailable(
            "this server is shutting down and takes no new work: send the request again",
            code="draining",
            retry_after_s=RETRY_AFTER_S,
        )

        async def send_and_linger(message: Message) -> None:
            if message["type"] == "http.response.body":
                await send({**message, "more_body": True})
                await _drop_body(receive)
                message = {"type": "http.response.body", "body": b""}
            await send(message)

        await refusal_of(error, scope)(scope, receive, send_and_linger)


class DrainParting:
    """Ends the connection with every answer once a drain began, whoever gave that answer.

    The caller's next connection may reach another server.
    """

    def __init__(self, app: ASGIApp, drain: Drain) -> None:
        self._app = app
        self._drain = drain

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on."""

        async def send_and_part(message: Message) -> None:
            if message["type"] == "http.response.start" and self._drain.is_begun:
                MutableHeaders(scope=message)["connection"] = "close"
            await send(message)

        await self._app(scope, receive, send_and_part)


async def _drop_body(receive: Receive) -> None:
    with suppress(TimeoutError):
        async with asyncio.timeout(LINGER_S):
            while (await receive()).get("more_body"):
                pass
