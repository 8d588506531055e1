"""The ports that a server listens on: one for the API, and with `--admin-port` one for operators.

Both live in one event loop. The API's takes the signals. Told to stop, it is not ready from that
moment on, refuses new work in words while what it accepted is finished, and only then closes its
port: uvicorn alone would close it first, and callers would see refused connections. The operators'
port answers to the end.
"""

import asyncio
import logging
import signal
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, replace
from types import FrameType

import uvicorn
from fastapi import FastAPI

from quickchange_server.drain import Drain
from quickchange_server.errors import CannotStart

KEEP_ALIVE_S = 75
CUT_OFF_S = 5.0
"""For the step that runs when the time is over; one that hangs is not waited for."""
CLOSE_S = 1
"""For answers that are being written when everything is finished."""
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class DrainTimes:
    """How long a server told to stop goes on listening, and how long running requests may take."""

    delay_s: float
    timeout_s: float


class ApiServer(uvicorn.Server):
    """Serves the API until a signal, then drains."""

    def __init__(
        self,
        app: FastAPI,
        drain: Drain,
        times: DrainTimes,
        cut_off: Callable[[], Awaitable[None]],
        when_drained: Callable[[], None] = lambda: None,
    ) -> None:
        """`cut_off` ends what did not finish in time, so that its callers are told.

        `when_drained` is called when nothing more is waited for but the parts of the server.
        """
        super().__init__(_uvicorn_config(app))
        self._cut_off = cut_off
        self._when_drained = when_drained
        self._drain = drain
        self._times = times

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to drain. Whoever sits at the terminal (SIGINT) need not wait for balancers."""
        self._drain.begin()
        if sig == signal.SIGINT:
            self._times = replace(self._times, delay_s=0.0)
        super().handle_exit(sig, frame)

    async def main_loop(self) -> None:
        """Serve until a signal, and then until the last accepted request ended."""
        await super().main_loop()
        self._drain.begin()  # whatever else may end the loop
        num_left = await self._drain.finish(
            self._times.delay_s, self._times.timeout_s, lambda: self.force_exit
        )
        if num_left:
            log.warning("%d requests did not finish in time and are cut off", num_left)
            with suppress(TimeoutError):
                await asyncio.wait_for(self._cut_off(), CUT_OFF_S)
        self._when_drained()


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
    server = AdminServer(_uvicorn_config(app))
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


def _uvicorn_config(app: FastAPI) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        lifespan="off",  # entered by whoever serves, so that its errors are ours to tell
        log_level="warning",
        access_log=False,
        proxy_headers=False,
        server_header=False,
        ws="none",
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=CLOSE_S,
    )
