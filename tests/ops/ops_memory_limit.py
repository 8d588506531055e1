"""A server under a memory limit that the kernel enforces, flooded with more than fits.

Needs root, and a cgroup that limits memory.
"""

import os
import random
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from benchmarks.make_adapters import LINEARS, AdapterShape, write_adapters
from tests.ops.environments import NotHere
from tests.ops.memory_cgroup import MemoryCgroup, memory_cgroup
from tests.server.server_process import Server, run_command

MIB = 1 << 20
FLOOD_S = float(os.environ.get("QUICKCHANGE_FLOOD_S", "60"))
NUM_CLIENTS, NUM_ADAPTERS = 40, 24
NUM_WORDS = (5, 50, 200, 800)
EXPECTED = {200, 201, 409, 429, 503}


@contextmanager
def limited(limit_bytes: int) -> Iterator[MemoryCgroup]:
    try:
        with memory_cgroup(limit_bytes) as cgroup:
            yield cgroup
    except NotHere as reason:
        pytest.skip(f"no memory limit: {reason}")


@pytest.fixture(scope="module")
def base() -> Path:
    return Path(run_command("base", "path").stdout.strip())


@pytest.fixture(scope="module")
def adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("adapters")
    return write_adapters(base, folder, NUM_ADAPTERS, AdapterShape(16, LINEARS, "bfloat16"))


class Flood:
    """Clients that ask, merge, pin and unload at random, and what they were answered."""

    def __init__(self, url: str, cgroup: MemoryCgroup, names: list[str], seed: int) -> None:
        self.answers: Counter[tuple[str, int]] = Counter()
        self.most_bytes = 0
        self._cgroup = cgroup
        self._names = names
        self._seed = seed
        self._client = httpx.Client(base_url=url, timeout=300, limits=httpx.Limits())
        self._lock = threading.Lock()

    def run(self, seconds: float) -> None:
        """Return when the time is over and every request was answered."""
        until_s = time.monotonic() + seconds
        with ThreadPoolExecutor(NUM_CLIENTS + 1) as pool:
            asking = [pool.submit(self._ask, until_s, number) for number in range(NUM_CLIENTS)]
            watching = pool.submit(self._watch, until_s)
            for each in (*asking, watching):
                each.result()

    def _watch(self, until_s: float) -> None:
        while time.monotonic() < until_s:
            self.most_bytes = max(self.most_bytes, self._cgroup.used_bytes)
            time.sleep(0.1)

    def _ask(self, until_s: float, number: int) -> None:
        rng = random.Random(self._seed + number)
        while time.monotonic() < until_s:
            model = rng.choice(self._names)
            if rng.random() < 0.05:
                action = rng.choice(("merge", "unmerge", "pin", "unpin", "load", "unload"))
                answer = self._client.post(f"/v1/adapters/{model}/{action}")
                self._note("state", answer)
                continue
            words = " ".join(str(rng.randrange(10_000)) for _ in range(rng.choice(NUM_WORDS)))
            body = {"model": model, "prompt": words, "max_tokens": rng.choice((4, 16, 64))}
            self._note("ask", self._client.post("/v1/completions", json=body))

    def _note(self, kind: str, answer: httpx.Response) -> None:
        with self._lock:
            self.answers[kind, answer.status_code] += 1
        assert answer.status_code in EXPECTED, answer.text


def test_a_flood_under_a_real_limit_is_answered_and_nobody_is_killed(
    base: Path, adapters: list[Path], tmp_path: Path
) -> None:
    """KV cache, adapters in both memories and merged copies are all full, and more is asked for."""
    with limited(1536 * MIB) as cgroup:
        server = Server(["--model", str(base), "--max-queue", "64"], tmp_path, cgroup.prefix)
        try:
            url = server.wait_ready().url
            flood = Flood(url, cgroup, [upload(url, each) for each in adapters], seed=7)
            flood.run(FLOOD_S)
            assert server.process.poll() is None, server.log.read_text()[-3000:]
            assert server.generate("bench-000", max_tokens=4).status_code == 200
        finally:
            code = server.stop()
        print(dict(flood.answers), f"{flood.most_bytes / MIB:.0f} MiB at most")
        assert code == 0
        assert cgroup.num_kills == 0
        assert flood.most_bytes < 0.95 * 1536 * MIB
        assert flood.answers["ask", 200] > NUM_CLIENTS


def test_a_base_that_cannot_fit_is_one_sentence(base: Path, tmp_path: Path) -> None:
    with limited(700 * MIB) as cgroup:
        server = Server(["--model", str(base)], tmp_path, cgroup.prefix)
        assert server.process.wait(120) == 2
        log = server.log.read_text()
        assert "the cgroup's limit" in log
        assert "Traceback" not in log
        assert cgroup.num_kills == 0


def upload(url: str, folder: Path) -> str:
    """Upload a folder; return the adapter's name."""
    files = {
        "adapter_config": (folder / "adapter_config.json").read_bytes(),
        "adapter_model": (folder / "adapter_model.safetensors").read_bytes(),
    }
    answer = httpx.post(f"{url}/v1/adapters", data={"name": folder.name}, files=files, timeout=120)
    assert answer.status_code == 201, answer.text
    return folder.name
