"""A whole server in a process of its own, as people start it."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import httpx

START_S = 240


class Server:
    """A `quickchange-server serve` process; `url` is known once it says that it is ready.

    `prefix`: words before the command, for what is to be arranged in the process first.
    """

    def __init__(self, arguments: list[str], folder: Path, prefix: Sequence[str] = ()) -> None:
        command = [*prefix, sys.executable, "-m", "quickchange_server.cli", "serve", "--port", "0"]
        store = ["--store", str(folder / "store"), "--cache", str(folder / "cache")]
        self.folder = folder
        self.log = folder / "log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [*command, *store, *arguments],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )

    def wait_ready(self) -> "Server":
        """Wait for the line that says where it listens."""
        for _ in range(START_S * 20):
            found = re.search(r"Ready after .* on (http://\S+):", self.log.read_text())
            if found:
                self.url = found[1]
                return self
            assert self.process.poll() is None, self.log.read_text()
            time.sleep(0.05)
        raise TimeoutError(self.log.read_text())

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Send a signal; return the exit code."""
        self.process.send_signal(number)
        return self.process.wait(30)

    def generate(self, model: str, **fields: object) -> httpx.Response:
        """Ask for a greedy completion."""
        body = {"model": model, "prompt": "the quick", "temperature": 0, **fields}
        return httpx.post(f"{self.url}/v1/completions", json=body, timeout=30)


def run_command(*words: str) -> "subprocess.CompletedProcess[str]":
    """Run a command of the server's to its end."""
    command = [sys.executable, "-m", "quickchange_server.cli", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)
