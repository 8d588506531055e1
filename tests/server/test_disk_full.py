"""A disk that fails at every single write: the answer says so, and nothing is lost or left."""

import errno
import json
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import torch
from quickchange_adapters import fault_points
from quickchange_adapters.catalog import Catalog, sqlite_url
from quickchange_adapters.limits import AdapterLimits
from quickchange_adapters.store import LocalStore
from quickchange_adapters.store_check import StoreCheck
from quickchange_server.adapter_service import AdapterService
from quickchange_server.api.app import AppServices, create_app
from quickchange_server.metrics import ServerMetrics
from quickchange_server.tokenizer import Tokenizer

from tests.adapters.adapter_files import config_values, q_pairs, small_spec, weights_bytes
from tests.server.conftest import serve_in_process
from tests.server.failing_disk import FailingDisk, Faults
from tests.server.scripted_engine import ScriptedEngine

SPEC = small_spec()
IN_NAMESPACE = ("unshare", "--user", "--map-root-user", "--mount")
MAX_CALLS = 60
FULL, BROKEN = (507, "storage_full"), (503, "store_unavailable")


@dataclass
class Edge:
    """An app over a disk that fails on demand, with `kept:1` and `kept:2` uploaded."""

    root: Path
    faults: Faults
    client: httpx.AsyncClient
    catalog: Catalog
    store: LocalStore

    async def upload(self, name: str, seed: int) -> httpx.Response:
        tensors = {name: array + seed for name, array in q_pairs(SPEC).items()}
        files = {
            "adapter_config": json.dumps(config_values()).encode(),
            "adapter_model": weights_bytes(tensors),
        }
        return await self.client.post("/v1/adapters", data={"name": name}, files=files)

    async def serves(self, model: str) -> bool:
        body = {"model": model, "prompt": "the quick", "max_tokens": 2}
        return (await self.client.post("/v1/completions", json=body)).status_code == 200

    def blobs(self) -> set[str]:
        return {blob.sha256 for blob in self.store.list()}

    def incoming(self) -> int:
        return len(list((self.root / "incoming").iterdir()))


@pytest.fixture
async def edge(tmp_path: Path, tokenizer: Tokenizer) -> AsyncIterator[Edge]:
    faults = Faults()
    store = LocalStore(tmp_path, FailingDisk(faults))
    catalog = Catalog(sqlite_url(tmp_path / "catalog.db"))
    engine = ScriptedEngine(base=SPEC)
    service = AdapterService(engine, store, catalog, AdapterLimits(), torch.float32)
    app = create_app(AppServices(engine, service, tokenizer, ServerMetrics()))
    fault_points.observe(faults.on_point)
    try:
        async for client in serve_in_process(app):
            edge = Edge(tmp_path, faults, client, catalog, store)
            assert (await edge.upload("kept", 1)).status_code == 201
            assert (await edge.upload("kept", 2)).status_code == 201
            yield edge
    finally:
        fault_points.observe(None)


def check_refusal(answer: httpx.Response, expected: tuple[int, str]) -> None:
    """Hold that an answer is this refusal, says what to do, and tells no path."""
    body = answer.json()["error"]
    assert (answer.status_code, body["code"]) == expected
    assert "secret" not in answer.text
    if expected == FULL:
        assert answer.headers["x-should-retry"] == "false"
        assert "make room" in body["message"]
    else:
        assert int(answer.headers["retry-after"]) > 0


async def fail_each_call(
    edge: Edge,
    act: Callable[[], Awaitable[httpx.Response]],
    after_failure: Callable[[httpx.Response], Awaitable[None]],
    number: int,
    is_lasting: bool,
) -> int:
    """Do something, its first, second, … call failing, until it succeeds; return how often not."""
    for fail_at in range(1, MAX_CALLS):
        edge.faults.arm(fail_at, number, is_lasting=is_lasting)
        answer = await act()
        edge.faults.heal()
        if answer.status_code in (200, 201):
            return fail_at - 1
        await after_failure(answer)
    raise AssertionError("it never succeeded")


