"""A PEFT folder served as it lies there (`--adapter NAME=FOLDER`), held to the bytes it had."""

import hashlib
import time
from pathlib import Path

from quickchange_adapters.names import DEFAULT_ALIAS, DEFAULT_TENANT
from quickchange_adapters.records import (
    CONFIG_FILE,
    TASK_FILE,
    WEIGHTS_FILE,
    AdapterRecord,
    FileRecord,
    VersionRecord,
    version_digest,
)
from quickchange_adapters.task import Task, TaskReading, read_task_file
from quickchange_adapters.validate import Report

from quickchange_server.errors import Conflict, InvalidRequest

BLOCK_BYTES = 1 << 20
_CODE_OF = {
    CONFIG_FILE: "config_invalid",
    WEIGHTS_FILE: "weights_invalid",
    TASK_FILE: "task_invalid",
}


def read_folder(name: str, folder: Path) -> tuple[FileRecord, ...]:
    """Return what an adapter's folder holds now; only task.json may be missing.

    Raises: InvalidRequest when a file is missing or cannot be read.
    """
    files = [CONFIG_FILE, WEIGHTS_FILE]
    if (folder / TASK_FILE).exists():
        files.append(TASK_FILE)
    return tuple(_read_file(name, folder / file) for file in files)


def read_folder_task(name: str, folder: Path) -> TaskReading:
    """Read the task.json of a folder; without one, a task that fills nothing.

    Call it after `read_folder`: what changed in between is then refused when it is loaded.

    Raises: InvalidRequest when it cannot be read.
    """
    try:
        return read_task_file(folder / TASK_FILE)
    except FileNotFoundError:
        return TaskReading(Task())
    except OSError as error:
        raise _unreadable(name, TASK_FILE, error) from error


def check_unchanged(version: VersionRecord, folder: Path) -> None:
    """Compare a folder with what it held when it was added.

    Raises: Conflict.
    """
    try:
        digest = version_digest(read_folder(version.name, folder))
    except InvalidRequest as error:
        raise Conflict(error.message) from error
    if digest != version.digest:
        raise Conflict(
            f"the files of the static adapter {version.name!r} have changed: "
            "restart to serve what they hold now"
        )


def static_record(
    name: str, files: tuple[FileRecord, ...], report: Report, task_text: str | None
) -> AdapterRecord:
    """Return the record of an adapter that lives as long as this process: version 1, default."""
    now = int(time.time())
    version = VersionRecord(
        tenant=DEFAULT_TENANT,
        name=name,
        number=1,
        digest=version_digest(files),
        state="ready",
        base_name=report.base,
        peft_type="LORA",
        ranks=report.ranks,
        target_modules=report.target_modules,
        files=files,
        created_at=now,
        task_text=task_text,
    )
    return AdapterRecord(
        tenant=DEFAULT_TENANT,
        name=name,
        visibility="public",
        tags=(),
        created_at=now,
        revision=0,
        aliases={DEFAULT_ALIAS: 1},
        versions=(version,),
    )


def _read_file(name: str, path: Path) -> FileRecord:
    sha256 = hashlib.sha256()
    num_bytes = 0
    try:
        with path.open("rb") as file:
            while block := file.read(BLOCK_BYTES):
                sha256.update(block)
                num_bytes += len(block)
    except OSError as error:
        raise _unreadable(name, path.name, error) from error
    return FileRecord(path.name, sha256.hexdigest(), num_bytes)


def _unreadable(name: str, file: str, error: OSError) -> InvalidRequest:
    return InvalidRequest(
        f"the folder of adapter {name!r} has no readable {file}: {error.strerror}",
        code=_CODE_OF[file],
    )
