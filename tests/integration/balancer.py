"""A small balancer of TCP connections, as a Kubernetes Service is one: it looks at no request.

It asks every server for /readyz ten times a second, gives each new connection to one that is ready,
and tries another only when a connection is refused.
"""

import asyncio
from contextlib import closing, suppress

import httpx

CHECK_S = 0.1
WAIT_S = 60.0
CHUNK_BYTES = 65536


class NobodyReady(Exception):
    """No server was ready for too long."""


class Balancer:
    """Started with `start`; `servers` are URLs, and may change while it runs."""

    def __init__(self) -> None:
        self.servers: set[str] = set()
        self.ready: set[str] = set()
        self.num_refused = 0
        self._turn = 0
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> str:
        """Listen on a free port, and return the address."""
        self._listener = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self._checks = asyncio.create_task(self._check_all())
        return f"http://127.0.0.1:{self._listener.sockets[0].getsockname()[1]}"

    async def stop(self) -> None:
        """Stop listening and checking, and break what is open."""
        self._listener.close()
        for task in (self._checks, *self._tasks):
            task.cancel()
        await asyncio.gather(self._checks, *self._tasks, return_exceptions=True)

    async def _check_all(self) -> None:
        async with httpx.AsyncClient(timeout=5) as client:
            while True:
                await asyncio.gather(*(self._check(client, url) for url in set(self.servers)))
                self.ready &= self.servers
                await asyncio.sleep(CHECK_S)

    async def _check(self, client: httpx.AsyncClient, url: str) -> None:
        try:
            is_ready = (await client.get(f"{url}/readyz")).status_code == 200
        except httpx.TransportError:
            is_ready = False
        (self.ready.add if is_ready else self.ready.discard)(url)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            server_reader, server_writer = await self._connect()
            with closing(server_writer):
                ways = _pass_on(reader, server_writer), _pass_on(server_reader, writer)
                await asyncio.gather(*ways)
        finally:
            self._tasks.discard(task)
            writer.close()

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        for _ in range(int(WAIT_S / CHECK_S)):
            for url in self._in_turn():
                host, _, port = url.removeprefix("http://").partition(":")
                try:
                    return await asyncio.open_connection(host, int(port))
                except ConnectionRefusedError:
                    self.num_refused += 1
            await asyncio.sleep(CHECK_S)
        raise NobodyReady

    def _in_turn(self) -> list[str]:
        self._turn += 1
        ready = sorted(self.ready)
        start = self._turn % max(len(ready), 1)
        return ready[start:] + ready[:start]


async def _pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Copy bytes until one side ends or breaks, and tell the other."""
    with suppress(ConnectionError):
        while data := await reader.read(CHUNK_BYTES):
            writer.write(data)
            await writer.drain()
    with suppress(ConnectionError, OSError):
        if writer.can_write_eof() and not writer.is_closing():
            writer.write_eof()
