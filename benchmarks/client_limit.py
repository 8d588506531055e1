"""Could the benchmark's client be what is measured? How much CPU does it take per token?

Drives the client of throughput.py against a server that only sends ready-made events: one token
per stream every few milliseconds, as an engine's steps would. What the client needs there it needs
beside a real server too.

    python benchmarks/client_limit.py --clients 16 --interval-ms 20
"""

import argparse
import asyncio
import json
import multiprocessing
import socket
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.closed_loop import ClosedLoop, Work
from benchmarks.failure import exit_on_failure
from benchmarks.machine import Machine
from benchmarks.report import Report, add_output_options, markdown_table
from benchmarks.server_process import Target
from benchmarks.workload import Prompts, Scenario

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: %s\r\nTransfer-Encoding: chunked\r\n\r\n"
MODELS = json.dumps({"object": "list", "data": [{"id": "nothing"}]}).encode()


class ReadyMadeServer:
    """Answers every completion with the same events at a steady pace."""

    def __init__(self, num_tokens: int, interval_s: float) -> None:
        choice = {"index": 0, "text": " word", "logprobs": None, "finish_reason": None}
        token = {"id": "cmpl-0", "object": "text_completion", "created": 0, "model": "nothing"}
        self._token = _chunk(b"data: " + json.dumps({**token, "choices": [choice]}).encode())
        usage = {"choices": [], "usage": {"completion_tokens": num_tokens}}
        self._end = _chunk(b"data: " + json.dumps(usage).encode()) + _chunk(b"data: [DONE]")
        self._num_tokens = num_tokens
        self._interval_s = interval_s

    async def run(self, listener: socket.socket) -> None:
        """Serve until the process is ended."""
        server = await asyncio.start_server(self._answer, sock=listener)
        await server.serve_forever()

    async def complete(self, body: bytes, writer: asyncio.StreamWriter) -> None:
        """Answer one completion."""
        writer.write(HEAD % b"text/event-stream")
        for _ in range(self._num_tokens):
            await asyncio.sleep(self._interval_s)
            writer.write(self._token)
            await writer.drain()
        writer.write(self._end + b"0\r\n\r\n")
        await writer.drain()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                method, body = await _read_request(reader)
                is_completion = method == b"POST"
                await (self.complete(body, writer) if is_completion else _send_models(writer))
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()


async def _send_models(writer: asyncio.StreamWriter) -> None:
    size = b"%x\r\n" % len(MODELS)
    writer.write(HEAD % b"application/json" + size + MODELS + b"\r\n0\r\n\r\n")
    await writer.drain()


async def _read_request(reader: asyncio.StreamReader) -> tuple[bytes, bytes]:
    head = await reader.readuntil(b"\r\n\r\n")
    _, _, rest = head.lower().partition(b"content-length:")
    num_bytes = int(rest.partition(b"\r\n")[0]) if rest else 0
    return head.partition(b" ")[0], await reader.readexactly(num_bytes)


def _chunk(event: bytes) -> bytes:
    return b"%x\r\n%s\n\n\r\n" % (len(event) + 2, event)


def _serve(listener: socket.socket, num_tokens: int, interval_s: float) -> None:
    asyncio.run(ReadyMadeServer(num_tokens, interval_s).run(listener))


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--interval-ms", type=float, default=20.0, help="0: as fast as it goes")
    parser.add_argument("--tokens", type=int, default=256, help="tokens per request")
    add_output_options(parser)
    options = parser.parse_args()
    machine = Machine.here()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        arguments = (listener, options.tokens, options.interval_ms / 1e3)
        server = multiprocessing.get_context("spawn").Process(target=_serve, args=arguments)
        server.start()
        try:
            loop = ClosedLoop(
                Target(f"http://127.0.0.1:{listener.getsockname()[1]}"),
                Work(Prompts(64, 0), options.tokens, 2),
            )
            time.sleep(0.2)
            figures = asyncio.run(loop.measure(Scenario(0, options.clients)))
        finally:
            server.terminate()
            server.join()
    per_token_us = 1e6 * figures.client_cores / figures.tokens_per_s
    row = [f"{options.clients}", f"{options.interval_ms:g}", f"{figures.tokens_per_s:.0f}"]
    row += [f"{figures.client_cores:.3f}", f"{per_token_us:.0f}"]
    header = ["clients", "interval ms", "tokens/s", "client cores", "client CPU per token µs"]
    settings = {"server": "ready-made events", "tokens per request": options.tokens}
    result = {"tokens_per_s": figures.tokens_per_s, "client_cores": figures.client_cores}
    report = Report("The client alone", machine, settings, markdown_table(header, [row]), [result])
    report.publish(options.markdown, options.json)


if __name__ == "__main__":
    with exit_on_failure():
        main()
