"""The worker that checks uploads: what it gives, what it may not do, and what it dies of."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from quickchange_adapters.errors import CannotCheck, StoreUnavailable
from quickchange_adapters.limits import AdapterLimits, CheckLimits
from quickchange_adapters.report import Report
from quickchange_adapters.validate import ValidationJob
from quickchange_adapters.validation_process import ValidationProcess

from tests.adapters import check_jobs
from tests.adapters.adapter_files import config_values, pair, q_pairs, write_adapter
from tests.adapters.check_jobs import SPEC, Deed

MIB = 1 << 20
LIMITS = CheckLimits(max_cpu_s=1, max_wall_s=20, max_memory_bytes=64 * MIB)
END_S = 20.0


@pytest.fixture(scope="module")
def worker() -> Iterator[ValidationProcess]:
    """A worker that several tests use; none of them may hurt it."""
    process = ValidationProcess(LIMITS)
    yield process
    process.stop()


@pytest.fixture
def doomed() -> Iterator[ValidationProcess]:
    """A worker for one test, which may kill it."""
    process = ValidationProcess(LIMITS)
    yield process
    process.stop()


def codes(report: Report) -> list[str]:
    return [problem.code for problem in report.problems]


def test_its_reports_are_those_of_a_check_in_this_process(
    worker: ValidationProcess, tmp_path: Path
) -> None:
    good = write_adapter(tmp_path / "good", q_pairs(SPEC), config_values())
    bad = write_adapter(tmp_path / "bad", q_pairs(SPEC, 3), config_values(use_dora=True, r=0))
    for paths in (good, bad):
        job = ValidationJob(*paths, SPEC, AdapterLimits())
        report = worker.run(job)
        assert report == job.run()
        assert report.ok == (paths is good)


def described(worker: ValidationProcess) -> dict[str, Any]:
    report = worker.run(Deed(check_jobs.describe_itself))
    found: dict[str, Any] = json.loads(report.warnings[0])
    return found


def test_it_has_nothing_of_the_server_s_and_takes_what_others_leave(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hush")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.set_inheritable(True)
        process = ValidationProcess(LIMITS)
        try:
            found = described(process)
        finally:
            process.stop()
    assert found["heavy"] == []
    assert found["main"] == "quickchange_adapters.validation_worker"
    assert "AWS_SECRET_ACCESS_KEY" not in found["variables"]
    assert found["niceness"] >= min(os.nice(0) + 10, 19)
    assert (found["oom_score"], found["core"], found["session"]) == (1000, 0, True)
    sockets = [link for link in found["descriptors"].values() if link.startswith("socket:")]
    assert len(sockets) == 1, found["descriptors"]
    assert set(found["descriptors"]) <= {"0", "1", "2", "3"}


def test_it_can_write_no_file(worker: ValidationProcess) -> None:
    report = worker.run(Deed(check_jobs.write_a_file))
    assert json.loads(report.warnings[0]) == "OSError"


@pytest.mark.parametrize(
    ("what", "code", "message"),
    [
        (check_jobs.compute_for_ever, "too_large", "more than 1 s"),
        (check_jobs.take_memory, "too_large", "more than 64 MiB"),
        (check_jobs.make_a_mistake, "weights_invalid", "log"),
        (check_jobs.kill_itself, "weights_invalid", "signal 9"),
        (check_jobs.crash, "weights_invalid", "signal 11"),
        (check_jobs.leave, "weights_invalid", "exit code 3"),
        (check_jobs.answer_nonsense, "weights_invalid", "ended"),
        (check_jobs.answer_without_end, "weights_invalid", "ended"),
    ],
)
def test_what_a_check_cannot_finish_is_refused(
    doomed: ValidationProcess, what: Callable[[], Any], code: str, message: str
) -> None:
    report = doomed.run(Deed(what))
    assert codes(report) == [code]
    assert message in report.problems[0].message
    assert report.base == SPEC.name
    still_good = what is check_jobs.make_a_mistake
    assert doomed.is_usable == still_good
    assert psutil.pid_exists(doomed.pid) == (still_good or what is check_jobs.take_memory)


def test_a_check_that_waits_for_ever_ends_with_the_clock() -> None:
    process = ValidationProcess(CheckLimits(max_wall_s=0.5))
    try:
        process.wait_ready()
        report = process.run(Deed(check_jobs.sleep_for_ever))
        assert codes(report) == ["too_large"]
        assert "more than 0.5 s" in report.problems[0].message
        assert not process.is_usable
    finally:
        process.stop()


def test_seconds_are_counted_for_each_job_alone(worker: ValidationProcess) -> None:
    for _ in range(5):
        assert worker.run(Deed(compute_a_while)).ok


def compute_a_while() -> None:
    started = time.process_time()
    while time.process_time() - started < 0.5:
        pass


def test_files_that_are_gone_are_the_store_s_fault(worker: ValidationProcess) -> None:
    with pytest.raises(StoreUnavailable, match="No such file"):
        worker.run(Deed(check_jobs.read_nothing))


def test_a_worker_is_used_up_after_its_number_of_jobs() -> None:
    process = ValidationProcess(CheckLimits(max_jobs=2))
    try:
        for is_usable in (True, False):
            assert process.run(Deed(check_jobs.do_nothing)).ok
            assert process.is_usable == is_usable
    finally:
        process.stop()


def test_a_worker_that_does_not_start_is_said() -> None:
    process = ValidationProcess(CheckLimits(max_memory_bytes=-(1 << 70)))
    with pytest.raises(CannotCheck, match="cannot be started"):
        process.run(Deed(check_jobs.do_nothing))


def test_memory_does_not_grow_with_an_upload(worker: ValidationProcess, tmp_path: Path) -> None:
    spec, tensors = wide_adapter()
    assert sum(tensor.nbytes for tensor in tensors.values()) > LIMITS.max_memory_bytes
    config = config_values(r=64, target_modules=["lm_head"])
    paths = write_adapter(tmp_path, tensors, config)
    report = worker.run(ValidationJob(*paths, spec, AdapterLimits()))
    assert report.ok, report.problems
    assert report.modules[0].rank == 64


def wide_adapter() -> Any:
    from dataclasses import replace

    from quickchange_adapters.base_spec import ModuleSpec

    spec = replace(SPEC, modules={"lm_head": ModuleSpec("lm_head", 70_000, 300_000)})
    return spec, pair("lm_head", spec, 64)


PARENT = """
import sys
from quickchange_adapters.limits import CheckLimits
from quickchange_adapters.validation_process import ValidationProcess
from tests.adapters.check_jobs import Deed, do_nothing, sleep_for_ever, compute_for_ever
print("ran", flush=True)
process = ValidationProcess(CheckLimits())
process.wait_ready()
print(process.pid, flush=True)
if len(sys.argv) > 1:
    process.run(Deed(eval(sys.argv[1])))
