"""What every request passes, as plain ASGI: id and clock, metrics, guards, key, body limits."""

import logging
import re
import time
import uuid
from collections.abc import Callable, Sequence

from quickchange_adapters.fault_points import reach
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.routing import BaseRoute, Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from quickchange_server.api.auth import OPEN_PATHS, authenticate, check_loopback
from quickchange_server.api.error_handlers import internal_error, note_error, refusal_of
from quickchange_server.errors import QuickchangeError
from quickchange_server.keyring import Keyring
from quickchange_server.metrics import ServerMetrics
from quickchange_server.request_record import RequestObserver, RequestRecord

_SANE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/=+-]{0,127}")
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
UNMATCHED = "_unmatched"
log = logging.getLogger(__name__)
PROBES = frozenset({"/livez", "/readyz", "/health"})


class RequestContext:
    """Give each request an id (a sane incoming one is kept), its time of arrival, and a record.

    The observers get the record when the request is over.
    """

    def __init__(self, app: ASGIApp, observers: Sequence[RequestObserver] = ()) -> None:
        self._app = app
        self._observers = observers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, and send its id back."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        headers = Headers(scope=scope)
        incoming = headers.get("x-request-id", "")
        request_id = incoming if _SANE_ID.fullmatch(incoming) else uuid.uuid4().hex
        state = scope.setdefault("state", {})
        state["request_id"] = request_id
        state["arrival_s"] = arrival_s = time.monotonic()
        state["record"] = record = RequestRecord(
            request_id, scope["method"], scope["path"], headers.get("traceparent", "")
        )

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["x-request-id"] = request_id
                reach("before reply")
            await send(message)
            if message["type"] == "http.response.body" and not message.get("more_body"):
                reach("after reply")

        try:
            return await self._app(scope, receive, send_with_id)
        except Exception:
            note_error(internal_error(), scope)  # it is answered further out, when this is told
            raise
        finally:
            principal = state.get("principal")
            record.tenant = principal.tenant if principal is not None else ""
            record.duration_s = time.monotonic() - arrival_s
            self._tell(record)

    def _tell(self, record: RequestRecord) -> None:
        for observer in self._observers:
            try:
                observer(record)
            except Exception:
                log.exception("an observer of requests failed")


class MistakeAnswer:
    """Answer our own mistakes (500) here, where the answer still gets the headers of the others."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on; what it raises is answered, if nothing was, and raised again."""
        has_begun = False

        async def send_and_note(message: Message) -> None:
            nonlocal has_begun
            has_begun = True
            await send(message)

        try:
            await self._app(scope, receive, send_and_note)
        except Exception:
            if scope["type"] == "http" and not has_begun:
                await refusal_of(internal_error(), scope)(scope, receive, send)
            raise


class HttpMetrics:
    """Count requests by route template, method and status.

    `routes` say what a request asked for that a guard answered before it was routed.
    """

    def __init__(self, app: ASGIApp, metrics: ServerMetrics, routes: Sequence[BaseRoute]) -> None:
        self._app = app
        self._metrics = metrics
        self._routes = routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on and count it when it is over."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        status = 500

        async def send_and_note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, send_and_note)
        finally:
            route = getattr(scope.get("route") or self._asked(scope), "path", UNMATCHED)
            method = scope["method"] if scope["method"] in _METHODS else "_other"
            self._metrics.on_http(route, method, status)
            record: RequestRecord | None = scope.get("state", {}).get("record")
            if record is not None:
                record.route, record.status = route, status

    def _asked(self, scope: Scope) -> BaseRoute | None:
        found = (route for route in self._routes if route.matches(scope)[0] is Match.FULL)
        return next(found, None)


class LoopbackGuard:
    """Refuse other hosts' names and other sites' pages while nobody is asked for a key."""

    def __init__(self, app: ASGIApp, cors_origins: Sequence[str], keyring: Keyring) -> None:
        self._app = app
        self._cors_origins = cors_origins
        self._keyring = keyring

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer 403."""
        if scope["type"] == "http" and self._keyring.is_open:
            try:
                needs_host = not _is_old_probe(scope)
                check_loopback(Headers(scope=scope), self._cors_origins, needs_host=needs_host)
            except QuickchangeError as error:
                return await refusal_of(error, scope)(scope, receive, send)
        return await self._app(scope, receive, send)


def _is_old_probe(scope: Scope) -> bool:
    """Whether a load balancer asks for health in HTTP/1.0, which has no Host; no browser does."""
    return scope["http_version"] == "1.0" and scope["path"] in PROBES


class KeyGuard:
    """Find out who calls, before anything of a body is read; the open paths are for everybody."""

    def __init__(self, app: ASGIApp, keyring: Keyring) -> None:
        self._app = app
        self._keyring = keyring

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on with its caller, or answer 401."""
        if scope["type"] == "http" and scope["path"] not in OPEN_PATHS:
            try:
                principal = authenticate(Headers(scope=scope), self._keyring)
            except QuickchangeError as error:
                return await refusal_of(error, scope)(scope, receive, send)
            scope.setdefault("state", {})["principal"] = principal
        return await self._app(scope, receive, send)


class BodyLimit:
    """Stop reading a body at a limit that depends on the path.

    The route that reads gets the refusal (413), so that it is counted and shaped as its others are.
    """

    def __init__(self, app: ASGIApp, limit: Callable[[Scope], int]) -> None:
        self._app = app
        self._limit = limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on with a counted body."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        limit = self._limit(scope)
        message = f"the body is larger than {limit} bytes, the limit of this route"
        announced = Headers(scope=scope).get("content-length", "")
        is_too_large = announced.isdecimal() and int(announced) > limit
        num_bytes = 0

        async def receive_counted() -> Message:
            nonlocal num_bytes
            if is_too_large:
                raise HTTPException(413, message)
            event = await receive()
            num_bytes += len(event.get("body", b""))
            if num_bytes > limit:
                raise HTTPException(413, message)
            return event

        return await self._app(scope, receive_counted, send)
