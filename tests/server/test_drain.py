"""A server that is told to stop: what was accepted is finished, what is new is refused in words."""

import asyncio
import json
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlsplit

import httpx
import pytest
from fastapi import FastAPI
from quickchange_server import listeners, serving
from quickchange_server.api.drain_guard import DrainGuard
from quickchange_server.config import load_config
from quickchange_server.drain import Drain
from quickchange_server.listeners import ApiServer, DrainTimes, bind
from starlette.types import Message, Receive, Scope, Send

from tests.server.server_process import Server

LONG = {"model": "tiny-llama", "prompt": "the", "stream": True, "ignore_eos": True}


async def test_it_lasts_until_what_runs_has_ended() -> None:
    drain = Drain()
    with drain.accepted():
        finish = asyncio.create_task(drain.finish(0, 60))
        await asyncio.sleep(0.2)
        assert not finish.done()
    assert await finish == 0


async def test_it_lasts_as_long_as_the_delay_and_no_longer_than_the_timeout() -> None:
    drain = Drain()
    started = time.monotonic()
    assert await drain.finish(0.3, 60) == 0
    assert time.monotonic() - started >= 0.3
    with drain.accepted():
        assert await drain.finish(0.0, 0.1) == 1
        assert await drain.finish(60, 60, is_hurried=lambda: True) == 1


async def test_whoever_reads_is_waited_for_too() -> None:
    drain = Drain()
    running = []

    async def download(scope: Scope, receive: Receive, send: Send) -> None:
        running.append(drain.num_running)

    async def receive() -> Message:
        raise AssertionError

    async def send(_: Message) -> None:
        raise AssertionError

    await DrainGuard(download, drain)({"type": "http", "method": "GET"}, receive, send)
    assert (running, drain.num_running) == ([1], 0)


def send_all(url: str, num_bytes: int) -> bytes:
    """Send a whole upload before looking at the answer, as proxies do; return its beginning."""
    place = urlsplit(url)
    head = (
        f"POST /v1/adapters HTTP/1.1\r\nhost: {place.netloc}\r\ncontent-length: {num_bytes}\r\n\r\n"
    )
    with socket.create_connection((place.hostname, place.port), 60) as connection:
        connection.sendall(head.encode())
        connection.sendall(bytes(num_bytes))
        return connection.recv(64)


@pytest.fixture
def server(tmp_path: Path, tiny_base: Path, request: pytest.FixtureRequest) -> Iterator[Server]:
    """Return a running server with the options of the test."""
    server = Server(["--model", str(tiny_base), *request.param], tmp_path)
    yield server.wait_ready()
    server.process.kill()
    server.process.wait()


