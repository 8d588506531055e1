"""Send calls and read answers, plainly or async, with retries. Knows nothing of what calls mean."""

import importlib.metadata
import json
import time
from collections.abc import AsyncIterable, Callable, Iterable, Mapping
from itertools import count
from typing import Any

import anyio
import httpx
from pydantic import ValidationError

from quickchange_client.answer import AnswerMeta, AnswerT
from quickchange_client.call import Call
from quickchange_client.errors import (
    AnswerInvalid,
    ApiError,
    ArgumentInvalid,
    ConnectionFailed,
    ErrorBody,
    Problem,
    QuickchangeError,
    RequestTimedOut,
    api_error,
)
from quickchange_client.multipart import AsyncMultipartBody
from quickchange_client.retry import Outcome, RetryPolicy, retry_after_s
from quickchange_client.settings import Settings

CONNECT_TIMEOUT_S = 5.0
SHOWN_TEXT_CHARS = 200


class Connection:
    """A pool of connections to one server."""

    def __init__(self, http: httpx.Client, retry: RetryPolicy) -> None:
        self._http = http
        self._retry = retry

    @classmethod
    def open(
        cls,
        settings: Settings,
        *,
        timeout_s: float,
        retry: RetryPolicy,
        transport: httpx.BaseTransport | None = None,
    ) -> "Connection":
        """Make the pool; connects at the first call."""
        http = httpx.Client(
            base_url=settings.url,
            headers=_headers(settings),
            timeout=_timeout(timeout_s),
            transport=transport,
        )
        return cls(http, retry)

    def close(self) -> None:
        """Close all connections."""
        self._http.close()

    def send(self, call: Call[AnswerT]) -> AnswerT:
        """Make a call and return its answer. Raises: the tree in `errors`."""
        return read_answer(call.answer, self.exchange(call))

    def exchange(self, call: Call[AnswerT], *, is_stream: bool = False) -> httpx.Response:
        """Return the first successful response, its body unread if it is a stream."""
        for num_tries in count(1):
            outcome = self._try(call, is_stream)
            if isinstance(outcome, httpx.Response) and outcome.is_success:
                return outcome
            wait_s = self._retry.wait_s(outcome, num_tries, call.is_repeatable)
            if wait_s is None:
                raise error_of(outcome)
            time.sleep(wait_s)
        raise AssertionError("count() ended")

    def _try(self, call: Call[AnswerT], is_stream: bool) -> Outcome:
        request = _built(self._http.build_request, call, call.form)
        try:
            response = self._http.send(request, stream=is_stream)
            if not response.is_success:
                response.read()
            return response
        except httpx.TransportError as error:
            return error