print(process.run(Deed(do_nothing)).ok, flush=True)
"""


@pytest.fixture
def parent_script(tmp_path: Path) -> Path:
    """A program without a guard around what it does: whoever imports it runs it."""
    path = tmp_path / "parent.py"
    path.write_text(PARENT)
    return path


def start_parent(script: Path, *arguments: str) -> "subprocess.Popen[str]":
    paths = os.pathsep.join(path for path in sys.path if path)
    return subprocess.Popen(
        [sys.executable, str(script), *arguments],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": paths},
    )


def test_the_program_that_starts_a_worker_is_not_run_again_in_it(parent_script: Path) -> None:
    with start_parent(parent_script) as parent:
        lines = (parent.communicate(timeout=60)[0]).split()
    assert (lines[0], lines[2:]) == ("ran", ["True"])
    wait_gone(int(lines[1]))


@pytest.mark.parametrize("what", ["sleep_for_ever", "compute_for_ever"])
def test_a_killed_server_leaves_no_worker(parent_script: Path, what: str) -> None:
    with start_parent(parent_script, what) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == "ran\n"
        pid = int(parent.stdout.readline())
        assert psutil.pid_exists(pid)
        parent.send_signal(signal.SIGKILL)
        parent.wait()
    wait_gone(pid)


def wait_gone(pid: int) -> None:
    """Wait for a process that is nobody's child any more; a container's init may not reap it."""
    deadline_s = time.monotonic() + END_S
    while time.monotonic() < deadline_s:
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return
        except psutil.NoSuchProcess:
            return
        time.sleep(0.02)
    pytest.fail(f"the worker {pid} is still there")
