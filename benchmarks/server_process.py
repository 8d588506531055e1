"""The server under test: a child process, and what is asked of it beside text.

Waits until the server is ready, uploads adapters over REST, reads CPU time, and stops it again.
"""

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import httpx
import psutil

from benchmarks.failure import BenchmarkFailure

READY_TIMEOUT_S = 600.0
STOP_TIMEOUT_S = 60.0
CHILDREN_TIMEOUT_S = 2.0


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

    def load(self, name: str, *, to_device: bool = False) -> None:
        """Bring an adapter into host memory, or to the device."""
        body = {"tier": "device" if to_device else "host"}
        self._call("POST", f"/v1/adapters/{name}/load", json=body)

    def unload(self, name: str) -> None:
        """Give an adapter's device and host bytes back."""
        self._call("POST", f"/v1/adapters/{name}/unload")

    def delete(self, name: str) -> None:
        """Delete an adapter with all its versions."""
        self._call("DELETE", f"/v1/adapters/{name}")

    def memory(self) -> dict[str, int]:
        """Return bytes by part, as GET /v1/memory has them."""
        parts: dict[str, int] = self._call("GET", "/v1/memory")["bytes"]
        return parts

    def process_memory(self) -> dict[str, int]:
        """Return the parts of the process's resident size, as GET /v1/memory has them."""
        parts: dict[str, int] = self._call("GET", "/v1/memory")["process"]
        return parts

    def complete(self, selection: Mapping[str, object], prompt: str, num_tokens: int) -> str:
        """Generate so many tokens without streaming, and return their text."""
        asked = {"prompt": prompt, "max_tokens": num_tokens, "ignore_eos": True, "temperature": 0}
        answer = self._call("POST", "/v1/completions", json={**selection, **asked})
        return str(answer["choices"][0]["text"])

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

    Raises: BenchmarkFailure if it does not become ready.
    """
    with tempfile.TemporaryDirectory(prefix="quickchange-bench-") as folder:
        port = free_port()
        command = [sys.executable, "-m", "quickchange_server.cli", "serve", "--port", str(port)]
        command += ["--store", f"{folder}/store", *arguments]
        with running(command, f"http://127.0.0.1:{port}", "/readyz") as target:
            yield target


@contextmanager
def running(
    command: Sequence[str],
    url: str,
    ready_path: str,
    environment: Mapping[str, str] | None = None,
) -> Iterator[Target]:
    """Run a server's command until the end of the block; wait until its path answers 200.

    Prints the end of the server's log when something fails. All its child processes end with it.

    Raises: BenchmarkFailure if it does not become ready.
    """
    with tempfile.TemporaryFile() as log:
        child = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, **(environment or {})}
        )
        try:
            _wait_until_ready(url + ready_path, child, log)
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


def free_port() -> int:
    """Return a port of the loopback that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _wait_until_ready(address: str, child: "subprocess.Popen[bytes]", log: IO[bytes]) -> None:
    deadline = time.monotonic() + READY_TIMEOUT_S
    while time.monotonic() < deadline and child.poll() is None:
        try:
            if httpx.get(address, timeout=5).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    state = "is not ready" if child.poll() is None else f"ended with {child.returncode}"
    raise BenchmarkFailure(f"the server {state}: {last_line(_tail(log))}")


def last_line(text: str) -> str:
    """Return the last line that says something, for a sentence about what failed."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else "it printed nothing"


def _tail(log: IO[bytes]) -> str:
    """Return the end of a log, without moving the place where the child writes."""
    start = max(0, os.fstat(log.fileno()).st_size - 3000)
    return os.pread(log.fileno(), 3000, start).decode(errors="replace")


def _stop(child: "subprocess.Popen[bytes]") -> None:
    """End a server, and whichever of its child processes outlive it."""
    try:
        family = psutil.Process(child.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        family = []
    child.terminate()
    try:
        child.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()
    _, survivors = psutil.wait_procs(family, timeout=CHILDREN_TIMEOUT_S)
    for survivor in survivors:
        survivor.kill()
