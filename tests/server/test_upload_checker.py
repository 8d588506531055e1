"""Checks in worker processes: who waits for whom, and what is there after a crash."""

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
from quickchange_adapters.catalog import Catalog, sqlite_url
from quickchange_adapters.limits import AdapterLimits, CheckLimits
from quickchange_adapters.report import Report
from quickchange_adapters.store import LocalStore
from quickchange_adapters.validation_process import CheckJob
from quickchange_server.adapter_service import AdapterService
from quickchange_server.api.app import AppServices, create_app
from quickchange_server.errors import Unavailable
from quickchange_server.upload_checker import MAX_CHECKS, UploadChecker

from tests.adapters.check_jobs import (
    SPEC,
    Deed,
    compute_for_ever,
    describe_itself,
    kill_itself,
    read_nothing,
    sleep_for_ever,
    take_memory,
)
from tests.server.conftest import serve_in_process
from tests.server.scripted_engine import ScriptedEngine
from tests.server.upload_forms import KIND, form


@pytest.fixture
async def checker() -> AsyncIterator[UploadChecker]:
    checker = UploadChecker(CheckLimits(max_cpu_s=1, max_wall_s=60))
    checker.warm_up()
    yield checker
    await checker.stop()


def pid_of(report: Report) -> int:
    return int(json.loads(report.warnings[0])["pid"])


def workers() -> list[psutil.Process]:
    mine = psutil.Process().children()
    return [child for child in mine if "validation_worker" in " ".join(child.cmdline())]


async def test_one_worker_does_one_job_after_the_other(checker: UploadChecker) -> None:
    pids = {pid_of(await checker.validate(Deed(describe_itself))) for _ in range(4)}
    assert len(pids) == 1
    assert [worker.pid for worker in workers()] == list(pids)


async def test_a_slow_check_holds_up_nobody_else(checker: UploadChecker) -> None:
    slow = asyncio.create_task(checker.validate(Deed(compute_for_ever)))
    pids = {pid_of(await checker.validate(Deed(describe_itself))) for _ in range(3)}
    assert not slow.done()
    assert len(pids) == 1
    assert len(workers()) == MAX_CHECKS
    assert [problem.code for problem in (await slow).problems] == ["too_large"]


async def test_after_a_crash_the_next_upload_is_checked(checker: UploadChecker) -> None:
    before = pid_of(await checker.validate(Deed(describe_itself)))
    for _ in range(2):
        report = await checker.validate(Deed(kill_itself))
        assert [problem.code for problem in report.problems] == ["weights_invalid"]
    after = pid_of(await checker.validate(Deed(describe_itself)))
    assert after != before
    assert [worker.pid for worker in workers()] == [after]


async def test_a_worker_that_died_in_its_sleep_is_replaced(checker: UploadChecker) -> None:
    pid = pid_of(await checker.validate(Deed(describe_itself)))
    (worker,) = workers()
    worker.kill()
    psutil.wait_procs([worker], timeout=10)
    assert pid_of(await checker.validate(Deed(describe_itself))) != pid


async def test_a_caller_who_leaves_ends_no_worker(checker: UploadChecker) -> None:
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(checker.validate(Deed(compute_for_ever)), 0.2)
    assert (await checker.validate(Deed(describe_itself))).ok


async def test_stopping_ends_a_worker_in_the_middle_of_a_job(checker: UploadChecker) -> None:
    await checker.validate(Deed(describe_itself))
    busy = asyncio.create_task(checker.validate(Deed(sleep_for_ever)))
    await asyncio.sleep(0.1)
    await asyncio.wait_for(checker.stop(), 30)
    assert not (await busy).ok
    assert workers() == []
    with pytest.raises(RuntimeError):
        await checker.validate(Deed(describe_itself))


async def test_without_a_worker_and_without_files_it_is_not_the_caller_s_fault(
    checker: UploadChecker,
) -> None:
    with pytest.raises(Unavailable) as gone:
        await checker.validate(Deed(read_nothing))
    assert gone.value.code == "store_unavailable"
    broken = UploadChecker(CheckLimits(max_memory_bytes=-(1 << 70)))
    with pytest.raises(Unavailable, match="cannot be started"):
        await broken.validate(Deed(describe_itself))
    await broken.stop()


class Unlucky(UploadChecker):
    """Does these deeds in the place of the first uploads' checks."""

    deeds = [kill_itself, take_memory, compute_for_ever]

    async def validate(self, job: CheckJob) -> Report:
        deed = self.deeds.pop(0) if self.deeds else None
        return await super().validate(job if deed is None else Deed(deed))


async def test_an_upload_that_ends_its_worker_is_refused_and_the_next_one_served(
    services: AppServices, tmp_path: Path
) -> None:
    checker = Unlucky(CheckLimits(max_cpu_s=1, max_memory_bytes=64 << 20))
    store, catalog = LocalStore(tmp_path), Catalog(sqlite_url(tmp_path / "catalog.db"))
    engine = ScriptedEngine(base=SPEC)
    service = AdapterService(engine, store, catalog, AdapterLimits(), torch.float32, checker)
    answers = []
    app = create_app(replace(services, engine=engine, adapters=service))
    async for client in serve_in_process(app):
        for _ in range(4):
            answer = await client.post(
                "/v1/adapters", content=form(name="ada"), headers={"content-type": KIND}
            )
            answers.append((answer.status_code, answer.json().get("error", {}).get("code")))
            assert list((tmp_path / "incoming").iterdir()) == []
            assert (await client.get("/livez")).status_code == 200
    refused = [(400, "weights_invalid"), (413, "too_large"), (413, "too_large")]
    assert answers == [*refused, (201, None)]
    assert workers() == []
