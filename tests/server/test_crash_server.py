"""Real servers, killed during real uploads: what was acknowledged answers after the next start."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from quickchange_server.cli import app
from typer.testing import CliRunner

from tests.conftest import MakeAdapter

START_S = 180.0
runner = CliRunner()
KILLS = (
    ("before reply", 2),
    ("after put.rename", 1),
    ("after publish.commit", 1),
    ("after reply", 1),
)
"""Where a server kills itself, and after how many committed uploads."""


class ServerParent:
    """Starts servers on one store, one after the other."""

    def __init__(self, base: Path, folder: Path) -> None:
        self._folder = folder
        self._arguments = ["--model", str(base), "--port", "0", "--store", str(folder / "store")]
        self._log = folder / "log"
        self.pid = 0
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.server.crash_server"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )

    def start(self, point: str | None, num_published: int = 0) -> str:
        """Start a server; return its address."""
        self._log.write_text("")
        order = {
            "arguments": self._arguments,
            "log": str(self._log),
            "point": point,
            "num_published": num_published,
        }
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        self.pid = int(self._read())
        deadline_s = time.monotonic() + START_S
        while time.monotonic() < deadline_s:
            if found := re.search(r"Ready after .* on (http://\S+):", self._log.read_text()):
                return found[1]
            time.sleep(0.02)
        raise TimeoutError(self._log.read_text())

    def wait(self) -> int:
        """Wait for the server's end; return the signal that killed it."""
        status, self.pid = int(self._read()), 0
        return os.WTERMSIG(status)

    def close(self) -> None:
        """End the parent, and the server that it may still have."""
        if self._process.poll() is None and self.pid:
            os.kill(self.pid, signal.SIGKILL)
        self._process.communicate(timeout=START_S)

    def _read(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline()


@pytest.fixture
def parent(tiny_base: Path, tmp_path: Path) -> Iterator[ServerParent]:
    parent = ServerParent(tiny_base, tmp_path)
    yield parent
    parent.close()


def upload(client: httpx.Client, name: str, folder: Path) -> httpx.Response:
    files = {
        "adapter_config": (folder / "adapter_config.json").read_bytes(),
        "adapter_model": (folder / "adapter_model.safetensors").read_bytes(),
    }
    return client.post("/v1/adapters", data={"name": name}, files=files)


def upload_until_killed(url: str, number: int, adapters: list[Path]) -> tuple[dict[str, str], str]:
    """Return the digests of what was acknowledged, and the name of what was not."""
    acknowledged: dict[str, str] = {}
    with httpx.Client(base_url=url, timeout=60) as client:
        for count in range(10):
            name = f"life-{number}-{count}"
            try:
                answer = upload(client, name, adapters[count % len(adapters)])
            except httpx.TransportError:
                return acknowledged, name
            assert answer.status_code == 201, answer.text
            acknowledged[name] = answer.json()["digest"]
    raise AssertionError("the server was not killed")


def check_served(url: str, acknowledged: dict[str, str], unanswered: list[str]) -> None:
    """Hold that everything acknowledged answers, and that the rest is whole or not there."""
    with httpx.Client(base_url=url, timeout=60) as client:
        for name in (*acknowledged, *unanswered):
            body = {"model": name, "prompt": "the quick", "max_tokens": 1, "temperature": 0}
            answer = client.post("/v1/completions", json=body)
            if name in acknowledged:
                assert answer.status_code == 200, (name, answer.text)
                assert answer.headers["x-quickchange-adapter-digest"] == acknowledged[name]
            else:
                assert answer.status_code in (200, 404), (name, answer.text)


def test_what_was_acknowledged_serves_after_sigkill_at_any_point(
    parent: ServerParent, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    adapters = [make_adapter()]
    acknowledged: dict[str, str] = {}
    unanswered: list[str] = []
    for number, (point, num_published) in enumerate(KILLS):
        url = parent.start(point, num_published)
        check_served(url, acknowledged, unanswered)
        new, lost = upload_until_killed(url, number, adapters)
        assert parent.wait() == signal.SIGKILL
        print(f"killed {point} after {num_published} uploads: {len(new)} were acknowledged")
        acknowledged |= new
        unanswered.append(lost)
    url = parent.start(None)
    check_served(url, acknowledged, unanswered)
    assert len(acknowledged) >= 4
    check_nothing_leaks(tmp_path / "store")


def check_nothing_leaks(store: Path) -> None:
    """Hold that `fsck`, beside the running server, finds leftovers at most, and removes them."""
    for path in (store / "incoming").iterdir():
        os.utime(path, (time.time() - 3700,) * 2)
    words = ["fsck", "--store", str(store), "--json"]
    report = json.loads(runner.invoke(app, words).stdout)
    assert {problem["code"] for problem in report["problems"]} <= {"incoming_left", "blob_unused"}
    assert runner.invoke(app, [*words, "--repair"]).exit_code == 0
    assert list((store / "incoming").iterdir()) == []
    assert json.loads(runner.invoke(app, words).stdout)["problems"] == []
