"""A server whose log is kept and whose end is watched, and starts that must be refused."""

import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil

from benchmarks.failure import BenchmarkFailure
from benchmarks.server_process import Target, free_port, last_line

COMMAND = (sys.executable, "-m", "quickchange_server.cli")
REFUSAL_TIMEOUT_S = 60.0
TROUBLE = ("Traceback (most recent call last)", "CUDA error", "device-side assert")


@dataclass(frozen=True, slots=True)
class Ended:
    """A command that ended: its code, what it printed, how long it took."""

    code: int
    text: str
    seconds: float


class WatchedServer:
    """`quickchange serve` as a child process with a store of its own; `log` is a file that stays.

    It does not wait: `wait_until_ready` does.
    """

    def __init__(self, arguments: Sequence[str], folder: Path, log: Path) -> None:
        self.log = log
        self.url = f"http://127.0.0.1:{(port := free_port())}"
        self._started_s = time.monotonic()
        command = [*COMMAND, "serve", "--port", str(port), "--store", str(folder), *arguments]
        with log.open("wb") as output:
            self._child = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)

    def target(self) -> Target:
        """Return what benchmarks ask."""
        return Target(self.url, psutil.Process(self._child.pid))

    def wait_until_ready(self, timeout_s: float) -> float:
        """Return the seconds since the start. Raises: BenchmarkFailure when it never is ready."""
        while (waited_s := time.monotonic() - self._started_s) < timeout_s:
            if self._child.poll() is not None:
                break
            try:
                if httpx.get(f"{self.url}/readyz", timeout=5).status_code == 200:
                    return waited_s
            except httpx.TransportError:
                pass
            time.sleep(0.05)
        code = self._child.poll()
        state = f"ended with {code}" if code is not None else "is not ready"
        raise BenchmarkFailure(f"after {waited_s:.0f} s the server {state}: {last_line(self.text)}")

    @property
    def ready_s(self) -> float:
        """The seconds from its start that it says it took; NaN before it says so."""
        found = re.search(r"^Ready after ([\d.]+) s", self.text, re.MULTILINE)
        return float(found[1]) if found else math.nan

    @property
    def code(self) -> int | None:
        """Its exit code, if it has ended."""
        return self._child.poll()

    @property
    def text(self) -> str:
        """What it printed so far."""
        return self.log.read_text(encoding="utf-8", errors="replace")

    def terminate(self) -> None:
        """Ask it to end, as an orchestrator does."""
        if self._child.poll() is None:
            self._child.send_signal(signal.SIGTERM)

    def wait(self, timeout_s: float) -> int | None:
        """Return its exit code; None when it has not ended in time."""
        try:
            return self._child.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return None

    def kill(self) -> None:
        """End it and its children, whatever it is doing."""
        if self._child.poll() is None:
            for process in psutil.Process(self._child.pid).children(recursive=True):
                process.kill()
            self._child.kill()
            self._child.wait()


def trouble_in(log: str) -> list[str]:
    """Return the lines of a log that no server should write."""
    return [line for line in log.splitlines() if any(word in line for word in TROUBLE)]


def run_command(*arguments: str, timeout_s: float = REFUSAL_TIMEOUT_S) -> Ended:
    """Run a `quickchange` command that ends by itself. Raises: BenchmarkFailure."""
    started_s = time.monotonic()
    try:
        done = subprocess.run(
            [*COMMAND, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout_s,
            env={**os.environ, "NO_COLOR": "1"},
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise BenchmarkFailure(f"{arguments[0]} has not ended in {timeout_s:.0f} s") from error
    return Ended(done.returncode, done.stdout, time.monotonic() - started_s)
