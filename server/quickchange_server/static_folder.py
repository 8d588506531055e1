"""A PEFT folder served as it lies there (`--adapter NAME=FOLDER`), held to the bytes it had."""

import hashlib
import time
from pathlib import Path

from quickchange_adapters.names import DEFAULT_ALIAS, DEFAULT_TENANT
from quickchange_adapters.records import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    AdapterRecord,
    FileRecord,
    VersionRecord,
    version_digest,
)
from quickchange_adapters.validate import Report

from quickchange_server.errors import Conflict, InvalidRequest

BLOCK_BYTES = 1 << 20


def read_folder(name: str, folder: Path) -> tuple[FileRecord, ...]:
    """Return what an adapter's folder holds now.

    Raises: InvalidRequest when a file is missing or cannot be read.
    """
    return tuple(_read_file(name, folder / file) for file in (CONFIG_FILE, WEIGHTS_FILE))


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


def static_record(name: str, files: tuple[FileRecord, ...], report: Report) -> AdapterRecord:
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
        raise InvalidRequest(
            f"the folder of adapter {name!r} has no readable {path.name}: {error.strerror}",
            code="config_invalid" if path.name == CONFIG_FILE else "weights_invalid",
        ) from error
    return FileRecord(path.name, sha256.hexdigest(), num_bytes)
