"""No answer ever has FastAPI's `detail`; each has message, type, param and code."""

import json
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import httpx
import pytest
import pytest_asyncio
from quickchange_server.adapter_views import ActionView, AdapterView
from quickchange_server.api.app import AppServices, create_app
from quickchange_server.errors import Conflict, Unavailable

from tests.server.conftest import serve_in_process
from tests.server.scripted_adapters import ScriptedAdapters

JSON = {"content-type": "application/json"}


def error_of(answer: httpx.Response) -> dict[str, Any]:
    body = answer.json()
    assert set(body) <= {"error", "problems"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    error: dict[str, Any] = body["error"]
    return error


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nope", 404, "not_found"),
        ("GET", "/v1/models/nobody", 404, "model_not_found"),
        ("PUT", "/v1/models", 405, "method_not_allowed"),
        ("DELETE", "/v1/chat/completions", 405, "method_not_allowed"),
        ("GET", "/v1/adapters/ada/versions/none", 400, "invalid_request"),
        ("GET", "/v1/adapters/ada/versions/0", 400, "invalid_request"),
        ("GET", "/v1/adapters/ada/versions/1/files/passwd", 404, "file_not_found"),
        ("GET", "/v1/adapters?limit=0", 400, "invalid_request"),
    ],
)
async def test_routes(
    client: httpx.AsyncClient, method: str, path: str, status: int, code: str
) -> None:
    answer = await client.request(method, path)
    assert answer.status_code == status
    assert error_of(answer)["code"] == code


async def test_a_method_that_is_not_there_is_answered_with_all_that_are(
    client: httpx.AsyncClient,
) -> None:
    for path, methods in [
        ("/v1/adapters", "GET, HEAD, POST"),
        ("/v1/adapters/ada", "DELETE, GET, HEAD"),
        ("/v1/adapters/ada/aliases/default", "DELETE, PUT"),
        ("/v1/models", "GET, HEAD"),
    ]:
        answer = await client.request("PATCH", path)
        assert (answer.status_code, answer.headers["allow"]) == (405, methods)
        assert methods in error_of(answer)["message"]


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (b"{", "invalid_json"),
        (b"", "invalid_request"),
        (b"[1]", "invalid_request"),
        (b'"text"', "invalid_request"),
        (b"\xff\xfe", "invalid_json"),
        (b'{"model": "\xff\xfe"}', "invalid_json"),
        (b"\xfe\xff{", "invalid_json"),
        (b"[" * 100_000, "invalid_json"),
        (b'{"model": "tiny"}', "invalid_request"),
        (b'{"model": "\\ud800", "prompt": "a"}', "invalid_request"),
        (b'{"model": "tiny", "prompt": "\\ud800"}', "invalid_request"),
        (b'{"model": "tiny", "prompt": ["\\ud800"]}', "invalid_request"),
        (b'{"model": "tiny", "prompt": "a", "stop": "\\ud800"}', "invalid_request"),
        (b'{"model": "tiny", "prompt": "a", "n": ' + b"9" * 5000 + b"}", "invalid_json"),
    ],
)
async def test_bodies_that_cannot_be_read(
    client: httpx.AsyncClient, content: bytes, code: str
) -> None:
    answer = await client.post("/v1/completions", content=content, headers=JSON)
    assert answer.status_code == 400
    assert error_of(answer)["code"] == code
    assert (await client.get("/livez")).status_code == 200


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"{", "property name"),
        (b'{"model": "\xff\xfe"}', "not UTF-8 at byte 11"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"n": ' + b"9" * 5000 + b"}", "more than 4300 digits"),
    ],
)
async def test_it_is_said_why_a_body_is_not_json(
    client: httpx.AsyncClient, content: bytes, why: str
) -> None:
    answer = await client.post("/v1/completions", content=content, headers=JSON)
    error = error_of(answer)
    assert error["code"] == "invalid_json"
    assert error["message"].startswith("the body is not JSON: ")
    assert why in error["message"]


async def test_surrogate_in_a_field_name_is_survived(client: httpx.AsyncClient) -> None:
    content = b'{"model": "tiny", "prompt": "a", "\\ud800": 1}'
    answer = await client.post("/v1/completions", content=content, headers=JSON)
    assert answer.status_code in (200, 400)


async def test_other_content_type_is_415(client: httpx.AsyncClient) -> None:
    answer = await client.post("/v1/completions", content=b"{}", headers={"content-type": "a/b"})
    assert answer.status_code == 415
    assert "application/json" in error_of(answer)["message"]


async def test_missing_field_is_named(client: httpx.AsyncClient) -> None:
    answer = await client.post("/v1/completions", json={"model": "tiny"})
    assert error_of(answer)["param"] == "prompt"
    assert error_of(answer)["message"] == "prompt: is missing"


@pytest.mark.parametrize(
    ("path", "field", "value"),
    [
        ("/v1/completions", "prompt", [5] * 600),
        ("/v1/completions", "prompt", ["the", "the " * 600]),
        ("/v1/chat/completions", "messages", [{"role": "user", "content": "the " * 600}]),
    ],
)
async def test_the_field_that_is_too_long_is_named(
    client: httpx.AsyncClient, path: str, field: str, value: Any
) -> None:
    answer = await client.post(path, json={"model": "tiny", field: value})
    assert error_of(answer)["code"] == "context_length_exceeded"
    assert error_of(answer)["param"] == field


@pytest.mark.parametrize("prompt", [[True], [5, False], [[True, 5]], [5, 1.0], [5, "6"]])
async def test_token_ids_are_numbers(client: httpx.AsyncClient, prompt: Any) -> None:
    answer = await client.post("/v1/completions", json={"model": "tiny", "prompt": prompt})
    assert answer.status_code == 400
    assert error_of(answer)["param"] == "prompt"


