"""Adapters named at start (`--adapter NAME=FOLDER`): checked like uploads, kept nowhere."""

import asyncio
from collections.abc import Collection
from pathlib import Path

from quickchange_adapters.base_spec import BaseSpec
from quickchange_adapters.limits import AdapterLimits
from quickchange_adapters.names import adapter_name_problem
from quickchange_adapters.records import CONFIG_FILE, WEIGHTS_FILE, AdapterRecord, VersionRecord
from quickchange_adapters.validate import Report, ValidationJob

from quickchange_server.adapter_directory import AdapterDirectory
from quickchange_server.adapter_upload import UploadRefused, refusal
from quickchange_server.adapter_uploader import AdapterUploader
from quickchange_server.adapter_views import Json
from quickchange_server.errors import Conflict
from quickchange_server.static_folder import read_folder, read_folder_task, static_record
from quickchange_server.version_files import VersionFiles


class StaticAdapters:
    """Makes folders adapters of this process, and remembers their reports."""

    def __init__(
        self,
        uploader: AdapterUploader,
        directory: AdapterDirectory,
        files: VersionFiles,
        base: BaseSpec,
        limits: AdapterLimits,
    ) -> None:
        self._uploader = uploader
        self._directory = directory
        self._files = files
        self._base = base
        self._limits = limits
        self._reports: dict[str, Json] = {}

    async def add(
        self, name: str, folder: Path, base_names: Collection[str]
    ) -> tuple[VersionRecord, Json]:
        """Serve a folder; return its one version and the report. A repeat is a no-op.

        Raises: UploadRefused, Conflict (a base's name; other bytes under that name).
        """
        problem = adapter_name_problem(name)
        if problem is not None:
            raise UploadRefused([problem])
        if name in base_names:
            raise Conflict(f"the base is called {name!r}; give the adapter another name")
        files = await asyncio.to_thread(read_folder, name, folder)
        task = await asyncio.to_thread(read_folder_task, name, folder)
        report = await self._uploader.validate(self._job(folder))
        problems = (*report.problems, *task.problems)
        if problems:
            raise refusal(problems)
        return self._add(static_record(name, files, report, task.text), folder, report)

    def report(self, name: str) -> Json:
        """Return what the check of a static adapter found."""
        return self._reports[name]

    def _job(self, folder: Path) -> ValidationJob:
        paths = folder / CONFIG_FILE, folder / WEIGHTS_FILE
        return ValidationJob(*paths, self._base, self._limits, allow_noop=True)

    def _add(
        self, record: AdapterRecord, folder: Path, report: Report
    ) -> tuple[VersionRecord, Json]:
        version = record.versions[0]
        known = self._directory.get_static(record.name)
        if known is None:
            self._directory.add_static(record)
            self._files.folders[record.name] = folder
            self._reports[record.name] = report.to_json()
        elif known.versions[0].digest != version.digest:
            raise Conflict(f"--adapter {record.name!r} was given twice, with different files")
        return version, self._reports[record.name]