class AsyncConnection:
    """A pool of connections to one server, for async code."""

    def __init__(self, http: httpx.AsyncClient, retry: RetryPolicy) -> None:
        self._http = http
        self._retry = retry

    @classmethod
    def open(
        cls,
        settings: Settings,
        *,
        timeout_s: float,
        retry: RetryPolicy,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> "AsyncConnection":
        """Make the pool; connects at the first call."""
        http = httpx.AsyncClient(
            base_url=settings.url,
            headers=_headers(settings),
            timeout=_timeout(timeout_s),
            transport=transport,
        )
        return cls(http, retry)

    async def close(self) -> None:
        """Close all connections."""
        await self._http.aclose()

    async def send(self, call: Call[AnswerT]) -> AnswerT:
        """Make a call and return its answer. Raises: the tree in `errors`."""
        return read_answer(call.answer, await self.exchange(call))

    async def exchange(self, call: Call[AnswerT], *, is_stream: bool = False) -> httpx.Response:
        """Return the first successful response, its body unread if it is a stream."""
        for num_tries in count(1):
            outcome = await self._try(call, is_stream)
            if isinstance(outcome, httpx.Response) and outcome.is_success:
                return outcome
            wait_s = self._retry.wait_s(outcome, num_tries, call.is_repeatable)
            if wait_s is None:
                raise error_of(outcome)
            await anyio.sleep(wait_s)
        raise AssertionError("count() ended")

    async def _try(self, call: Call[AnswerT], is_stream: bool) -> Outcome:
        content = None if call.form is None else AsyncMultipartBody(call.form)
        request = _built(self._http.build_request, call, content)
        try:
            response = await self._http.send(request, stream=is_stream)
            if not response.is_success:
                await response.aread()
            return response
        except httpx.TransportError as error:
            return error


def read_answer(answer: type[AnswerT], response: httpx.Response) -> AnswerT:
    """Read a successful response.

    Raises: AnswerInvalid if it is not what the contract promises.
    """
    try:
        value = answer.model_validate_json(response.content)
    except ValidationError as error:
        raise AnswerInvalid(
            f"{response.url} answered {_shown(response.text)}, which is no {answer.__name__}; "
            "is this address a Quickchange server's?"
        ) from error
    value.set_meta(meta_of(response))
    return value


def meta_of(response: httpx.Response) -> AnswerMeta:
    """Return what a response's status and headers say."""
    return AnswerMeta.read(response.status_code, response.headers)


def error_of(outcome: Outcome) -> QuickchangeError:
    """Return the error of the tree for a response or a failure to get one."""
    if isinstance(outcome, httpx.Response):
        return _answered_error(outcome)
    address = outcome.request.url
    reason = str(outcome) or type(outcome).__name__
    if isinstance(outcome, httpx.TimeoutException) and not isinstance(
        outcome, httpx.ConnectTimeout
    ):
        return RequestTimedOut(f"{address} did not answer in time; a longer timeout_s may help")
    return ConnectionFailed(
        f"cannot talk to {address}: {reason}; is the server running, and its address right "
        "(--url or QUICKCHANGE_URL)?"
    )


def error_from_json(value: Any, **more: Any) -> ApiError | None:
    """Return the error that a JSON value of the contract's form describes; None if it is none."""
    error = value.get("error") if isinstance(value, Mapping) else None
    if not isinstance(error, Mapping) or "message" not in error:
        return None
    body = ErrorBody(
        message=str(error["message"]),
        type=error.get("type"),
        code=error.get("code"),
        param=error.get("param"),
        problems=_problems(value.get("problems")),
        **more,
    )
    return api_error(body)


def _problems(values: Any) -> tuple[Problem, ...]:
    names = ("code", "where", "message", "hint")
    entries = values if isinstance(values, list) else []
    return tuple(
        Problem(*(str(entry.get(name) or "") for name in names))
        for entry in entries
        if isinstance(entry, Mapping)
    )


def _answered_error(response: httpx.Response) -> ApiError:
    more = {
        "status": response.status_code,
        "request_id": response.headers.get("x-request-id"),
        "retry_after_s": retry_after_s(response),
    }
    try:
        value = json.loads(response.content)
    except ValueError:
        value = None
    message = f"{response.url} answered HTTP {response.status_code}: {_shown(response.text)}"
    return error_from_json(value, **more) or api_error(ErrorBody(message, **more))


def _built(
    build: Callable[..., httpx.Request],
    call: Call[AnswerT],
    content: Iterable[bytes] | AsyncIterable[bytes] | None,
) -> httpx.Request:
    """Return the request of a call. Raises: ArgumentInvalid for what no JSON or header can hold."""
    try:
        return build(call.method, call.path, content=content, **_request_options(call))
    except (TypeError, ValueError) as error:
        raise ArgumentInvalid(f"what was given cannot be sent: {error}") from error


def _request_options(call: Call[AnswerT]) -> dict[str, Any]:
    form_headers = {} if call.form is None else call.form.headers
    return {
        "json": call.body,
        "params": dict(call.query) or None,
        "headers": {**form_headers, **call.headers},
    }


def _headers(settings: Settings) -> dict[str, str]:
    headers = {"User-Agent": f"quickchange-client/{_own_version()}"}
    if settings.api_key:
        headers["Authorization"] = f"Bearer {settings.api_key}"
    return headers


def _own_version() -> str:
    try:
        return importlib.metadata.version("quickchange-client")
    except importlib.metadata.PackageNotFoundError:
        return "source"


def _timeout(timeout_s: float) -> httpx.Timeout:
    return httpx.Timeout(timeout_s, connect=min(timeout_s, CONNECT_TIMEOUT_S))


def _shown(text: str) -> str:
    flat = " ".join(text.split())
    return repr(flat if len(flat) <= SHOWN_TEXT_CHARS else flat[:SHOWN_TEXT_CHARS] + "…")
