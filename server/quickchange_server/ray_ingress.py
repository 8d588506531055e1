"""The Ray application's front: reads a request, chooses an engine by adapter, passes its answer on.

Plain ASGI around a function that calls an engine. It holds no model and no key: the engine's own
app decides about everything. What is decided here is what must be known before a body is read.
"""

import asyncio
import ipaddress
import json
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

from fastapi import FastAPI
from starlette.requests import Request
from starlette.types import Message, Receive, Scope, Send

from quickchange_server.api.app import UPLOAD_PATH
from quickchange_server.api.body_pace import BodyPace
from quickchange_server.api.error_handlers import add_error_handlers
from quickchange_server.api.error_shapes import shape_of
from quickchange_server.api.middleware import BodyLimit
from quickchange_server.api.services import BodyLimits
from quickchange_server.api.streaming import event
from quickchange_server.asgi_call import AsgiCall
from quickchange_server.errors import Forbidden, QuickchangeError

MAX_UPLOADS = 4
"""Uploads that are held in memory at once; others wait for their turn."""
Answering = Callable[[AsgiCall, str], AsyncGenerator[Message]]
"""Calls an engine, one that holds the named adapter if there is one. Raises QuickchangeError."""


class Ingress:
    """An ASGI app that has an engine answer."""

    def __init__(self, answering: Answering, base: str, *, is_public: bool) -> None:
        self._answering = answering
        self._base = base
        self._is_public = is_public
        self._limits = BodyLimits()
        self._uploads = asyncio.Semaphore(MAX_UPLOADS)

    def app(self) -> FastAPI:
        """Return the app with the server's limits of bodies and shapes of errors."""
        app = FastAPI(openapi_url=None, redirect_slashes=False)
        add_error_handlers(app)
        app.router.default = self._forward
        app.add_middleware(BodyLimit, limit=self._limit_of)
        app.add_middleware(BodyPace, pace=self._limits.json_pace, upload_path=UPLOAD_PATH)
        return app

    def _limit_of(self, scope: Scope) -> int:
        return self._limits.upload_bytes if _is_upload(scope) else self._limits.json_bytes

    async def _forward(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        request = Request(scope, receive)
        if not self._is_public:
            check_is_local(request)
        if not _is_upload(scope):
            await self._answer(call_of(request, await request.body()), send)
            return
        refusal = await self._refusal(request)
        if refusal is not None:
            for message in refusal:
                await send(message)
            return
        async with self._uploads:
            body = self._limits.upload_pace.watch(aiter(request.stream()))
            await self._answer(call_of(request, b"".join([part async for part in body])), send)

    async def _refusal(self, request: Request) -> list[Message] | None:
        """Return an engine's answer to a stranger, before a large body is read; else None."""
        headers = [(name, value) for name, value in request.headers.raw if name in _WHO]
        call = AsgiCall("GET", UPLOAD_PATH, b"limit=1", headers, b"", _client(request))
        messages = [message async for message in self._answering(call, "")]
        return messages if messages[0]["status"] == 401 else None

    async def _answer(self, call: AsgiCall, send: Send) -> None:
        is_events = False
        try:
            async with aclosing(self._answering(call, adapter_of(call, self._base))) as messages:
                async for message in messages:
                    if message["type"] == "http.response.start":
                        is_events = _is_events(message)
                    await send(message)
        except QuickchangeError as error:
            if not is_events:
                raise
            lost = event(shape_of(call.path).body(error))
            await send({"type": "http.response.body", "body": lost, "more_body": False})


_WHO = frozenset({b"authorization", b"host", b"origin"})


def check_is_local(request: Request) -> None:
    """Refuse callers from other machines while the settings say that there are none.

    Raises: Forbidden.
    """
    client = request.client
    if client is None or not ipaddress.ip_address(client.host).is_loopback:
        raise Forbidden(
            "this application answers its own machine only: for others, build it with "
            "host=0.0.0.0 and a key (admin_key_file=FILE)"
        )


def call_of(request: Request, body: bytes) -> AsgiCall:
    """Return a request as data, with its path below where the application is mounted."""
    scope = request.scope
    return AsgiCall(
        scope["method"],
        scope["path"].removeprefix(scope.get("root_path", "").rstrip("/")),
        scope.get("query_string", b""),
        [(bytes(name), bytes(value)) for name, value in scope["headers"]],
        body,
        _client(request),
        scope.get("http_version", "1.1"),
    )


def adapter_of(call: AsgiCall, base: str) -> str:
    """Return what a body calls its adapter; empty for the base, and for what names none."""
    if call.method != "POST" or call.path == UPLOAD_PATH or not call.body.lstrip().startswith(b"{"):
        return ""
    try:
        body = json.loads(call.body)
    except (ValueError, RecursionError):
        return ""  # the engine says what is wrong with it
    parameters = body.get("parameters")
    in_parameters = parameters.get("adapter_id") if isinstance(parameters, dict) else None
    name = body.get("model") or in_parameters
    return name if isinstance(name, str) and len(name) <= 256 and name != base else ""


def _client(request: Request) -> tuple[str, int] | None:
    client = request.client
    return None if client is None else (client.host, client.port)


def _is_upload(scope: Scope) -> bool:
    return bool(scope["method"] == "POST" and scope["path"].endswith(UPLOAD_PATH))


def _is_events(start: Message) -> bool:
    headers: dict[bytes, bytes] = dict(start["headers"])
    return headers.get(b"content-type", b"").startswith(b"text/event-stream")
