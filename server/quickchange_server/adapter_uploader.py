"""An upload's way from its form to a committed version."""

import asyncio
import logging
import secrets
from collections.abc import Awaitable, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Protocol

from quickchange_adapters.base_spec import BaseSpec
from quickchange_adapters.errors import StoreUnavailable
from quickchange_adapters.limits import AdapterLimits
from quickchange_adapters.publication import keep_files, publish_kept
from quickchange_adapters.records import NewVersion, Published
from quickchange_adapters.report import Report, refused
from quickchange_adapters.store import StagedFile, Store, unavailable
from quickchange_adapters.task import TaskReading
from quickchange_adapters.validate import ValidationJob

from quickchange_server.adapter_probe import NotProbed, Probe
from quickchange_server.adapter_upload import (
    UploadForm,
    by_part,
    file_records,
    form_problems,
    read_task_part,
    refusal,
)
from quickchange_server.answers import as_answers
from quickchange_server.live_catalog import LiveCatalog
from quickchange_server.shared_tasks import SharedTasks

MAX_CHECKS = 2
MAX_SENT = 2
"""Uploads whose files go into the store at once. Threads of their own: a store may be slow."""
log = logging.getLogger(__name__)


class Validator(Protocol):
    """Where uploads are checked."""

    async def validate(self, job: ValidationJob) -> Report:
        """Do one job and return its report.

        Raises: Unavailable.
        """

    async def stop(self) -> None:
        """End what checks; nobody waits for it any more."""


class ThreadValidator:
    """Checks uploads in threads of this process. For tests, and where nobody uploads strangers'."""

    async def validate(self, job: ValidationJob) -> Report:
        """Do a job; it holds a core and Python's lock as long as it takes."""
        return await asyncio.to_thread(job.run)

    async def stop(self) -> None:
        """Do nothing."""


class AdapterUploader:
    """Checks uploads, keeps their files and publishes them."""

    finish_s = 10.0
    """How long a stop waits for uploads that are being published."""

    def __init__(
        self,
        base: BaseSpec,
        store: Store,
        live: LiveCatalog,
        limits: AdapterLimits,
        validator: Validator,
        probe: Callable[[UploadForm], Awaitable[Probe]],
    ) -> None:
        self._base = base
        self._store = store
        self._live = live
        self._limits = limits
        self._validator = validator
        self._probe = probe
        self._checks = asyncio.Semaphore(MAX_CHECKS)
        self._publishing: SharedTasks[Published] = SharedTasks()
        self._threads = ThreadPoolExecutor(MAX_SENT, "quickchange-upload")

    async def stop(self) -> None:
        """Wait for what is being published, but not for long, and end what checks.

        What a store does not take in time was not acknowledged, and nothing of it is visible.
        """
        try:
            async with asyncio.timeout(self.finish_s):
                await self._publishing.join()
        except TimeoutError:
            log.warning("uploads that the store does not take are left: they were not acknowledged")
            await self._publishing.stop()
        self._threads.shutdown(wait=False, cancel_futures=True)
        await self._validator.stop()

    async def discard(self, staged: Iterable[StagedFile]) -> None:
        """Forget staged files; what is already gone is skipped, and what stays is swept later."""
        for file in staged:
            try:
                await asyncio.to_thread(self._store.discard, file)
            except StoreUnavailable as error:
                log.warning("a staged file is left to a later sweep: %s", error)

    async def check(self, form: UploadForm, taken_names: Sequence[str]) -> Report:
        """Return the report of an upload, with everything that is wrong with it."""
        problems = form_problems(form, taken_names)
        task = await _read_task(form)
        task_problems = map(by_part, task.problems)
        if form.adapter_config is None or form.adapter_model is None:
            return refused((*problems, *task_problems), self._base)
        job = ValidationJob(
            form.adapter_config.path,
            form.adapter_model.path,
            self._base,
            self._limits,
            form.allow_noop,
            form.strict_base,
        )
        report = await self.validate(job)
        found = map(by_part, report.problems)
        report = replace(report, problems=(*problems, *found, *task_problems))
        return await self._probed(form, report) if report.ok else report

    async def _probed(self, form: UploadForm, report: Report) -> Report:
        """Add how far the upload moves the fixed prompt, or why that was not measured."""
        try:
            probe = await self._probe(form)
        except NotProbed as error:
            return replace(report, probe_reason=str(error))
        return replace(report, probe=probe.to_json(), probe_reason=None)

    async def validate(self, job: ValidationJob) -> Report:
        """Do a job when its turn comes; a few at a time bound their memory."""
        async with self._checks:
            return await self._validator.validate(job)

    async def publish(self, form: UploadForm, taken_names: Sequence[str]) -> Published:
        """Check an upload and make it a version.

        Raises: UploadRefused, TooLarge, Conflict, Unavailable.
        """
        report = await self.check(form, taken_names)
        if not report.ok:
            raise refusal(report.problems)
        task = await _read_task(form)
        new = self._new_version(form, report, task.text)

        async def work() -> Published:
            # Other changes of the catalog do not wait while files are sent.
            keep = partial(keep_files, self._live.catalog, self._store, new, form.staged)
            with as_answers():
                await asyncio.get_running_loop().run_in_executor(self._threads, keep)
            publish = partial(publish_kept, self._live.catalog, self._store, new)
            return await self._live.change(new.tenant, new.name, publish)

        # The picture in memory must follow the commit, even if the caller leaves in between.
        return await self._publishing.run(new.upload_id, work)

    def _new_version(self, form: UploadForm, report: Report, task_text: str | None) -> NewVersion:
        return NewVersion(
            name=form.name,
            files=file_records(form),
            base_name=self._base.name,
            base_digest=self._base.digest,
            ranks=report.ranks,
            target_modules=report.target_modules,
            report=report.to_json(),
            tenant=form.tenant,
            alias=form.alias,
            tags=form.tags or None,
            visibility=form.visibility,
            default_visibility=form.terms.default_visibility,
            quota=form.terms.quota,
            actor=form.terms.actor,
            upload_id=secrets.token_hex(16),
            task_text=task_text,
        )


async def _read_task(form: UploadForm) -> TaskReading:
    with as_answers(), unavailable("the part task cannot be read"):
        return await asyncio.to_thread(read_task_part, form)
