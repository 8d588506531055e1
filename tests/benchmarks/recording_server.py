"""A server of ready-made answers that keeps what it was asked."""

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from benchmarks.client_limit import HEAD, ReadyMadeServer
from benchmarks.server_process import Target

NUM_TOKENS = 5


class RecordingServer(ReadyMadeServer):
    """Keeps the bodies that it is sent, and how many requests ran at once.

    Streams are counted; a request without `stream` is answered with the adapter that it names, or
    always alike by a server that is deaf to adapters.
    """

    def __init__(self, is_deaf: bool = False) -> None:
        super().__init__(NUM_TOKENS, interval_s=0.001)
        self.bodies: list[dict[str, Any]] = []
        self._is_deaf = is_deaf
        self.num_running = 0
        self.max_running = 0

    async def complete(self, body: bytes, writer: asyncio.StreamWriter) -> None:
        request = json.loads(body)
        if not request.get("stream"):
            await self._answer_at_once(request, writer)
            return
        self.bodies.append(request)
        self.num_running += 1
        self.max_running = max(self.max_running, self.num_running)
        await super().complete(body, writer)
        self.num_running -= 1

    async def _answer_at_once(self, request: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        named = "" if self._is_deaf else f"{request['model']} {request.get('lora')}"
        body = json.dumps({"choices": [{"text": named}]}).encode()
        writer.write(HEAD % b"application/json" + b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body))
        await writer.drain()


@asynccontextmanager
async def recording(is_deaf: bool = False) -> AsyncIterator[tuple[RecordingServer, Target]]:
    """Serve on a free port until the end of the block."""
    server = RecordingServer(is_deaf)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        task = asyncio.create_task(server.run(listener))
        yield server, Target(f"http://127.0.0.1:{listener.getsockname()[1]}")
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
