"""Refuses new work while the server drains; reading goes on, so that probes and people see it."""

from starlette.types import ASGIApp, Receive, Scope, Send

from quickchange_server.api.error_handlers import error_response
from quickchange_server.drain import Drain
from quickchange_server.errors import Unavailable

READING = frozenset({"GET", "HEAD", "OPTIONS"})
RETRY_AFTER_S = 1


class DrainGuard:
    """Counts requests while the server serves, and answers 503 `draining` to new ones after."""

    def __init__(self, app: ASGIApp, drain: Drain) -> None:
        self._app = app
        self._drain = drain

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it and its connection: the next may reach another server."""
        if scope["type"] != "http" or scope["method"] in READING:
            return await self._app(scope, receive, send)
        if self._drain.is_begun:
            return await self._refuse(scope, receive, send)
        with self._drain.accepted():
            return await self._app(scope, receive, send)

    async def _refuse(self, scope: Scope, receive: Receive, send: Send) -> None:
        error = Unavailable(
            "this server is shutting down and takes no new work: send the request again",
            code="draining",
            retry_after_s=RETRY_AFTER_S,
        )
        answer = error_response(error, scope["path"], {"connection": "close"})
        await answer(scope, receive, send)
