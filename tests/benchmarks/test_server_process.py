"""Servers as child processes: readiness, the end of their log, and that nothing of them is left."""

import sys
import time

import psutil
import pytest

from benchmarks.failure import BenchmarkFailure
from benchmarks.server_process import free_port, running

SERVER = """
import http.server, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/ready" else 404)
        self.end_headers()
        self.wfile.write(str(child.pid).encode())
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def test_a_server_and_its_children_end_with_the_block() -> None:
    port = free_port()
    command = [sys.executable, "-c", SERVER, str(port)]
    with running(command, f"http://127.0.0.1:{port}", "/ready") as target:
        assert target.process is not None
        (child,) = target.process.children()
        assert target.cpu_s() > 0
    assert not target.process.is_running()
    deadline = time.monotonic() + 10
    while child.is_running() and child.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_server_that_ends_at_once_shows_its_log(capsys: pytest.CaptureFixture[str]) -> None:
    command = [sys.executable, "-c", "print('no such option'); raise SystemExit(3)"]
    url = f"http://127.0.0.1:{free_port()}"
    with (
        pytest.raises(BenchmarkFailure, match="ended with 3: no such option"),
        running(command, url, "/ready"),
    ):
        pass
    assert "no such option" in capsys.readouterr().err


def test_what_the_environment_adds_reaches_the_server() -> None:
    command = [sys.executable, "-c", "import os; raise SystemExit(os.environ['MARK'])"]
    url = f"http://127.0.0.1:{free_port()}"
    with (
        pytest.raises(BenchmarkFailure, match="ended with 1: carried"),
        running(command, url, "/ready", {"MARK": "carried"}),
    ):
        pass
