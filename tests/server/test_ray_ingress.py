"""The Ray application's front and the calls it makes, with an app of this process as the engine."""

import asyncio
import json
from collections.abc import AsyncGenerator

import httpx
import pytest
from quickchange_server.asgi_call import AnsweringApp, AsgiCall, joined
from quickchange_server.errors import Unavailable
from quickchange_server.ray_ingress import Ingress, adapter_of
from starlette.types import Message, Receive, Scope, Send

LOCAL, FOREIGN = ("127.0.0.1", 1), ("192.0.2.9", 1)
Reply = tuple[int, bytes]


class Engine:
    """Answers with what it was asked; records the calls and their hints."""

    def __init__(self, status: int = 200, content_type: bytes = b"application/json") -> None:
        self.calls: list[tuple[AsgiCall, str]] = []
        self.status = status
        self.content_type = content_type
        self.dies = False

    async def answering(self, call: AsgiCall, adapter: str) -> AsyncGenerator[Message]:
        self.calls.append((call, adapter))
        headers = [(b"content-type", self.content_type)]
        yield {"type": "http.response.start", "status": self.status, "headers": headers}
        yield {"type": "http.response.body", "body": b"data: {}\n\n", "more_body": self.dies}
        if self.dies:
            raise Unavailable("the engine that had this request ended: send it again")


def client_of(
    engine: Engine, address: tuple[str, int] = LOCAL, *, is_public: bool = False
) -> httpx.AsyncClient:
    app = Ingress(engine.answering, "tiny", is_public=is_public).app()
    transport = httpx.ASGITransport(app, client=address)
    return httpx.AsyncClient(transport=transport, base_url="http://localhost")


async def test_a_request_is_passed_on_whole_with_its_adapter_as_the_hint() -> None:
    engine = Engine()
    async with client_of(engine) as client:
        answer = await client.post("/v1/completions?a=b", json={"model": "ada"})
    ((call, adapter),) = engine.calls
    assert answer.text == "data: {}\n\n"
    assert (call.method, call.path, call.query, adapter) == (
        "POST",
        "/v1/completions",
        b"a=b",
        "ada",
    )
    assert json.loads(call.body) == {"model": "ada"}
    assert call.client == LOCAL


@pytest.mark.parametrize(
    ("body", "adapter"),
    [
        (b'{"model": "ada@live"}', "ada@live"),
        (b'{"parameters": {"adapter_id": "ada"}}', "ada"),
        (b'{"model": "tiny"}', ""),
        (b'{"model": 3}', ""),
        (b'{"model": "' + b"x" * 300 + b'"}', ""),
        (b'{"model"', ""),
        (b"[" * 100_000, ""),
        (b'{"a":' * 100_000, ""),
        (b"", ""),
    ],
)
def test_the_hint_is_the_adapter_that_a_body_names(body: bytes, adapter: str) -> None:
    assert adapter_of(AsgiCall("POST", "/v1/completions", b"", [], body), "tiny") == adapter


async def test_callers_from_elsewhere_are_refused_unless_the_settings_say_so() -> None:
    engine = Engine()
    async with client_of(engine, FOREIGN) as client:
        refused = await client.get("/v1/models")
    assert (refused.status_code, refused.json()["error"]["code"]) == (403, "forbidden")
    assert not engine.calls
    async with client_of(engine, FOREIGN, is_public=True) as client:
        assert (await client.get("/v1/models")).status_code == 200


async def test_a_strangers_upload_is_refused_before_it_is_read() -> None:
    engine = Engine(status=401)
    was_read = False

    async def body() -> AsyncGenerator[bytes]:
        nonlocal was_read
        was_read = True
        yield b"x"

    async with client_of(engine) as client:
        answer = await client.post("/v1/adapters", content=body())
    assert answer.status_code == 401
    assert not was_read
    assert [call.method for call, _ in engine.calls] == ["GET"]


async def test_too_large_a_body_reaches_no_engine() -> None:
    engine = Engine()
    async with client_of(engine) as client:
        answer = await client.post("/v1/completions", content=b" " * ((8 << 20) + 1))
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "too_large")
    assert not engine.calls


async def test_a_stream_whose_engine_is_lost_ends_with_an_error_event() -> None:
    engine = Engine(content_type=b"text/event-stream")
    engine.dies = True
    async with client_of(engine) as client:
        answer = await client.post("/v1/completions", json={"model": "ada", "stream": True})
    first, last = answer.text.strip().split("\n\n")
    assert first == "data: {}"
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "unavailable"


async def test_an_app_is_told_when_its_reader_leaves_and_may_finish() -> None:
    told = asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        assert (await receive())["type"] == "http.disconnect"
        for _ in range(200):
            await send({"type": "http.response.body", "body": b"x", "more_body": True})
        told.set()

    messages = AnsweringApp(app, AsgiCall("GET", "/", b"", [], b"")).messages()
    assert (await anext(messages))["type"] == "http.response.start"
    await messages.aclose()
    async with asyncio.timeout(30):
        await told.wait()


async def test_an_app_is_slowed_to_its_reader_and_its_error_arrives() -> None:
    num_sent = 0

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        nonlocal num_sent
        for _ in range(500):
            await send({"type": "http.response.body", "body": b"x", "more_body": True})
            num_sent += 1
        raise ValueError("broken")

    messages = AnsweringApp(app, AsgiCall("GET", "/", b"", [], b"")).messages()
    body: bytes = (await anext(messages))["body"]

    async def read_on() -> None:
        nonlocal body
        async for message in messages:
            body += message["body"]

    await asyncio.sleep(0.05)
    assert num_sent < 500
    with pytest.raises(ValueError, match="broken"):
        await read_on()
    assert body == b"x" * 500


def test_parts_that_came_together_are_one_message() -> None:
    start = {"type": "http.response.start"}
    parts = [
        {"type": "http.response.body", "body": each, "more_body": each == b"a"}
        for each in (b"a", b"b")
    ]
    assert list(joined([start, *parts])) == [
        start,
        {"type": "http.response.body", "body": b"ab", "more_body": False},
    ]
