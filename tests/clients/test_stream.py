"""Streams: whole, broken off, failed, left early."""

import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator

import httpx
import pytest
from quickchange_client import (
    AnswerInvalid,
    AsyncQuickchange,
    GenerationFailed,
    NotFound,
    Quickchange,
    StreamInterrupted,
)
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.routing import Route

from tests.clients.app_thread import serve_app
from tests.clients.fake_server import BASE, WORDS, FakeServer

EVENT = 'data: {"id": "1", "model": "m", "choices": [{"index": 0, "text": "a"}]}\n\n'


def test_chunks_add_up_to_the_answer(client: Quickchange) -> None:
    chunks = list(client.stream_chat(BASE, "x"))
    assert "".join(chunk.text for chunk in chunks) == "".join(WORDS)
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == len(WORDS)


def test_usage_is_asked_for_unless_said_otherwise(
    client: Quickchange, fake_server: FakeServer
) -> None:
    list(client.stream_complete(BASE, "x"))
    list(client.stream_complete(BASE, "x", extra_body={"stream_options": {}}))
    asked = [body["stream_options"] for _, _, body in fake_server.requests]
    assert asked == [{"include_usage": True}, {}]


def test_headers_are_there_before_the_first_chunk(client: Quickchange) -> None:
    with client.stream_complete(BASE, "x") as stream:
        assert stream.meta.request_id == "req-1"


def test_a_refusal_is_raised_at_the_call(client: Quickchange) -> None:
    with pytest.raises(NotFound):
        client.stream_chat("nobody", "x")


def test_a_failure_inside_is_raised_where_it_happens(client: Quickchange) -> None:
    texts: list[str] = []
    stream = client.stream_chat(BASE, "fail")
    with pytest.raises(GenerationFailed, match="not finite") as caught:
        texts.extend(chunk.text for chunk in stream)
    assert texts == list(WORDS[:2])
    assert (caught.value.status, caught.value.request_id) == (None, "req-1")


def test_half_an_answer_is_not_taken_for_a_whole_one(client: Quickchange) -> None:
    texts: list[str] = []
    stream = client.stream_complete(BASE, "break off")
    with pytest.raises(StreamInterrupted, match="after 2 chunks"):
        texts.extend(chunk.text for chunk in stream)
    assert texts == list(WORDS[:2])


def streaming(body: str) -> httpx.MockTransport:
    headers = {"content-type": "text/event-stream"}
    return httpx.MockTransport(lambda _: httpx.Response(200, text=body, headers=headers))


@pytest.mark.parametrize("junk", ["data: {\n\n", "data: 7\n\n", 'data: {"id": 1}\n\n'])
def test_what_is_no_chunk_is_said_so(junk: str) -> None:
    client = Quickchange("http://fake", transport=streaming(EVENT + junk))
    with pytest.raises(AnswerInvalid, match="no chunk"):
        list(client.stream_complete("m", "x"))


def test_what_comes_after_the_end_is_not_read() -> None:
    client = Quickchange("http://fake", transport=streaming(EVENT + "data: [DONE]\n\ndata: {\n\n"))
    assert [chunk.text for chunk in client.stream_complete("m", "x")] == ["a"]


class Endless:
    """An app that streams until its client leaves, and says when that happened."""

    def __init__(self) -> None:
        self.has_ended = threading.Event()
        self.app = Starlette(routes=[Route("/v1/completions", self._answer, methods=["POST"])])

    async def _answer(self, request: Request) -> StreamingResponse:
        return StreamingResponse(self._events(), media_type="text/event-stream")

    async def _events(self) -> AsyncIterator[str]:
        import anyio

        try:
            while True:
                yield EVENT
                await anyio.sleep(0.01)
        finally:
            self.has_ended.set()


@pytest.fixture
def endless() -> Iterator[tuple[Endless, str]]:
    app = Endless()
    with serve_app(app.app) as url:
        yield app, url


def test_chunks_arrive_while_the_answer_runs_and_leaving_ends_it(
    endless: tuple[Endless, str],
) -> None:
    app, url = endless
    with Quickchange(url) as client:
        with client.stream_complete("m", "x") as stream:
            assert next(iter(stream)).text == "a"
            assert not app.has_ended.is_set()
        assert app.has_ended.wait(5.0)


async def test_leaving_an_async_stream_ends_it(endless: tuple[Endless, str]) -> None:
    app, url = endless
    async with AsyncQuickchange(url) as client:
        async with await client.stream_complete("m", "x") as stream:
            async for chunk in stream:
                assert chunk.text == "a"
                break
        await wait_for(app.has_ended.is_set)


async def wait_for(is_true: Callable[[], bool]) -> None:
    import anyio

    deadline_s = time.monotonic() + 5.0
    while not is_true():
        assert time.monotonic() < deadline_s
        await anyio.sleep(0.01)


def test_a_server_that_dies_is_noticed() -> None:
    class Dying(httpx.SyncByteStream):
        def __iter__(self) -> Iterator[bytes]:
            yield EVENT.encode()
            raise httpx.ReadError("connection reset")

    transport = httpx.MockTransport(lambda _: httpx.Response(200, stream=Dying()))
    client = Quickchange("http://fake", transport=transport)
    with pytest.raises(StreamInterrupted, match="after 1 chunks"):
        list(client.stream_complete("m", "x"))
