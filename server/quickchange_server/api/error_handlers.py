"""Every error in the shape of the path that was asked; never FastAPI's `detail`."""

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.routing import Match
from starlette.types import Scope

from quickchange_server.api.error_shapes import shape_of
from quickchange_server.errors import (
    BodyTooSlow,
    Conflict,
    Forbidden,
    GenerationFailed,
    InvalidApiKey,
    InvalidRequest,
    MethodNotAllowed,
    NotFound,
    QuickchangeError,
    StorageFull,
    TooLarge,
    TooSlow,
    UnsupportedMediaType,
)
from quickchange_server.request_record import RequestRecord

Json = dict[str, Any]
CLIENT_LEFT = 499
MAX_SHOWN_ERRORS = 5
MAX_SHOWN_CHARS = 60
_METHODS = ("DELETE", "GET", "HEAD", "PATCH", "POST", "PUT")
_BY_STATUS: dict[int, type[QuickchangeError]] = {
    400: InvalidRequest,
    403: Forbidden,
    404: NotFound,
    408: BodyTooSlow,
    413: TooLarge,
    415: UnsupportedMediaType,
}


def error_response(
    error: QuickchangeError, path: str, headers: Mapping[str, str] | None = None
) -> Response:
    """Return the answer that an error is on a path."""
    shape = shape_of(path)
    sent = dict(headers or {})
    if error.retry_after_s is not None:
        sent["retry-after"] = str(error.retry_after_s)
    if isinstance(error, TooSlow):
        sent["connection"] = "close"  # the rest of the body is not read
    if isinstance(error, Conflict | GenerationFailed | StorageFull):
        sent["x-should-retry"] = "false"
    if isinstance(error, InvalidApiKey):
        sent["www-authenticate"] = "Bearer"
    text = json.dumps(shape.body(error))
    return Response(text, shape.status(error), sent, media_type="application/json")


def internal_error() -> QuickchangeError:
    """Return what a caller is told of our own mistake: nothing of its text."""
    return QuickchangeError("the server made a mistake; its log has the details")


def as_quickchange_error(error: Exception) -> QuickchangeError:
    """Return the error of our tree that stands for any other."""
    return error if isinstance(error, QuickchangeError) else internal_error()


def add_error_handlers(app: FastAPI) -> None:
    """Make an app answer every error in the contract's shape."""
    app.add_exception_handler(QuickchangeError, _on_known)
    app.add_exception_handler(RequestValidationError, _on_invalid)
    app.add_exception_handler(HTTPException, _on_http)
    app.add_exception_handler(ClientDisconnect, _on_left)
    app.add_exception_handler(Exception, _on_mistake)


def refusal_of(
    error: QuickchangeError, scope: Scope, headers: Mapping[str, str] | None = None
) -> Response:
    """Return an error's answer to a request, and note its code in the request's record."""
    note_error(error, scope)
    return error_response(error, scope["path"], headers)


def note_error(error: QuickchangeError, scope: Scope) -> None:
    """Note an error's code in the request's record, for the log and for traces."""
    record: RequestRecord | None = scope.get("state", {}).get("record")
    if record is not None:
        record.error_code = error.code


def _answer(
    error: QuickchangeError, request: Request, headers: Mapping[str, str] | None = None
) -> Response:
    return refusal_of(error, request.scope, headers)


async def _on_known(request: Request, error: Exception) -> Response:
    return _answer(as_quickchange_error(error), request)


async def _on_left(request: Request, error: Exception) -> Response:
    return Response(status_code=CLIENT_LEFT)


async def _on_mistake(request: Request, error: Exception) -> Response:
    """Answer from outside of our middleware, so name the request here."""
    request_id = getattr(request.state, "request_id", "")
    return _answer(internal_error(), request, {"x-request-id": request_id})


async def _on_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if isinstance(error.__cause__, ClientDisconnect):
        return await _on_left(request, error.__cause__)
    headers = error.headers
    if error.status_code == 405:
        headers = {"allow": ", ".join(_methods_of(request))}
    return _answer(_meant(request, error), request, headers)


def _meant(request: Request, error: HTTPException) -> QuickchangeError:
    """Return the error of our tree for one of the framework's."""
    path = _path(request)[:200]
    if error.status_code == 405:
        allowed = ", ".join(_methods_of(request))
        return MethodNotAllowed(f"{request.method} is not allowed on {path}; use {allowed}")
    if error.status_code == 404:
        return NotFound(f"there is no route {request.method} {path}")
    if _is_unread_json(error):
        why = _why_unread(error.__cause__)
        return InvalidRequest(f"the body is not JSON: {why}", code="invalid_json")
    kind = _BY_STATUS.get(error.status_code, QuickchangeError)
    answer = kind(str(error.detail))
    answer.status = error.status_code
    return answer


def _path(request: Request) -> str:
    path: str = request.scope["path"]
    return path


def _methods_of(request: Request) -> list[str]:
    """Return what a path can be asked for; the router names only what its first route takes."""
    return [method for method in _METHODS if _is_routed(request, method)]


def _is_routed(request: Request, method: str) -> bool:
    scope = {**request.scope, "method": method}
    return any(route.matches(scope)[0] is Match.FULL for route in request.app.routes)


def _is_unread_json(error: HTTPException) -> bool:
    """Whether FastAPI's reading of a body failed; what it says itself tells nobody why."""
    return error.status_code == 400 and isinstance(error.__cause__, ValueError | RecursionError)


def _why_unread(cause: BaseException | None) -> str:
    if isinstance(cause, UnicodeDecodeError):
        return f"it is not {cause.encoding.upper()} at byte {cause.start}"
    if isinstance(cause, RecursionError):
        return "it is nested too deeply"
    return f"a number in it has more than {sys.get_int_max_str_digits()} digits"


async def _on_invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    content_type = request.headers.get("content-type", "")
    problems = error.errors()
    is_unread = any(p["loc"] == ("body",) and p["type"] != "missing" for p in problems)
    if is_unread and "json" not in content_type:
        return _answer(
            UnsupportedMediaType(
                f"the content type {content_type[:80]!r} is not read here; "
                "send Content-Type: application/json"
            ),
            request,
        )
    return _answer(invalid_request(problems), request)


def invalid_request(problems: Sequence[Mapping[str, Any]]) -> InvalidRequest:
    """Return one error for what pydantic found; `param` is the first field."""
    first = problems[0]
    if first["type"] == "json_invalid":
        why = first.get("ctx", {}).get("error", "it cannot be read")
        return InvalidRequest(f"the body is not JSON: {why}", code="invalid_json")
    sentences = dict.fromkeys(map(_sentence, problems))
    message = "; ".join(list(sentences)[:MAX_SHOWN_ERRORS])
    return InvalidRequest(message, param=_field(first["loc"]) or None)


def _sentence(problem: Mapping[str, Any]) -> str:
    field = _field(problem["loc"]) or "the body"
    if problem["type"] == "missing":
        return f"{field}: is missing"
    message = str(problem["msg"]).removeprefix("Value error, ")
    value = problem.get("input")
    if isinstance(value, int | float | str) and len(repr(value)) <= MAX_SHOWN_CHARS:
        return f"{field}: {message}, not {value!r}"
    return f"{field}: {message}"


def _field(location: Sequence[str | int]) -> str:
    """Spell a place as in `messages[0].content`."""
    text = ""
    for part in location:
        if part in ("body", "query", "path", "header") and not text:
            continue
        text += f"[{part}]" if isinstance(part, int) else f".{part}"
    return text.lstrip(".")[:200]
