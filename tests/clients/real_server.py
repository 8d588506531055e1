"""The real server in a process of its own, started as people start it: `quickchange serve`."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from quickchange_client import NO_RETRIES, Quickchange, QuickchangeError

START_TIMEOUT_S = 90.0
STOP_TIMEOUT_S = 20.0
COMMAND = str(Path(sys.executable).with_name("quickchange"))


@contextmanager
def real_server(
    base: Path, store: Path, served_name: str, *, name: str = "server"
) -> Iterator[str]:
    """Give the address of a server for `base` that keeps its adapters in `store`.

    `name` tells the logs of several servers on one store apart.
    """
    url = f"http://127.0.0.1:{free_port()}"
    log = store.with_name(f"{store.name}-{name}.log")
    words = [COMMAND, "serve", "--model", str(base), "--served-model-name", served_name]
    words += ["--store", str(store), "--port", url.rpartition(":")[2], "--device", "cpu"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    with log.open("w") as output:
        process = subprocess.Popen(words, stdout=output, stderr=subprocess.STDOUT, env=env)
    try:
        wait_until_healthy(url, process, log)
        yield url
    finally:
        stop(process)


def wait_until_healthy(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    """Return when the server takes requests, and fail with its log when it does not come up."""
    deadline_s = time.monotonic() + START_TIMEOUT_S
    with Quickchange(url, retry=NO_RETRIES) as client:
        while time.monotonic() < deadline_s and process.poll() is None:
            try:
                client.health()
                return
            except QuickchangeError:
                time.sleep(0.1)
    raise AssertionError(f"the server did not start:\n{log.read_text()}")


def stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