@pytest.mark.parametrize(
    ("method", "path", "body", "param"),
    [
        ("POST", "/detokenize", {"tokens": [True]}, "tokens[0]"),
        (
            "POST",
            "/v1/completions",
            {"model": "tiny", "prompt": "a", "stop_token_ids": [True]},
            "stop_token_ids[0]",
        ),
        ("PUT", "/v1/adapters/ada/aliases/blue", {"version": True}, "version"),
        ("PUT", "/v1/adapters/ada/aliases/blue", {"version": "1"}, "version"),
        ("POST", "/v1/adapters/ada/load", {"version": True}, "version"),
    ],
)
async def test_true_is_no_number(
    client: httpx.AsyncClient, method: str, path: str, body: dict[str, Any], param: str
) -> None:
    answer = await client.request(method, path, json=body)
    assert answer.status_code == 400
    assert error_of(answer)["param"] == param


async def test_several_faults_are_said_at_once(client: httpx.AsyncClient) -> None:
    answer = await client.post("/v1/completions", json={"model": "tiny", "prompt": 3, "n": 99})
    message = error_of(answer)["message"]
    assert "prompt: must be a string" in message
    assert "n: " in message


async def test_large_body_is_413(services: AppServices) -> None:
    limits = replace(services.limits, json_bytes=1000)
    async for client in serve_in_process(create_app(replace(services, limits=limits))):
        announced = await client.post("/v1/completions", content=b"x" * 1001, headers=JSON)
        chunked = await client.post("/v1/completions", content=_chunks(), headers=JSON)
    for answer in (announced, chunked):
        assert answer.status_code == 413
        assert error_of(answer)["code"] == "too_large"
        assert "1000 bytes" in error_of(answer)["message"]


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize(
    ("content", "content_type", "status"),
    [
        (b'{"model": "tiny"}', "application/json", 400),
        (b"{", "application/json", 400),
        (b"[" * 100_000, "application/json", 400),
        (b"{}", "text/plain", 415),
        (b" " * 1_000_001, "application/json", 413),
    ],
    ids=["schema", "malformed", "nested", "type", "large"],
)
async def test_refusals_before_the_route_count_as_rejected(
    services: AppServices, path: str, content: bytes, content_type: str, status: int
) -> None:
    limits = replace(services.limits, json_bytes=1_000_000)
    async for client in serve_in_process(create_app(replace(services, limits=limits))):
        headers = {"content-type": content_type}
        answer = await client.post(path, content=content, headers=headers)
        unrelated = await client.post("/tokenize", content=b"{", headers=JSON)
    assert (answer.status_code, unrelated.status_code) == (status, 400)
    assert error_of(answer)["message"]
    counted = services.metrics.registry.get_sample_value
    assert counted("quickchange_requests_total", {"outcome": "rejected"}) == 1


async def _chunks() -> AsyncIterator[bytes]:
    for _ in range(20):
        yield b"x" * 100


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("prompt", [None] * 200_000),
        ("prompt", [1, *["a"] * 200_000]),
        ("prompt", [["a"]] * 200_000),
        ("prompt", ["a"] * 200_000),
        ("stop", [1] * 200_000),
        ("stop_token_ids", ["x"] * 200_000),
        ("logit_bias", {str(i): "x" for i in range(100_000)}),
        ("adapters", [1] * 200_000),
    ],
)
async def test_many_wrong_items_are_refused_at_once(
    client: httpx.AsyncClient, field: str, value: Any
) -> None:
    content = json.dumps({"model": "tiny", "prompt": "a", field: value}).encode()
    started = time.monotonic()
    answer = await client.post("/v1/completions", content=content, headers=JSON)
    assert time.monotonic() - started < 20
    assert answer.status_code == 400
    assert error_of(answer)["message"].startswith(field)
    assert len(answer.content) < 2000


class Failing(ScriptedAdapters):
    async def wish(self, *about: object, **options: object) -> ActionView:
        raise Conflict("no room", code="merge_budget")

    async def get(self, name: str, *, tenant: str = "default") -> AdapterView:
        if name == "broken":
            raise RuntimeError("secret text")
        raise Unavailable("the disk is gone", code="store_unavailable")


@pytest_asyncio.fixture
async def failing_client(services: AppServices) -> AsyncIterator[httpx.AsyncClient]:
    async for each in serve_in_process(create_app(replace(services, adapters=Failing()))):
        yield each


async def test_merge_budget_is_409_that_is_not_retried(failing_client: httpx.AsyncClient) -> None:
    answer = await failing_client.post("/v1/adapters/ada/merge")
    assert answer.status_code == 409
    assert error_of(answer)["code"] == "merge_budget"
    assert answer.headers["x-should-retry"] == "false"


async def test_store_outage_is_503_with_retry_after(failing_client: httpx.AsyncClient) -> None:
    answer = await failing_client.get("/v1/adapters/ada")
    assert answer.status_code == 503
    assert error_of(answer)["code"] == "store_unavailable"
    assert int(answer.headers["retry-after"]) > 0


async def test_our_own_mistake_is_500_and_says_nothing(failing_client: httpx.AsyncClient) -> None:
    answer = await failing_client.get("/v1/adapters/broken", headers={"x-request-id": "r-1"})
    assert answer.status_code == 500
    assert error_of(answer)["code"] == "internal_error"
    assert "secret" not in answer.text
    assert answer.headers["x-request-id"] == "r-1"
