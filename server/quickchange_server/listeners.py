"""The ports that a server listens on: one for the API, and with `--admin-port` one for operators.

Both live in one event loop. The API's takes the signals; when it is told to stop, it first says
that it is no longer ready, then drains, while the operators' port still answers.
"""

import asyncio
import math
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager

import uvicorn
from fastapi import FastAPI

from quickchange_server.errors import CannotStart

KEEP_ALIVE_S = 75
ADMIN_DRAIN_S = 1.0


class ApiServer(uvicorn.Server):
    """Serves the API; `on_stop` is called before connections are asked to end."""

    def __init__(self, app: FastAPI, drain_s: float, on_stop: Callable[[], None]) -> None:
        super().__init__(_uvicorn_config(app, drain_s))
        self._on_stop = on_stop

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop accepting, let what runs finish."""
        self._on_stop()
        await super().shutdown(sockets)


class AdminServer(uvicorn.Server):
    """Serves beside the API, and leaves the signals to it."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Take none."""
        yield


@asynccontextmanager
async def listening_beside(app: FastAPI, listener: socket.socket | None) -> AsyncIterator[None]:
    """Serve an app on a second port until the block ends; None: there is no such port."""
    if listener is None:
        yield
        return
    server = AdminServer(_uvicorn_config(app, ADMIN_DRAIN_S))
    task = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        yield
    finally:
        server.should_exit = True
        await task


def bind(host: str, port: int, flag: str = "--port") -> socket.socket:
    """Take the port, without listening yet: until the server is ready, callers are refused.

    Raises: CannotStart.
    """
    host = host.strip("[]")
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        raise CannotStart(
            f"cannot listen on {host} port {port}: {error.strerror}; "
            f"choose others with --host and {flag}"
        ) from error
    return listener


def url_of(listener: socket.socket) -> str:
    """Return how this machine reaches a listener."""
    host, port = listener.getsockname()[:2]
    shown = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    return f"http://{shown}:{port}"


def _uvicorn_config(app: FastAPI, drain_s: float) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        lifespan="off",  # entered by whoever serves, so that its errors are ours to tell
        log_level="warning",
        access_log=False,
        proxy_headers=False,
        server_header=False,
        ws="none",
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=math.ceil(drain_s),
    )
