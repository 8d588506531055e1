"""The catalog's contents as plain frozen values, and what a model string means among them."""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from quickchange_adapters.errors import QuotaExceeded
from quickchange_adapters.names import DEFAULT_TENANT, ModelRef

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
TASK_FILE = "task.json"
FILE_ORDER = (CONFIG_FILE, WEIGHTS_FILE, TASK_FILE)

VersionState = Literal["ready", "disabled", "deleting"]


@dataclass(frozen=True, slots=True)
class FileRecord:
    """One file of a version and the sha256 (hex) of its bytes."""

    file: str
    sha256: str
    num_bytes: int


@dataclass(frozen=True, slots=True)
class VersionRecord:
    """One immutable upload. `report` is read apart, as it may be long.

    `task_text` is its task.json as it was sent; None if it has none. `state`, `wants_pin` and
    `wants_merge` say what it is to be.
    """

    tenant: str
    name: str
    number: int
    digest: str
    state: VersionState
    base_name: str
    peft_type: str
    ranks: tuple[int, ...]
    target_modules: tuple[str, ...]
    files: tuple[FileRecord, ...]
    created_at: int
    task_text: str | None = None
    wants_pin: bool = False
    wants_merge: bool = False

    @property
    def num_bytes(self) -> int:
        """Bytes of all files."""
        return sum(file.num_bytes for file in self.files)

    def file(self, name: str) -> FileRecord | None:
        """Return one file by its name."""
        return next((file for file in self.files if file.file == name), None)

    @property
    def has_its_task(self) -> bool:
        """Whether `task_text` is what the digest covers: the text of task.json, or none at all."""
        file = self.file(TASK_FILE)
        if file is None or self.task_text is None:
            return file is None and self.task_text is None
        return hashlib.sha256(self.task_text.encode()).hexdigest() == file.sha256


@dataclass(frozen=True, slots=True)
class AdapterRecord:
    """A name with its versions (by number, oldest first) and aliases.

    `revision` grows with every change of versions, of what they are to be, of aliases, tags or
    visibility.
    """

    tenant: str
    name: str
    visibility: str
    tags: tuple[str, ...]
    created_at: int
    revision: int
    aliases: Mapping[str, int]
    versions: tuple[VersionRecord, ...]

    def version(self, number: int) -> VersionRecord | None:
        """Return a version by number, whatever its state."""
        return next((version for version in self.versions if version.number == number), None)

    def find(self, ref: ModelRef) -> VersionRecord | None:
        """Return the version that a model string means, if it takes requests."""
        ready = [version for version in self.versions if version.state == "ready"]
        if ref.digest_prefix is not None:
            found = [v for v in ready if v.digest.startswith(ref.digest_prefix)]
            return found[0] if len(found) == 1 else None
        number = ref.version if ref.alias is None else self.aliases.get(ref.alias)
        return next((version for version in ready if version.number == number), None)


@dataclass(frozen=True, slots=True)
class Quota:
    """What one tenant's versions may take together; None: as much as there is."""

    max_versions: int | None = None
    max_bytes: int | None = None

    def check(self, tenant: str, num_versions: int, num_bytes: int) -> None:
        """Compare with what there is or would be.

        Raises: QuotaExceeded.
        """
        if self.max_versions is not None and num_versions > self.max_versions:
            raise QuotaExceeded(tenant, "versions", num_versions, self.max_versions)
        if self.max_bytes is not None and num_bytes > self.max_bytes:
            raise QuotaExceeded(tenant, "bytes", num_bytes, self.max_bytes)


@dataclass(frozen=True, slots=True)
class NewVersion:
    """What is to be published. None leaves tags or visibility as they are.

    `default_visibility`: that of a name which is new, if none is asked for. `upload_id`: under what
    its blobs were reserved; empty: they were not.
    """

    name: str
    files: tuple[FileRecord, ...]
    base_name: str
    base_digest: str
    ranks: tuple[int, ...]
    target_modules: tuple[str, ...]
    report: Mapping[str, Any]
    tenant: str = DEFAULT_TENANT
    peft_type: str = "LORA"
    alias: str | None = None
    tags: tuple[str, ...] | None = None
    visibility: str | None = None
    default_visibility: str = "public"
    quota: Quota | None = None
    actor: str = ""
    upload_id: str = ""
    task_text: str | None = None

    @property
    def digest(self) -> str:
        """The version's digest."""
        return version_digest(self.files)


@dataclass(frozen=True, slots=True)
class Published:
    """What publishing led to; `created` False: the same bytes were there under this name."""

    created: bool
    adapter: AdapterRecord
    version: VersionRecord


@dataclass(frozen=True, slots=True)
class EventRecord:
    """One line of the audit log: who did what to which name, and when (seconds since 1970)."""

    at: float
    tenant: str
    name: str
    action: str
    actor: str = ""
    version: int | None = None
    digest: str | None = None
    alias: str | None = None


def version_digest(files: Iterable[FileRecord]) -> str:
    """Return the digest (hex) of a version.

    sha256 over the raw 32-byte sha256 of each file, concatenated in the order adapter_config.json,
    adapter_model.safetensors, task.json; a file that is not there contributes nothing.
    """
    by_name = {file.file: file.sha256 for file in files}
    raw = b"".join(bytes.fromhex(by_name[name]) for name in FILE_ORDER if name in by_name)
    return hashlib.sha256(raw).hexdigest()
