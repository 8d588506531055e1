"""A server of ready-made answers that keeps what it was asked."""

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from benchmarks.client_limit import ReadyMadeServer
from benchmarks.server_process import Target

NUM_TOKENS = 5


class RecordingServer(ReadyMadeServer):
    """Keeps the bodies that it is sent, and how many requests ran at once."""

    def __init__(self) -> None:
        super().__init__(NUM_TOKENS, interval_s=0.001)
        self.bodies: list[dict[str, Any]] = []
        self.num_running = 0
        self.max_running = 0

    async def complete(self, body: bytes, writer: asyncio.StreamWriter) -> None:
        self.bodies.append(json.loads(body))
        self.num_running += 1
        self.max_running = max(self.max_running, self.num_running)
        await super().complete(body, writer)
        self.num_running -= 1


@asynccontextmanager
async def recording() -> AsyncIterator[tuple[RecordingServer, Target]]:
    """Serve on a free port until the end of the block."""
    server = RecordingServer()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        task = asyncio.create_task(server.run(listener))
        yield server, Target(f"http://127.0.0.1:{listener.getsockname()[1]}")
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
