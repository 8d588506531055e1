"""Everything a user, a file or the network can cause, as one tree.

Each class carries the HTTP status and the `code` of the public contract; the message says what
went wrong, which thing, and what to do.

QuickchangeError                     500 internal_error
├── InvalidRequest                   400 invalid_request (or a finer code)
│   └── ContextLengthExceeded        400 context_length_exceeded
├── InvalidApiKey                    401 invalid_api_key
├── Forbidden                        403 forbidden
│   └── ScopeMissing                 403 scope_missing
├── NotFound                         404 not_found (or per thing: model_not_found, …)
├── MethodNotAllowed                 405 method_not_allowed
├── TooSlow                          408 upload_too_slow
│   └── BodyTooSlow                  408 body_too_slow
├── Conflict                         409 conflict (alias_in_use, merge_budget, …)
├── PreconditionFailed               412 precondition_failed
├── TooLarge                         413 too_large
├── UnsupportedMediaType             415 unsupported_media_type
├── QueueFull                        429 queue_full
├── RateLimited                      429 rate_limited
├── Unavailable                      503 unavailable (draining, store_unavailable, …)
├── StorageFull                      507 storage_full
├── GenerationFailed                 500 generation_failed
└── CannotStart                      never an answer: the process ends with the sentence
    ├── ConfigInvalid                a flag, variable or TOML key is wrong
    ├── BaseUnavailable              the base cannot be fetched, read or held
    └── CannotExport                 an adapter cannot be merged into a folder of its own
        └── CannotWrite              that folder cannot be made
"""

from quickchange_adapters.errors import Problem


class QuickchangeError(Exception):
    """Root of the tree: an answer with a status, a code and a sentence.

    Attributes:
        status: HTTP status.
        type: OpenAI's error type.
        code: the machine-readable code of the contract.
        param: the field of the request that caused it, if one did.
        retry_after_s: sent as `Retry-After` when set.
        problems: every reason why an upload is refused; empty for anything else.
    """

    status = 500
    type = "server_error"
    code = "internal_error"
    retry_after_s: int | None = None
    problems: tuple[Problem, ...] = ()

    def __init__(
        self,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        if code is not None:
            self.code = code
        if retry_after_s is not None:
            self.retry_after_s = retry_after_s


class InvalidRequest(QuickchangeError):
    """The content of a request cannot be served as it stands."""

    status = 400
    type = "invalid_request_error"
    code = "invalid_request"


class ContextLengthExceeded(InvalidRequest):
    """Prompt (and what is to be generated) do not fit the context."""

    code = "context_length_exceeded"


class InvalidApiKey(QuickchangeError):
    """No key, or none that we know."""

    status = 401
    type = "authentication_error"
    code = "invalid_api_key"


class Forbidden(QuickchangeError):
    """The caller is known but may not do this."""

    status = 403
    type = "permission_error"
    code = "forbidden"


class ScopeMissing(Forbidden):
    """The caller's key is good, but not for this."""

    code = "scope_missing"

    def __init__(self, scope: str) -> None:
        super().__init__(
            f"this needs an API key with the scope {scope!r}, which the one that came does not have"
        )
        self.scope = scope


class NotFound(QuickchangeError):
    """No such thing, or none that the caller may see."""

    status = 404
    type = "invalid_request_error"
    code = "not_found"


class MethodNotAllowed(QuickchangeError):
    """The path is known, and not for this method; the message names those it has."""

    status = 405
    type = "invalid_request_error"
    code = "method_not_allowed"


class TooSlow(QuickchangeError):
    """The body came so slowly, or stood still for so long, that the rest is not waited for."""

    status = 408
    type = "invalid_request_error"
    code = "upload_too_slow"


class BodyTooSlow(TooSlow):
    """The same of a body that is no upload."""

    code = "body_too_slow"


class Conflict(QuickchangeError):
    """The state of the thing does not allow this now; repeating it will not help."""

    status = 409
    type = "conflict_error"
    code = "conflict"


class PreconditionFailed(QuickchangeError):
    """The thing was changed since the caller read it."""

    status = 412
    type = "invalid_request_error"
    code = "precondition_failed"


class TooLarge(QuickchangeError):
    """The body is larger than a stated limit."""

    status = 413
    type = "invalid_request_error"
    code = "too_large"


class UnsupportedMediaType(QuickchangeError):
    """The content type is not one that this route reads."""

    status = 415
    type = "invalid_request_error"
    code = "unsupported_media_type"


class QueueFull(QuickchangeError):
    """The waiting line is at its ceiling."""

    status = 429
    type = "rate_limit_error"
    code = "queue_full"
    retry_after_s = 1


class RateLimited(QuickchangeError):
    """The caller comes too often; `Retry-After` says when it may again."""

    status = 429
    type = "rate_limit_error"
    code = "rate_limited"


class Unavailable(QuickchangeError):
    """Not now; later."""

    status = 503
    type = "server_error"
    code = "unavailable"
    retry_after_s = 5


class StorageFull(QuickchangeError):
    """There is no room for what was sent; nothing of it was kept.

    Not 503: trying again by itself helps nobody until somebody made room.
    """

    status = 507
    code = "storage_full"


class GenerationFailed(QuickchangeError):
    """The engine gave up on this request; its neighbours went on."""

    code = "generation_failed"


class CannotStart(QuickchangeError):
    """The server does not start; the command line prints the sentence and exits."""

    code = "cannot_start"
    exit_code = 1


class ConfigInvalid(CannotStart):
    """A setting is unknown, malformed, or contradicts another one."""

    code = "config_invalid"
    exit_code = 2


class BaseUnavailable(CannotStart):
    """The base model cannot be fetched, converted or read."""

    code = "base_unavailable"


class CannotExport(CannotStart):
    """An adapter cannot be merged into a folder of its own."""

    code = "cannot_export"


class CannotWrite(CannotExport):
    """The folder that is to be made cannot be made."""

    code = "cannot_write"
