"""Everything that can go wrong for a caller, as one tree.

`ApiError` and what is below it mirror the server's answers one to one: same names, same statuses,
same codes. The rest never reached the server, or never came back from it whole.

QuickchangeError
├── ArgumentInvalid                  a setting, name or option cannot be sent as it is
│   └── FolderInvalid                a folder does not hold an adapter that can be uploaded
├── FolderNotWritten                 a folder to download into cannot be written
├── HubFetchFailed                   a repository of the Hub was not fetched
├── ConnectionFailed                 no answer: refused, unreachable, broken off
│   └── RequestTimedOut              no answer in time
├── StreamInterrupted                a stream ended before its end was announced
├── AnswerInvalid                    an answer that is not the contract's (a proxy's page, say)
└── ApiError                         the server said no: status, code, param, request_id
    ├── InvalidRequest               400 invalid_request, or a finer code
    │   ├── ContextLengthExceeded    400 context_length_exceeded
    │   └── UploadRefused            400 with `problems`: the bytes are no adapter for this base
    ├── InvalidApiKey                401 invalid_api_key
    ├── Forbidden                    403 forbidden, quota_exceeded
    │   └── ScopeMissing             403 scope_missing
    ├── NotFound                     404 model_not_found, adapter_not_found, …
    ├── MethodNotAllowed             405 method_not_allowed
    ├── TooSlow                      408 upload_too_slow
    │   └── BodyTooSlow              408 body_too_slow
    ├── Conflict                     409 conflict, alias_in_use, merge_budget, …
    ├── PreconditionFailed           412 the ETag has changed
    ├── TooLarge                     413 too_large
    ├── UnsupportedMediaType         415 unsupported_media_type
    ├── QueueFull                    429 queue_full; has retry_after_s
    ├── RateLimited                  429 rate_limited; has retry_after_s
    ├── Unavailable                  503 draining, store_unavailable, …; has retry_after_s
    ├── StorageFull                  507 storage_full: somebody has to make room first
    └── InternalError                500 internal_error
        └── GenerationFailed         500 generation_failed
"""

from dataclasses import dataclass


class QuickchangeError(Exception):
    """Root of the tree."""


class ArgumentInvalid(QuickchangeError, ValueError):
    """What the caller gave cannot be sent; nothing was sent."""


class FolderInvalid(ArgumentInvalid):
    """The folder does not hold an adapter that can be uploaded; nothing was sent."""


class FolderNotWritten(QuickchangeError):
    """The disk did not take what was downloaded; nothing of it is left."""


class HubFetchFailed(QuickchangeError):
    """The Hub is away, has no such thing, or what it has cannot be uploaded; nothing was sent."""


class ConnectionFailed(QuickchangeError):
    """The server could not be reached, or went away before it answered."""


class RequestTimedOut(ConnectionFailed):
    """The server did not answer in time."""


class StreamInterrupted(QuickchangeError):
    """A stream broke off: what came so far is not the whole answer."""


class AnswerInvalid(QuickchangeError):
    """Something answered, but not with what the contract promises."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One reason why an upload is refused: a code, the place it is about, and what to do."""

    code: str
    where: str = ""
    message: str = ""
    hint: str = ""


@dataclass(frozen=True, slots=True)
class ErrorBody:
    """The `error` object of an answer, its `problems`, and what its headers add."""

    message: str
    type: str | None = None
    code: str | None = None
    param: str | None = None
    problems: tuple[Problem, ...] = ()
    status: int | None = None
    request_id: str | None = None
    retry_after_s: float | None = None


class ApiError(QuickchangeError):
    """The server refused or failed.

    Attributes:
        message: what went wrong, which thing, what to do.
        status: HTTP status; None for a failure inside a running stream.
        code: the machine-readable code of the contract.
        type: OpenAI's error type.
        param: the field of the request that caused it, if one did.
        problems: for a refused upload, each reason.
        request_id: what to look for in the server's log.
        retry_after_s: when the server says that it is worth trying again.
    """

    def __init__(self, body: ErrorBody) -> None:
        super().__init__(body.message)
        self.message = body.message
        self.status = body.status
        self.code = body.code
        self.type = body.type
        self.param = body.param
        self.problems = body.problems
        self.request_id = body.request_id
        self.retry_after_s = body.retry_after_s


class InvalidRequest(ApiError):
    """400: the content of the request cannot be served as it stands."""


class ContextLengthExceeded(InvalidRequest):
    """400: prompt and what is to be generated do not fit the context."""


class UploadRefused(InvalidRequest):
    """400: the upload is not an adapter that this base can serve; see `problems`."""


class InvalidApiKey(ApiError):
    """401: no key, or none that the server knows."""


class Forbidden(ApiError):
    """403: the key may not do this."""


class ScopeMissing(Forbidden):
    """403: the key lacks the scope that this call needs."""


class NotFound(ApiError):
    """404: no such thing, or none that this key may see."""


class MethodNotAllowed(ApiError):
    """405: the path is there, and does not do this."""


class TooSlow(ApiError):
    """408: the body came too slowly, so the server did not wait for the rest."""


class BodyTooSlow(TooSlow):
    """408: the same of a body that is no upload."""


class Conflict(ApiError):
    """409: the state of the thing does not allow this now; repeating it will not help."""


class PreconditionFailed(ApiError):
    """412: the adapter has changed since its ETag was read."""


class TooLarge(ApiError):
    """413: the body is larger than a stated limit."""


class UnsupportedMediaType(ApiError):
    """415: the route does not read this content type."""


class QueueFull(ApiError):
    """429: the waiting line is at its ceiling."""


class RateLimited(ApiError):
    """429: the caller comes too often."""


class Unavailable(ApiError):
    """503: not now; later."""


class StorageFull(ApiError):
    """507: there is no room for what was sent, and nothing of it was kept."""


class InternalError(ApiError):
    """500: the server's own mistake."""


class GenerationFailed(InternalError):
    """500: the engine gave up on this request; its neighbours went on."""


_BY_CODE: dict[str, type[ApiError]] = {
    "body_too_slow": BodyTooSlow,
    "context_length_exceeded": ContextLengthExceeded,
    "generation_failed": GenerationFailed,
    "rate_limited": RateLimited,
    "scope_missing": ScopeMissing,
}
_BY_STATUS: dict[int, type[ApiError]] = {
    400: InvalidRequest,
    401: InvalidApiKey,
    403: Forbidden,
    404: NotFound,
    405: MethodNotAllowed,
    408: TooSlow,
    409: Conflict,
    412: PreconditionFailed,
    413: TooLarge,
    415: UnsupportedMediaType,
    429: QueueFull,
    500: InternalError,
    503: Unavailable,
    507: StorageFull,
}


def api_error(body: ErrorBody) -> ApiError:
    """Return the error of the tree that an answer stands for."""
    if body.problems and body.status == 400:
        return UploadRefused(body)
    if body.code in _BY_CODE:
        return _BY_CODE[body.code](body)
    return _BY_STATUS.get(body.status or 500, ApiError)(body)
