"""A real S3 API server for tests, moto's in a process of its own, and a proxy that fails."""

import http.client
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter, deque
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal

START_TIMEOUT_S = 60.0
CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_DEFAULT_REGION": "us-east-1",
}

Fault = Literal["drop", "half_request", "half_reply", "wrong_bytes", "hang", "500", "503", "403"]

AUTHORIZATION = "AWS4-HMAC-SHA256 Credential=test/20260101/us-east-1/s3/aws4_request"
CODES = {"500": "InternalError", "503": "SlowDown", "403": "AccessDenied"}


class S3Server:
    """moto's server on a free port; the buckets live in its memory."""

    def __init__(self) -> None:
        self._num_buckets = 0
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self.port)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self._wait_until_ready()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def create_bucket(self) -> str:
        """Return the name of a new bucket."""
        self._num_buckets += 1
        name = f"bucket-{self._num_buckets}"
        request = urllib.request.Request(f"{self.endpoint}/{name}", method="PUT")
        urllib.request.urlopen(request, timeout=10).close()
        return name

    def write(self, path: str, data: bytes) -> None:
        """Write an object as somebody else might; `path` is BUCKET/KEY."""
        headers = {"Authorization": AUTHORIZATION, "Content-Type": "binary/octet-stream"}
        request = urllib.request.Request(f"{self.endpoint}/{path}", data, headers, method="PUT")
        urllib.request.urlopen(request, timeout=10).close()

    def close(self) -> None:
        self._process.kill()
        self._process.wait()

    def _wait_until_ready(self) -> None:
        deadline_s = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline_s and self._process.poll() is None:
            try:
                socket.create_connection(("127.0.0.1", self.port), 1).close()
                return
            except OSError:
                time.sleep(0.05)
        self.close()
        raise AssertionError("moto's server did not start")


class FaultyProxy:
    """Passes HTTP on to a server, except where a fault was asked for.

    | fault | a request meets |
    |---|---|
    | drop | a connection that closes without a reply |
    | half_request | a connection that closes in the middle of its body |
    | half_reply | a reply that ends in the middle of its body |
    | wrong_bytes | a reply of the right length with other bytes |
    | hang | nothing at all until the proxy is closed |
    | 500, 503, 403 | that status |
    """

    def __init__(self, port: int) -> None:
        self.upstream_port = port
        self.faults: dict[str, deque[Fault]] = {}
        self.seen: Counter[str] = Counter()
        self.is_closing = threading.Event()
        handler = type("Handler", (_Handler,), {"proxy": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def fail(self, method: str, fault: Fault, times: int = 1) -> None:
        """Let the next requests of a method meet a fault."""
        self.faults.setdefault(method, deque()).extend([fault] * times)

    def heal(self) -> None:
        """Forget the faults that nobody met."""
        self.faults.clear()

    def close(self) -> None:
        self.is_closing.set()
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    proxy: FaultyProxy

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except OSError:
            self.close_connection = True

    def _pass_on(self) -> None:
        self.proxy.seen[self.command] += 1
        waiting = self.proxy.faults.get(self.command)
        fault = waiting.popleft() if waiting else None
        num_bytes = int(self.headers.get("Content-Length") or 0)
        if fault in ("drop", "half_request", "hang"):
            self.rfile.read(num_bytes // 2 if fault == "half_request" else 0)
            if fault == "hang":
                self.proxy.is_closing.wait(60)
            self.close_connection = True
            return
        body = self.rfile.read(num_bytes)
        if fault in ("500", "503", "403"):
            self._reply(int(fault), {}, f"<Error><Code>{CODES[fault]}</Code></Error>".encode())
            return
        self._reply(*self._ask_upstream(body), fault=fault)

    def _ask_upstream(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
        upstream = http.client.HTTPConnection("127.0.0.1", self.proxy.upstream_port, timeout=30)
        try:
            upstream.request(self.command, self.path, body, dict(self.headers))
            reply = upstream.getresponse()
            return reply.status, dict(reply.getheaders()), reply.read()
        finally:
            upstream.close()

    def _reply(
        self, status: int, headers: dict[str, str], body: bytes, fault: str | None = None
    ) -> None:
        self.send_response_only(status)
        length = headers.pop("Content-Length", str(len(body)))
        for name, value in headers.items():
            if name.lower() not in ("connection", "transfer-encoding"):
                self.send_header(name, value)
        self.send_header("Content-Length", length)
        self.end_headers()
        if self.command == "HEAD":
            return
        if fault == "wrong_bytes":
            body = bytes(byte ^ 1 for byte in body)
        if fault == "half_reply":
            body = body[: len(body) // 2]
            self.close_connection = True
        self.wfile.write(body)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _pass_on

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""
