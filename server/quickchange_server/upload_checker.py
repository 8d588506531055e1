"""Upload checks in processes of their own: one warm from the start, a second when it is busy.

Whatever an upload does to its check, it does to a process that holds nothing of the server's.
Source: decision 15.
"""

import asyncio
import contextlib
import threading
from concurrent.futures import ThreadPoolExecutor

from quickchange_adapters.errors import CannotCheck
from quickchange_adapters.limits import CheckLimits
from quickchange_adapters.report import Report
from quickchange_adapters.validation_process import CheckJob, ValidationProcess

from quickchange_server.answers import as_answers

MAX_CHECKS = 2


class UploadChecker:
    """Runs jobs in worker processes; those beyond `MAX_CHECKS` wait. Implements `Validator`.

    A worker is replaced when it died of an upload, took too long, or did its number of jobs.
    """

    def __init__(self, limits: CheckLimits | None = None) -> None:
        self._threads = ThreadPoolExecutor(MAX_CHECKS, "quickchange-check")
        self._workers = [_Worker(limits or CheckLimits()) for _ in range(MAX_CHECKS)]
        self._idle = list(self._workers)  # as many as threads; the one used last is used next

    def warm_up(self) -> None:
        """Start the first worker in the background; should that fail, the first job says so."""
        self._threads.submit(self._idle[-1].renew)

    async def validate(self, job: CheckJob) -> Report:
        """Do one job and return its report; a caller that is cancelled does not end it.

        Raises: Unavailable when no worker can be started, or the files cannot be read.
        """
        with as_answers():
            return await asyncio.get_running_loop().run_in_executor(self._threads, self._run, job)

    async def stop(self) -> None:
        """End all workers, whatever they are doing."""
        for worker in self._workers:
            worker.end()
        await asyncio.to_thread(self._threads.shutdown, cancel_futures=True)
        for worker in self._workers:
            await asyncio.to_thread(worker.forget)

    def _run(self, job: CheckJob) -> Report:
        worker = self._idle.pop()
        try:
            return worker.run(job)
        finally:
            self._idle.append(worker)


class _Worker:
    """One worker process after the other. `end` may come from any thread, the rest from one."""

    def __init__(self, limits: CheckLimits) -> None:
        self._limits = limits
        self._process: ValidationProcess | None = None
        self._lock = threading.Lock()
        self._has_ended = False

    def run(self, job: CheckJob) -> Report:
        try:
            return self._usable().run(job)
        finally:
            self.renew()

    def renew(self) -> None:
        """Have the next process start while nobody waits for it."""
        with contextlib.suppress(CannotCheck):
            self._usable()

    def end(self) -> None:
        with self._lock:
            self._has_ended = True
            if self._process is not None:
                self._process.kill()

    def forget(self) -> None:
        """Take leave of the ended process; nobody is in `run` any more."""
        if self._process is not None:
            self._process.stop()

    def _usable(self) -> ValidationProcess:
        with self._lock:
            if self._has_ended:
                raise CannotCheck("the server is stopping")
            if self._process is None or not self._process.is_usable:
                if self._process is not None:
                    self._process.stop()
                self._process = ValidationProcess(self._limits)
            return self._process
