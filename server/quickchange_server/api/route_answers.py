"""Which statuses each route can answer with, as OpenAPI shows them.

FastAPI sees what a route returns and not what it raises, so this is a table. A test compares every
answer that the other tests get with it.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from quickchange_server.api.error_shapes import GENERATE, OPENAI, ErrorShape, shape_of

Json = dict[str, Any]

EVERYWHERE = (403, 500)
"""A foreign Host or Origin while there is no key, or a key without the scope; our own mistake."""
WITH_KEY = (401,)
_BODY = (400, 408, 413, 415)
_WRITE = (503, 507)
_ACTION = (*_BODY, 404, 409, *_WRITE)
_GENERATION = (*_BODY, 404, 409, 429, 503)
_GENERATE = (404, 408, 409, 413, 415, 422, 424, 429, 503)
_ADAPTER, _VERSION = "/v1/adapters/{name}", "/v1/adapters/{name}/versions/{version}"

REFUSALS: Mapping[str, tuple[int, ...]] = {
    "POST /v1/chat/completions": _GENERATION,
    "POST /v1/completions": _GENERATION,
    "POST /generate": _GENERATE,
    "POST /generate_stream": _GENERATE,
    "POST /": _GENERATE,
    "GET /v1/models": (),
    "GET /v1/models/{model_id}": (404,),
    "POST /tokenize": (*_BODY, 404, 409),
    "POST /detokenize": (*_BODY, 404, 409),
    "POST /v1/adapters": (*_BODY, 404, 409, 429, *_WRITE),
    "GET /v1/adapters": (400,),
    f"GET {_ADAPTER}": (404, 503),
    f"DELETE {_ADAPTER}": (400, 404, 409, 412, *_WRITE),
    f"GET {_ADAPTER}/events": (400, 404, 503),
    f"GET {_VERSION}": (400, 404, 503),
    f"DELETE {_VERSION}": (400, 404, 409, 412, *_WRITE),
    f"GET {_VERSION}/files/{{file}}": (400, 404, 409, 416, 503),
    f"PUT {_ADAPTER}/aliases/{{alias}}": (*_BODY, 404, 409, 412, *_WRITE),
    f"DELETE {_ADAPTER}/aliases/{{alias}}": (404, 409, 412, *_WRITE),
    f"POST {_ADAPTER}/load": (*_ACTION, 429),
    **{f"POST {_ADAPTER}/{action}": _ACTION for action in ("unload", "pin", "unpin")},
    **{f"POST {_ADAPTER}/{action}": _ACTION for action in ("merge", "unmerge")},
    **{f"POST {_ADAPTER}/{action}": (*_ACTION, 412) for action in ("disable", "enable")},
    "POST /v1/load_lora_adapter": (*_BODY, 404, 409, 429, *_WRITE),
    "POST /v1/unload_lora_adapter": (*_BODY, 404, 409, *_WRITE),
    "POST /v1/keys": (*_BODY, 409, *_WRITE),
    "GET /v1/keys": (400, 503),
    "DELETE /v1/keys/{key_id}": (404, 409, *_WRITE),
    "GET /livez": (503,),
    "GET /readyz": (503,),
    "GET /health": (503,),
    "GET /version": (),
    "GET /metrics": (),
    "GET /v1/memory": (),
}
"""What a route can refuse with, beside what every one can."""

_EVENT: Json = {
    "type": "object",
    "required": ["data"],
    "properties": {"data": {"type": "string", "description": "JSON; OpenAI's last one is [DONE]"}},
}
_EVENTS: Json = {"text/event-stream": {"schema": _EVENT}}
_JSON: Json = {"application/json": {"schema": {}}}
_DELETED: Json = {
    "202": {"description": "Unknown to new requests; running ones finish", "content": _JSON}
}
_NOT_MODIFIED: Json = {"304": {"description": "As `If-None-Match` knows it"}}
ANSWERS: Mapping[str, Mapping[str, Json]] = {
    **{
        f"POST {path}": {"200": {"description": "The answer", "content": {**_JSON, **_EVENTS}}}
        for path in ("/v1/chat/completions", "/v1/completions", "/")
    },
    "POST /generate_stream": {"200": {"description": "An event a token", "content": _EVENTS}},
    f"GET {_ADAPTER}": _NOT_MODIFIED,
    f"DELETE {_ADAPTER}": _DELETED,
    f"DELETE {_VERSION}": _DELETED,
    f"GET {_VERSION}/files/{{file}}": {
        "200": {"description": "The file"},
        "206": {"description": "The range of it that was asked for"},
        **_NOT_MODIFIED,
    },
}
"""Answers that FastAPI cannot see."""

_TEXT, _TEXT_OR_NULL = {"type": "string"}, {"type": ["string", "null"]}
_PROBLEM = {
    "type": "object",
    "required": ["code", "where", "message", "hint"],
    "properties": {"code": _TEXT, "where": _TEXT, "message": _TEXT, "hint": _TEXT},
}
_ERROR = {
    "type": "object",
    "required": ["message", "type", "param", "code"],
    "properties": {"message": _TEXT, "type": _TEXT, "param": _TEXT_OR_NULL, "code": _TEXT},
}
SCHEMAS: Mapping[str, Json] = {
    "Error": {
        "type": "object",
        "required": ["error"],
        "properties": {"error": _ERROR, "problems": {"type": "array", "items": _PROBLEM}},
    },
    "GenerateError": {
        "type": "object",
        "required": ["error", "error_type", "code"],
        "properties": {"error": _TEXT, "error_type": _TEXT, "code": _TEXT},
    },
}
_SCHEMA_OF: Mapping[ErrorShape, str] = {OPENAI: "Error", GENERATE: "GenerateError"}
_MEANING = {
    400: "The content cannot be served as it stands",
    401: "No key, or none that is known",
    403: "The caller may not do this",
    404: "No such thing, or none that the caller may see",
    408: "The body came too slowly",
    409: "The state of the thing does not allow this",
    412: "It was changed since it was read",
    413: "The body is too large",
    415: "The content type is not read here",
    416: "The file has no such range",
    422: "The content cannot be served as it stands",
    424: "The engine gave up on this request",
    429: "Too much at once; `Retry-After` says when again",
    500: "The server failed",
    503: "Not now; `Retry-After` says when again",
    507: "There is no room; nothing was kept",
}


def complete(paths: Mapping[str, Mapping[str, Json]]) -> None:
    """Put every status that a route can answer with into OpenAPI's description of it."""
    for path, methods in paths.items():
        for method, operation in methods.items():
            route = f"{method.upper()} {path}"
            found = operation["responses"]
            for status in [each for each in found if not each.startswith("2")]:
                del found[status]
            found.update(ANSWERS.get(route, {}))
            found.update(_refusals(route, path, is_open="security" not in operation))


def _refusals(route: str, path: str, is_open: bool) -> Iterator[tuple[str, Json]]:
    schema = {"$ref": f"#/components/schemas/{_SCHEMA_OF[shape_of(path)]}"}
    statuses = {*EVERYWHERE, *REFUSALS[route], *(() if is_open else WITH_KEY)}
    for status in sorted(statuses):
        answer: Json = {"description": _MEANING[status]}
        if status != 416:  # the range's answer is a header
            answer["content"] = {"application/json": {"schema": schema}}
        yield str(status), answer
