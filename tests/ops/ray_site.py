"""A local Ray with the application on it, as a process of its own with its descendants."""

import os
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import psutil

from benchmarks.machine import ROOT
from tests.clients.real_server import free_port

START_S = 180.0
STOP_S = 60.0
ENGINE = "ray::ServeReplica:default:engine"


class RaySite:
    """`url` answers once the constructor returned."""

    def __init__(self, python: Path, arguments: list[str], folder: Path) -> None:
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        self.log = folder / "ray.log"
        token = new_token(folder)
        self._sockets = Path(tempfile.mkdtemp(prefix="qc-ray-"))  # their paths must be short
        script = str(ROOT / "tests/ops/ray_cluster.py")
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [str(python), script, str(port), str(self._sockets), *arguments],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment(token),
            )

    def wait_ready(self) -> None:
        """Wait until all replicas serve."""
        end_s = time.monotonic() + START_S
        while "\nserving\n" not in self.log.read_text():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < end_s, self.log.read_text()
            time.sleep(0.1)

    def engines(self) -> dict[str, psutil.Process]:
        """Return the processes of engines by the replica's id, which is in their log's name."""
        found: dict[str, psutil.Process] = {}
        for process in psutil.Process(self.process.pid).children(recursive=True):
            try:
                is_engine = process.name().startswith("ray::") and any(
                    word.startswith(ENGINE) for word in process.cmdline()
                )
                logs = [Path(file.path).stem for file in process.open_files()] if is_engine else []
            except psutil.NoSuchProcess:
                continue
            found |= {
                log.rpartition("_")[2]: process
                for log in logs
                if log.startswith("replica_default_engine_")
            }
        return found

    def replicas(self, client: httpx.Client, num_requests: int = 12) -> set[str]:
        """Return the replicas that answer requests which any may answer."""
        answers = (client.get("/version") for _ in range(num_requests))
        return {answer.headers.get("x-quickchange-replica", "") for answer in answers} - {""}

    def stop(self) -> int:
        """Stop in order; kill whatever is left. Returns the exit code."""
        started = psutil.Process(self.process.pid).children(recursive=True)
        self.process.terminate()
        try:
            return self.process.wait(STOP_S)
        finally:
            self.process.kill()
            for process in started:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            shutil.rmtree(self._sockets, ignore_errors=True)


@contextmanager
def ray_site(python: Path, arguments: list[str], folder: Path) -> Iterator[RaySite]:
    """Give a site, and take all of it down."""
    site = RaySite(python, arguments, folder)
    try:
        site.wait_ready()
        yield site
    finally:
        code = site.stop()
    assert code == 0, site.log.read_text()


def new_token(folder: Path) -> Path:
    """Write what Ray's own processes show each other."""
    token = folder / "token"
    token.write_text(secrets.token_hex(32))
    return token


def environment(token: Path) -> dict[str, str]:
    """Return the variables of a Ray that loads this checkout."""
    paths = [str(ROOT), *(str(ROOT / part) for part in ("server", "adapters"))]
    ours = {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(paths),
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    return {**os.environ, **ours}


@contextmanager
def serve_command(python: Path, words: list[str], folder: Path, port: int) -> Iterator[str]:
    """Run `serve run`, with a Ray of its own; give the address once the application answers."""
    url, log = f"http://127.0.0.1:{port}", folder / "serve.log"
    sockets = tempfile.mkdtemp(prefix="qc-ray-")
    with log.open("w") as output:
        process = subprocess.Popen(
            [str(python.with_name("serve")), "run", *words],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment(new_token(folder)) | {"RAY_TMPDIR": sockets},
        )
    try:
        end_s = time.monotonic() + START_S
        while not _answers(url):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < end_s, log.read_text()
            time.sleep(0.5)
        yield url
    finally:
        started = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(STOP_S)
        process.kill()
        for each in started:
            with suppress(psutil.NoSuchProcess):
                each.kill()
        shutil.rmtree(sockets, ignore_errors=True)


def _answers(url: str) -> bool:
    with suppress(httpx.HTTPError):
        return httpx.get(f"{url}/readyz", timeout=5).status_code == 200
    return False