@pytest.mark.parametrize("server", [("--drain-delay", "2")], indirect=True)
def test_a_drain_loses_nothing_and_says_no_to_new_work(server: Server) -> None:
    finished: list[list[str]] = []
    begun = threading.Barrier(5)

    def stream(num_tokens: int) -> None:
        with httpx.stream(
            *("POST", f"{server.url}/v1/completions"),
            json={**LONG, "max_tokens": num_tokens},
            timeout=120,
        ) as answer:
            lines = answer.iter_lines()
            first = next(lines)
            begun.wait(60)
            finished.append([first, *lines])

    threads = [threading.Thread(target=stream, args=(300 + 40 * i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    begun.wait(60)
    with httpx.Client(base_url=server.url) as kept_alive:
        assert kept_alive.get("/readyz").status_code == 200
        server.process.send_signal(signal.SIGTERM)
        while (ready := kept_alive.get("/readyz")).status_code == 200:
            time.sleep(0.01)
        assert (ready.status_code, ready.headers["connection"]) == (503, "close")
        refused = kept_alive.post("/v1/completions", json={**LONG, "max_tokens": 1})
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
        assert refused.headers["retry-after"] == "1"
        assert refused.headers["connection"] == "close"
        for _ in range(3):  # a caller who still sends gets the answer, not a broken connection
            assert send_all(server.url, 8_000_000).startswith(b"HTTP/1.1 503 ")
        assert httpx.get(f"{server.url}/livez").status_code == 200  # a new connection, too
        assert httpx.get(f"{server.url}/v1/models").status_code == 200
    for thread in threads:
        thread.join(120)
    assert [lines[-1] or lines[-2] for lines in finished] == ["data: [DONE]"] * 4
    assert server.process.wait(60) == 0
    assert "Traceback" not in server.log.read_text()


def num_taken(url: str) -> float:
    """Return how many choices run or wait."""
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    names = ("quickchange_requests_running ", "quickchange_requests_waiting ")
    return sum(float(line.split()[1]) for line in lines if line.startswith(names))


@pytest.mark.parametrize("server", [("--drain-timeout", "0")], indirect=True)
def test_what_does_not_finish_in_time_is_cut_off_and_the_exit_is_clean(server: Server) -> None:
    body = {**LONG, "max_tokens": 480, "n": 16, "stream": False}
    whole: list[httpx.Response] = []

    def ask() -> None:
        whole.append(httpx.post(f"{server.url}/v1/completions", json=body, timeout=60))

    asking = threading.Thread(target=ask)
    with httpx.stream(
        *("POST", f"{server.url}/v1/completions"), json=body | {"stream": True}, timeout=60
    ) as answer:
        lines = answer.iter_lines()
        next(lines)
        asking.start()
        while num_taken(server.url) <= 16:
            assert asking.is_alive()
            time.sleep(0.05)
        server.process.send_signal(signal.SIGTERM)
        *_, last = [line for line in lines if line]
    asking.join(60)
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "unavailable"
    assert whole[0].status_code == 503
    assert "retry-after" in whole[0].headers
    assert whole[0].json()["error"]["code"] == "unavailable"
    assert server.process.wait(60) == 0
    assert "2 requests did not finish" in server.log.read_text()


def test_a_signal_while_it_starts_ends_it_at_once(tmp_path: Path, tiny_base: Path) -> None:
    server = Server(["--model", str(tiny_base)], tmp_path)
    try:
        while not handles_sigterm(server.process.pid):
            assert server.process.poll() is None, server.log.read_text()
            time.sleep(0.02)
        assert server.stop() == 0
        assert "stopped before it was ready" in server.log.read_text()
    finally:
        server.process.kill()
        server.process.wait()


def handles_sigterm(pid: int) -> bool:
    """Whether a process has a handler of its own, as the first of a container needs."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    caught = next(line.split()[1] for line in lines if line.startswith("SigCgt"))
    return bool(int(caught, 16) >> (signal.SIGTERM - 1) & 1)


async def test_an_engine_that_hangs_does_not_hold_up_the_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(listeners, "CUT_OFF_S", 0.05)
    drain, hangs, called = Drain(), threading.Event(), []

    async def cut_off() -> None:
        await asyncio.to_thread(hangs.wait)

    times = DrainTimes(0.0, 0.0)
    server = ApiServer(FastAPI(), drain, times, cut_off, lambda: called.append("drained"))
    server.config.load()
    server.should_exit = True
    try:
        with drain.accepted():
            await asyncio.wait_for(server.main_loop(), 20)
    finally:
        hangs.set()
    assert drain.is_begun
    assert called == ["drained"]


async def never() -> None:
    raise AssertionError("nothing runs here")


async def test_a_signal_just_before_it_listens_is_obeyed(monkeypatch: pytest.MonkeyPatch) -> None:
    def signalled(app: FastAPI) -> FastAPI:
        """Stand for the moment between the end of loading and uvicorn's own handlers."""
        signal.raise_signal(signal.SIGTERM)
        return app

    monkeypatch.setattr(serving, "create_admin_app", signalled)
    app = FastAPI()
    app.state.services = SimpleNamespace(adapters=None, keyring=SimpleNamespace(is_open=True))
    server = ApiServer(app, Drain(), DrainTimes(0.0, 60.0), never)
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        with bind("127.0.0.1", 0) as listener:
            serve = serving._serve(app, server, (listener, None), load_config({}))
            await asyncio.wait_for(serve, 20)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
