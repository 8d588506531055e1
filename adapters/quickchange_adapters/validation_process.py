"""One worker process for checks, as its parent sees it. Blocks; lives in whichever thread calls.

The worker gets jobs as pickles and answers in JSON: what a stranger's bytes may have done to it
comes back as data, never as objects. An upload that the worker dies of is refused like any other.
"""

import contextlib
import json
import logging
import os
import pickle
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, Protocol

from quickchange_adapters.base_spec import BaseSpec
from quickchange_adapters.errors import CannotCheck, Problem, StoreUnavailable
from quickchange_adapters.job_channel import JobChannel
from quickchange_adapters.limits import MIB, CheckLimits
from quickchange_adapters.report import Report, refused

WORKER_MODULE = "quickchange_adapters.validation_worker"
WEIGHTS = "adapter_model.safetensors"
START_S = 120.0
END_S = 10.0
MAX_ANSWER_BYTES = 1 << 26
# Nothing else of the server's surroundings is the worker's business, least of all its secrets.
PASSED_VARIABLES = ("PATH", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "PYTHONHOME", "TZ")

log = logging.getLogger(__name__)


class CheckJob(Protocol):
    """What a worker can do: picklable, and `run` gives the report."""

    @property
    def spec(self) -> BaseSpec:
        """The base that an upload is checked against."""

    def run(self) -> Report:
        """Do the job here and now."""


class ValidationProcess:
    """A worker that does one job after the other, until it is stopped or dies of one."""

    def __init__(self, limits: CheckLimits) -> None:
        self._limits = limits
        self._is_ready = False
        self._num_jobs = 0
        ours, theirs = socket.socketpair()
        self._channel = JobChannel(ours)
        try:
            with theirs:
                self._process: subprocess.Popen[bytes] = subprocess.Popen(
                    [sys.executable, "-P", "-m", WORKER_MODULE, json.dumps(asdict(limits))],
                    stdin=theirs.fileno(),
                    stdout=subprocess.DEVNULL,
                    start_new_session=True,
                    env=_surroundings(),
                )
        except OSError as error:
            ours.close()
            raise _cannot_start(error.strerror or type(error).__name__) from error

    @property
    def pid(self) -> int:
        """The worker's process id."""
        return self._process.pid

    @property
    def is_usable(self) -> bool:
        """Whether it lives, and has not yet done as many jobs as one worker does."""
        return self._num_jobs < self._limits.max_jobs and self._process.poll() is None

    def wait_ready(self) -> None:
        """Return when the worker takes jobs.

        Raises: CannotCheck.
        """
        if not self._is_ready:
            try:
                self._channel.receive(MAX_ANSWER_BYTES, time.monotonic() + START_S)
            except (OSError, EOFError, ValueError) as error:
                self.stop()
                raise _cannot_start(f"it ended with {self._process.returncode}") from error
            self._is_ready = True

    def run(self, job: CheckJob) -> Report:
        """Do one job and return its report; one that the worker cannot finish is refused.

        Raises: CannotCheck when there is no worker; StoreUnavailable when the files cannot be read.
        """
        self.wait_ready()
        self._num_jobs += 1
        deadline_s = time.monotonic() + self._limits.max_wall_s
        try:
            self._channel.send(pickle.dumps(job), deadline_s)
            answer = json.loads(self._channel.receive(MAX_ANSWER_BYTES, deadline_s))
            return self._report(answer, job)
        except TimeoutError:
            self.stop()
            return self._too_long(job, self._limits.max_wall_s)
        except (OSError, EOFError, ValueError, TypeError, KeyError):
            return self._died(job)

    def kill(self) -> None:
        """End the worker now, from any thread; whoever waits for its answer gets a refusal."""
        self._process.kill()

    def stop(self) -> None:
        """End the worker now, and forget it; a repeat is a no-op. Nobody may be in `run`."""
        self._channel.close()
        self.kill()
        self._process.wait()

    def _report(self, answer: Mapping[str, Any], job: CheckJob) -> Report:
        if "report" in answer:
            return Report.from_plain(answer["report"])
        if "unreadable" in answer:
            raise StoreUnavailable(f"an upload cannot be read: {answer['unreadable']}")
        if "exhausted" in answer:
            self._num_jobs = self._limits.max_jobs  # a fresh one has its memory in one piece
            num_mib = self._limits.max_memory_bytes // MIB
            return _refused(job, "too_large", f"checking it took more than {num_mib} MiB of memory")
        log.error("checking an upload went wrong:\n%s", answer["mistake"])
        return _refused(job, "weights_invalid", "checking it went wrong; the server's log says how")

    def _died(self, job: CheckJob) -> Report:
        """Refuse what the worker died of, or answered nonsense to; its socket's end ends it."""
        self._channel.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(END_S)
        self.stop()
        code = self._process.returncode
        if code == -signal.SIGXCPU:
            return self._too_long(job, self._limits.max_cpu_s)
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        log.error("a process that checked an upload ended with %s", how)
        return _refused(job, "weights_invalid", f"the process that checked it ended with {how}")

    def _too_long(self, job: CheckJob, max_s: float) -> Report:
        return _refused(job, "too_large", f"checking it took more than {max_s:g} s")


def _refused(job: CheckJob, code: str, message: str) -> Report:
    return refused([Problem(code, WEIGHTS, message)], job.spec)


def _cannot_start(why: str) -> CannotCheck:
    return CannotCheck(f"the process that checks uploads cannot be started: {why}")


def _surroundings() -> dict[str, str]:
    """Return the worker's variables: it finds modules where we do, and computes on one thread."""
    passed = {name: os.environ[name] for name in PASSED_VARIABLES if name in os.environ}
    return passed | {
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "MALLOC_ARENA_MAX": "1",  # a second arena would take much of the memory that it may have
    }
