"""The server under test: `quickchange serve` as a child process, and what is asked beside text.

Waits until the server is ready, uploads adapters over REST, reads CPU time, and stops it again.
"""

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil

from benchmarks.failure import BenchmarkFailure

READY_TIMEOUT_S = 600.0
STOP_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class Target:
    """A server under test. `process` is None for one that somebody else started."""

    url: str
    process: psutil.Process | None = None
    api_key: str | None = None

    def base_name(self) -> str:
        """Return the first model of GET /v1/models, which is the base."""
        return str(self._call("GET", "/v1/models")["data"][0]["id"])

    def upload(self, name: str, folder: Path) -> None:
        """Upload an adapter folder under a name."""
        files = {
            "adapter_config": (folder / "adapter_config.json").read_bytes(),
            "adapter_model": (folder / "adapter_model.safetensors").read_bytes(),
        }
        self._call("POST", "/v1/adapters", data={"name": name}, files=files)

    def merge(self, name: str) -> None:
        """Make a merged copy of an adapter."""
        self._call("POST", f"/v1/adapters/{name}/merge")

    def unmerge(self, name: str) -> None:
        """Drop the merged copy."""
        self._call("POST", f"/v1/adapters/{name}/unmerge")

    def cpu_s(self) -> float:
        """Return the CPU seconds of the server and its children so far; NaN if not ours."""
        if self.process is None:
            return float("nan")
        processes = [self.process, *self.process.children(recursive=True)]
        times = [process.cpu_times() for process in processes]
        return float(sum(each.user + each.system for each in times))

    def resident_mib(self) -> float:
        """Return the resident set of the server process in MiB; NaN if not ours."""
        return self.process.memory_info().rss / 2**20 if self.process else float("nan")

    def _call(self, method: str, path: str, **content: Any) -> dict[str, Any]:
        headers = {"authorization": f"Bearer {self.api_key}"} if self.api_key else {}
        url = self.url.rstrip("/") + path
        try:
            answer = httpx.request(method, url, headers=headers, timeout=300, **content)
        except httpx.TransportError as error:
            raise BenchmarkFailure(f"{method} {url} failed: {error}") from error
        if answer.is_error:
            raise BenchmarkFailure(
                f"{method} {path} answered {answer.status_code}: {answer.text[:500]}"
            )
        result: dict[str, Any] = answer.json()
        return result


@contextmanager
def serving(arguments: Sequence[str]) -> Iterator[Target]:
    """Run `quickchange serve` with these arguments and a store of its own; stop it at the end.

    Prints the end of the server's log when something fails.

    Raises: BenchmarkFailure if it does not become ready.
    """
    with tempfile.TemporaryDirectory(prefix="quickchange-bench-") as folder:
        port = _free_port()
        command = [sys.executable, "-m", "quickchange_server.cli", "serve", "--port", str(port)]
        command += ["--store", f"{folder}/store", *arguments]
        log = Path(folder) / "server.log"
        with log.open("wb") as output:
            child = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        try:
            url = f"http://127.0.0.1:{port}"
            _wait_until_ready(url, child)
            yield Target(url, psutil.Process(child.pid))
        except Exception:
            print(f"the server's log ends:\n{_tail(log)}", file=sys.stderr)
            raise
        finally:
            _stop(child)


def base_folder(model: str) -> Path:
    """Return the folder of a base that `--model` names, fetching it if need be."""
    if os.path.isdir(model):
        return Path(model)
    command = [sys.executable, "-m", "quickchange_server.cli", "base", "path", "--model", model]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise BenchmarkFailure(f"`quickchange base path --model {model}` failed")
    return Path(done.stdout.strip())


def checkpoint_dtype(folder: Path) -> str:
    """Return the dtype that `auto` means for a base."""
    config = json.loads((folder / "config.json").read_text())
    return str(config.get("dtype") or config.get("torch_dtype") or "float32")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _wait_until_ready(url: str, child: "subprocess.Popen[bytes]") -> None:
    deadline = time.monotonic() + READY_TIMEOUT_S
    while time.monotonic() < deadline and child.poll() is None:
        try:
            if httpx.get(f"{url}/readyz", timeout=5).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    state = "is not ready" if child.poll() is None else f"ended with {child.returncode}"
    raise BenchmarkFailure(f"the server {state}")


def _tail(log: Path) -> str:
    return log.read_text(errors="replace")[-3000:]


def _stop(child: "subprocess.Popen[bytes]") -> None:
    child.terminate()
    try:
        child.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()
