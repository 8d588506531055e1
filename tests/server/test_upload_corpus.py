"""A corpus of bad uploads against a whole server: each is refused by name, and nothing stays."""

import contextlib
import http.client
import json
import sqlite3
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

import pytest

from tests.conftest import MakeAdapter
from tests.server.bad_uploads import bad_uploads, combined_faults
from tests.server.server_process import Server
from tests.server.upload_forms import KIND, form

ROOMS_OF_AN_UPLOAD = (
    "adapters", "versions", "version_files", "aliases", "blobs", "reservations", "events",
)  # fmt: skip
BEAT_S = 0.02
# Bounds for a machine that is busy with other things; what was measured is printed.
MAX_BEAT_S = 5.0
MAX_ANSWER_S = 20.0


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Iterator[Server]:
    """A server as people start it, with worker, store and catalog."""
    folder = tmp_path_factory.mktemp("corpus")
    arguments = ["--model", str(tiny_base), "--served-model-name", "tiny"]
    server = Server(arguments, folder)
    try:
        yield server.wait_ready()
    finally:
        server.process.kill()
        server.process.wait()


@dataclass
class Heartbeat:
    """Asks /livez every 20 ms from a thread of its own, and remembers how long each answer took."""

    url: str
    waits_s: list[float] = field(default_factory=list)

    def __enter__(self) -> Self:
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        connection = connect(self.url)
        while not self._stop.wait(BEAT_S):
            started = time.perf_counter()
            connection.request("GET", "/livez")
            answer = connection.getresponse()
            answer.read()
            assert answer.status == 200
            self.waits_s.append(time.perf_counter() - started)
        connection.close()


def connect(url: str) -> http.client.HTTPConnection:
    place = urlsplit(url)
    assert place.hostname is not None
    return http.client.HTTPConnection(place.hostname, place.port, timeout=60)


def send(url: str, body: bytes, kind: str) -> tuple[int, Any, float]:
    """Upload; return status, answer, and the time from the last byte to the answer."""
    connection = connect(url)
    headers = {"content-type": kind} if kind else {}
    connection.putrequest("POST", "/v1/adapters")
    for name, value in {**headers, "content-length": str(len(body))}.items():
        connection.putheader(name, value)
    connection.endheaders()
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # refused before the last byte
        connection.send(body)
    started = time.perf_counter()
    answer = connection.getresponse()
    data = json.loads(answer.read())
    seconds = time.perf_counter() - started
    connection.close()
    return answer.status, data, seconds


def left_behind(server: Server) -> list[str]:
    """Return every file of the store, and every row of an adapter."""
    store = server.folder / "store"
    files = [str(path) for room in ("incoming", "blobs") for path in (store / room).rglob("*")]
    url = f"file:{store / 'catalog.sqlite'}?mode=ro"
    with contextlib.closing(sqlite3.connect(url, uri=True)) as database:
        rows = [
            f"{table}: {row}"
            for table in ROOMS_OF_AN_UPLOAD
            for row in database.execute(f"SELECT * FROM {table}").fetchall()
        ]
    return [path for path in files if Path(path).is_file()] + rows


def test_every_bad_upload_is_refused_by_name_and_livez_answers_meanwhile(
    server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = bad_uploads()
    assert len(corpus) >= 150
    slowest: tuple[float, str] = (0.0, "")
    wrong = []
    with Heartbeat(server.url) as heart:
        for each in corpus:
            status, answer, seconds = send(server.url, each.body, each.kind)
            slowest = max(slowest, (seconds, each.name))
            code = answer.get("error", {}).get("code")
            if (status, code) != (each.status, each.code):
                wrong.append(f"{each.name}: {each.status} {each.code}, not {status}: {answer}")
            else:
                wrong += [f"{each.name}: {why}" for why in faults_of_a_refusal(answer)]
            if left := left_behind(server):
                wrong.append(f"{each.name} left {left}")
                break
    assert not wrong, "\n".join(line[:500] for line in wrong)
    assert heart.waits_s
    with capsys.disabled():
        print(
            f"\n{len(corpus)} bad uploads; slowest answer {slowest[0]:.3f} s ({slowest[1]}); "
            f"{len(heart.waits_s)} beats, worst {max(heart.waits_s):.3f} s"
        )
    assert slowest[0] < MAX_ANSWER_S, slowest
    assert max(heart.waits_s) < MAX_BEAT_S


def faults_of_a_refusal(answer: Any) -> Iterator[str]:
    """Yield what is wrong with how an upload was refused."""
    if set(answer["error"]) != {"message", "type", "param", "code"}:
        yield f"an error of another shape: {answer}"
    problems = answer.get("problems", [])
    if not problems or problems[0]["code"] != answer["error"]["code"]:
        yield f"the first problem is not the error's: {answer}"
    if len(json.dumps(answer)) > 100_000:
        yield "an answer as long as an upload"
    if "/tmp/" in answer["error"]["message"] or "Traceback" in answer["error"]["message"]:
        yield f"it tells of the server's inside: {answer['error']['message']}"


def test_every_fault_is_said_at_once(server: Server) -> None:
    body, expected = combined_faults()
    status, answer, _ = send(server.url, body, KIND)
    assert status == 400
    found = {(problem["code"], problem["where"]) for problem in answer["problems"]}
    assert expected <= found
    assert all(problem["message"] for problem in answer["problems"])
    assert left_behind(server) == []


def test_after_all_that_a_good_one_is_served_at_once(
    server: Server, make_adapter: MakeAdapter
) -> None:
    folder = make_adapter(seed=1, std=0.3)
    names = ("adapter_config.json", "adapter_model.safetensors")
    config, weights = ((folder / name).read_bytes() for name in names)
    body = form(config, weights, "good")
    status, answer, _ = send(server.url, body, KIND)
    assert status == 201, answer
    texts = {m: server.generate(m).json()["choices"][0]["text"] for m in ("tiny", "good")}
    assert texts["tiny"] != texts["good"]