@pytest.mark.parametrize(
    ("number", "is_lasting", "expected"),
    [
        (errno.ENOSPC, False, FULL),
        (errno.ENOSPC, True, FULL),
        (errno.EDQUOT, False, FULL),
        (errno.EIO, False, BROKEN),
        (errno.EIO, True, BROKEN),
        (errno.EACCES, True, BROKEN),
        (errno.EROFS, True, BROKEN),
    ],
)
async def test_an_upload_that_fails_at_any_write_leaves_nothing_and_the_next_one_works(
    edge: Edge, number: int, is_lasting: bool, expected: tuple[int, str]
) -> None:
    before = edge.blobs()
    can_tidy = expected == FULL or not is_lasting

    async def check(answer: httpx.Response) -> None:
        check_refusal(answer, expected)
        assert (await edge.client.get("/v1/adapters/new")).status_code == 404
        assert await edge.serves("kept:1")
        if can_tidy:
            assert edge.incoming() == 0
        if not is_lasting:
            assert edge.blobs() == before

    num_failed = await fail_each_call(
        edge, lambda: edge.upload("new", 3), check, number, is_lasting
    )
    # Two files: made, written, synced, put in three calls and more; two commits.
    assert num_failed >= 14
    assert await edge.serves("new")
    assert await edge.serves("kept:2")
    if not can_tidy:
        for path in (edge.root / "incoming").iterdir():
            path.unlink()
    report = StoreCheck(edge.store, edge.catalog).run()
    # What could not be tidied up while the disk was away is a leftover, and never a loss.
    assert {finding.code for finding in report.findings} <= {"blob_unused"}
    assert edge.incoming() == 0


@pytest.mark.parametrize(("number", "expected"), [(errno.ENOSPC, FULL), (errno.EIO, BROKEN)])
async def test_an_alias_that_cannot_be_moved_stays(
    edge: Edge, number: int, expected: tuple[int, str]
) -> None:
    async def move() -> httpx.Response:
        return await edge.client.put("/v1/adapters/kept/aliases/default", json={"version": 2})

    async def check(answer: httpx.Response) -> None:
        check_refusal(answer, expected)
        shown = (await edge.client.get("/v1/adapters/kept")).json()
        assert shown["aliases"] == {"default": 1}

    assert await fail_each_call(edge, move, check, number, is_lasting=True) == 1
    assert (await edge.client.get("/v1/adapters/kept")).json()["aliases"] == {"default": 2}


async def test_a_deletion_is_refused_whole_or_begun_and_ended_behind(edge: Edge) -> None:
    edge.faults.arm(1, errno.ENOSPC, is_lasting=True)
    check_refusal(await edge.client.delete("/v1/adapters/kept"), FULL)
    edge.faults.heal()
    assert await edge.serves("kept")
    edge.faults.arm(2, errno.ENOSPC, is_lasting=True)
    answer = await edge.client.delete("/v1/adapters/kept")
    edge.faults.heal()
    # The name is gone for good; its rows and bytes go with the next sweep.
    assert answer.status_code == 202
    assert not await edge.serves("kept")
    assert len(edge.catalog.list_deleting()) == 2


def namespaces() -> str | None:
    """Return why no file system can be mounted here without being root; None if it can."""
    words = [*IN_NAMESPACE, "mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", "/mnt"]
    try:
        done = subprocess.run(words, capture_output=True, text=True)
    except FileNotFoundError:
        return "there is no program unshare"
    return f"no mounts in a namespace: {done.stderr.strip()}" if done.returncode else None


def test_uploads_onto_a_disk_that_is_really_full(tmp_path: Path) -> None:
    if reason := namespaces():
        pytest.skip(reason)
    words = [*IN_NAMESPACE, sys.executable, "-m", "tests.server.full_disk_run", str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    told = [each.partition(":")[0] for each in found["told"] if each]
    # With less than a page nothing can be staged; with a little more, no row can be written.
    assert {"an upload cannot be written", "the catalog has no room"} == set(told)
    assert found["told"][-1] is None
    assert "'incoming' cannot be written to; name a folder that can be" in found["read_only"]
