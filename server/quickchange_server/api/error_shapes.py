"""An error's status and body, in the shape that the callers of a path read.

OpenAI's shape is everybody's; the paths of TGI and LoRAX have theirs, whose clients tell errors
apart by `error_type`.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from quickchange_server.errors import (
    Conflict,
    GenerationFailed,
    InvalidRequest,
    QueueFull,
    QuickchangeError,
    RateLimited,
    TooLarge,
    Unavailable,
)

Json = dict[str, Any]
GENERATE_PATHS = frozenset({"/", "/generate", "/generate_stream"})
_UNPROCESSABLE = 422
_FAILED_DEPENDENCY = 424


def error_body(error: QuickchangeError) -> Json:
    """Return OpenAI's body of an error; an upload's refusal lists all its problems."""
    body: Json = {
        "error": {
            "message": error.message,
            "type": error.type,
            "param": error.param,
            "code": error.code,
        }
    }
    if error.problems:
        body["problems"] = [asdict(problem) for problem in error.problems]
    return body


def generate_error_body(error: QuickchangeError) -> Json:
    """Return TGI's body of an error. `code` is ours, which its clients pass over."""
    return {"error": error.message, "error_type": _error_type(error), "code": error.code}


def _error_type(error: QuickchangeError) -> str:
    """Return the word by which TGI's clients choose an exception; others go by the status."""
    if isinstance(error, InvalidRequest | TooLarge):
        return "validation"
    if isinstance(error, QueueFull | RateLimited | Unavailable):
        return "overloaded"
    if isinstance(error, GenerationFailed | Conflict):
        return "generation"
    return error.code


def _own_status(error: QuickchangeError) -> int:
    return error.status


def _generate_status(error: QuickchangeError) -> int:
    """Return TGI's status: 422 for what cannot be served as it stands, 424 for a failed answer."""
    if error.status == InvalidRequest.status:
        return _UNPROCESSABLE
    return _FAILED_DEPENDENCY if isinstance(error, GenerationFailed) else error.status


@dataclass(frozen=True, slots=True)
class ErrorShape:
    """What a dialect makes of an error."""

    status: Callable[[QuickchangeError], int]
    body: Callable[[QuickchangeError], Json]


OPENAI = ErrorShape(_own_status, error_body)
GENERATE = ErrorShape(_generate_status, generate_error_body)


def shape_of(path: str) -> ErrorShape:
    """Return the shape of the errors on a path."""
    return GENERATE if path in GENERATE_PATHS else OPENAI
