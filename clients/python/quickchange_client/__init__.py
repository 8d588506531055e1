"""Python client of the Quickchange server.

    from quickchange_client import Quickchange

    with Quickchange() as client:
        print(client.chat("sentiment", "A wonderful film.").text)

`Quickchange` and `AsyncQuickchange` offer the same; `errors` draws what can go wrong as a tree.
"""

from quickchange_client.adapter import (
    Adapter,
    AdapterAction,
    AdapterConfig,
    AdapterDeletion,
    AdapterEvent,
    AdapterPage,
    AdapterReport,
    AdapterVersion,
)
from quickchange_client.api_key import ApiKey, ApiKeyPage, NewApiKey
from quickchange_client.async_client import AsyncQuickchange
from quickchange_client.client import Quickchange
from quickchange_client.errors import (
    AnswerInvalid,
    ApiError,
    ArgumentInvalid,
    Conflict,
    ConnectionFailed,
    ContextLengthExceeded,
    FolderInvalid,
    FolderNotWritten,
    Forbidden,
    GenerationFailed,
    HubFetchFailed,
    InternalError,
    InvalidApiKey,
    InvalidRequest,
    MethodNotAllowed,
    NotFound,
    PreconditionFailed,
    Problem,
    QueueFull,
    QuickchangeError,
    RateLimited,
    RequestTimedOut,
    ScopeMissing,
    StorageFull,
    StreamInterrupted,
    TooLarge,
    TooSlow,
    Unavailable,
    UnsupportedMediaType,
    UploadRefused,
)
from quickchange_client.generation import (
    ChatChunk,
    ChatCompletion,
    ChatOptions,
    Completion,
    CompletionOptions,
    MixPart,
    Usage,
)
from quickchange_client.retry import NO_RETRIES, RetryPolicy
from quickchange_client.server_state import Health, Memory, Model, ModelList
from quickchange_client.stream import AsyncStream, Stream

__all__ = [
    "NO_RETRIES",
    "Adapter",
    "AdapterAction",
    "AdapterConfig",
    "AdapterDeletion",
    "AdapterEvent",
    "AdapterPage",
    "AdapterReport",
    "AdapterVersion",
    "AnswerInvalid",
    "ApiError",
    "ApiKey",
    "ApiKeyPage",
    "ArgumentInvalid",
    "AsyncQuickchange",
    "AsyncStream",
    "ChatChunk",
    "ChatCompletion",
    "ChatOptions",
    "Completion",
    "CompletionOptions",
    "Conflict",
    "ConnectionFailed",
    "ContextLengthExceeded",
    "FolderInvalid",
    "FolderNotWritten",
    "Forbidden",
    "GenerationFailed",
    "Health",
    "HubFetchFailed",
    "InternalError",
    "InvalidApiKey",
    "InvalidRequest",
    "Memory",
    "MethodNotAllowed",
    "MixPart",
    "Model",
    "ModelList",
    "NewApiKey",
    "NotFound",
    "PreconditionFailed",
    "Problem",
    "QueueFull",
    "Quickchange",
    "QuickchangeError",
    "RateLimited",
    "RequestTimedOut",
    "RetryPolicy",
    "ScopeMissing",
    "StorageFull",
    "Stream",
    "StreamInterrupted",
    "TooLarge",
    "TooSlow",
    "Unavailable",
    "UnsupportedMediaType",
    "UploadRefused",
    "Usage",
]
