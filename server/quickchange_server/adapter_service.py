"""Adapters as the server offers them: upload, list, resolve, load, merge and delete.

Sits between the routes and the engine, the store and the catalog. Lives on the event loop; what
blocks runs in threads. Knows nothing of HTTP: views say what to show, errors carry their status.
"""

from collections.abc import AsyncIterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from quickchange_adapters.errors import Problem
from quickchange_adapters.names import DEFAULT_TENANT
from quickchange_adapters.store import StagedFile

from quickchange_server.adapter_views import (
    ActionView,
    AdapterPage,
    AdapterView,
    DeletionView,
    Json,
    ModelView,
    ResolvedModel,
    UploadResult,
    VersionView,
)
from quickchange_server.errors import InvalidRequest

FileName = Literal["adapter_config.json", "adapter_model.safetensors", "task.json"]


@dataclass(frozen=True, slots=True)
class UploadForm:
    """The fields of `POST /v1/adapters`; a missing file is reported, not raised by the caller."""

    name: str
    adapter_config: StagedFile | None
    adapter_model: StagedFile | None
    task: StagedFile | None = None
    alias: str | None = None
    tags: tuple[str, ...] = ()
    visibility: str | None = None
    allow_noop: bool = False
    strict_base: bool = False
    tenant: str = DEFAULT_TENANT


class UploadRefused(InvalidRequest):
    """An upload that cannot be served; `code` and `param` are the first problem's."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        first = problems[0]
        more = f" ({len(problems) - 1} more problems)" if len(problems) > 1 else ""
        hint = f"; {first.hint}" if first.hint else ""
        super().__init__(f"{first.message}{hint}{more}", code=first.code, param=first.where or None)
        self.problems = tuple(problems)


class AdapterService:
    """Everything the routes may do with adapters.

    `version` arguments: a number, or None for what the bare name means (alias `default`).
    """

    base_names: tuple[str, ...]

    async def start(self) -> None:
        """Read the catalog once, finish deletions that a crash cut short, sweep orphans.

        Raises: Unavailable.
        """
        raise NotImplementedError

    async def stop(self) -> None:
        """End background work and close the catalog."""
        raise NotImplementedError

    async def stage(self, file: FileName, chunks: AsyncIterable[bytes]) -> StagedFile:
        """Write one part of an upload to the store's incoming folder, hashing as it goes.

        What was staged must be given to `upload`, `check` or `discard`. A failure leaves nothing.

        Raises: TooLarge, Unavailable.
        """
        raise NotImplementedError

    async def discard(self, staged: Sequence[StagedFile | None]) -> None:
        """Forget staged files; None and what is already gone are skipped."""
        raise NotImplementedError

    async def upload(self, form: UploadForm) -> UploadResult:
        """Check, keep and publish an upload. When this returns, it survives `kill -9`.

        The staged files are used up, whatever happens. The same bytes under the same name give the
        version that is there (`created` False); `alias` is moved in the same transaction.

        Raises: UploadRefused (400, all problems in it), TooLarge, Conflict, Unavailable.
        """
        raise NotImplementedError

    async def check(self, form: UploadForm) -> Json:
        """Dry run: return the `adapter.report` object with all problems; nothing is kept."""
        raise NotImplementedError

    async def add_static(self, name: str, folder: Path) -> VersionView:
        """Serve a folder as `name` in this process only (`--adapter NAME=FOLDER`).

        Wins over the catalog's name and is read-only over REST. A repeat with equal bytes is a
        no-op. The folder is read again at each load, and refused then if its bytes changed.

        Raises: UploadRefused, Conflict (other bytes under that name).
        """
        raise NotImplementedError

    async def list(
        self, *, after: str | None = None, limit: int = 20, tenant: str = DEFAULT_TENANT
    ) -> AdapterPage:
        """Return adapters sorted by name, those behind `after`, at most `limit`."""
        raise NotImplementedError

    async def get(self, name: str, *, tenant: str = DEFAULT_TENANT) -> AdapterView:
        """Return one adapter.

        Raises: NotFound (adapter_not_found).
        """
        raise NotImplementedError

    async def get_version(
        self, name: str, version: int | None = None, *, tenant: str = DEFAULT_TENANT
    ) -> VersionView:
        """Return one version.

        Raises: NotFound (adapter_not_found, version_not_found).
        """
        raise NotImplementedError

    async def file_path(
        self, name: str, version: int, file: FileName, *, tenant: str = DEFAULT_TENANT
    ) -> Path:
        """Return where one file of a version can be read, byte for byte as it was uploaded.

        Raises: NotFound (adapter_not_found, version_not_found, file_not_found), Unavailable.
        """
        raise NotImplementedError

    async def events(self, name: str, *, tenant: str = DEFAULT_TENANT) -> Sequence[Json]:
        """Return the audit log of a name, oldest first; also of a name that was deleted.

        Raises: NotFound (adapter_not_found).
        """
        raise NotImplementedError

    async def set_alias(
        self,
        name: str,
        alias: str,
        version: int,
        *,
        if_match: str | None = None,
        tenant: str = DEFAULT_TENANT,
    ) -> AdapterView:
        """Point an alias at a version; `if_match` is the ETag the caller saw.

        Raises: InvalidRequest (invalid_name), NotFound, Conflict (static), PreconditionFailed.
        """
        raise NotImplementedError

    async def delete_alias(
        self,
        name: str,
        alias: str,
        *,
        if_match: str | None = None,
        tenant: str = DEFAULT_TENANT,
    ) -> AdapterView:
        """Remove an alias; its version stays.

        Raises: NotFound (alias_not_found too), Conflict (static), PreconditionFailed.
        """
        raise NotImplementedError

    async def delete_version(
        self, name: str, version: int, *, timeout_s: float = 30.0, tenant: str = DEFAULT_TENANT
    ) -> DeletionView:
        """Take a version away: unknown to new requests at once, running ones finish.

        Waits up to `timeout_s`; after that `done` is False and it goes on in the background.

        Raises: NotFound, Conflict (alias_in_use, or static), Unavailable.
        """
        raise NotImplementedError

    async def delete_adapter(
        self, name: str, *, timeout_s: float = 30.0, tenant: str = DEFAULT_TENANT
    ) -> DeletionView:
        """Take a name away with all versions and aliases, as `delete_version` does.

        Raises: NotFound, Conflict (static), Unavailable.
        """
        raise NotImplementedError

    async def load(
        self, name: str, version: int | None = None, *, tenant: str = DEFAULT_TENANT
    ) -> ActionView:
        """Bring a version into host memory; a repeat is a no-op.

        Raises: NotFound, Conflict, Unavailable.
        """
        raise NotImplementedError

    async def unload(
        self,
        name: str,
        version: int | None = None,
        *,
        timeout_s: float = 30.0,
        tenant: str = DEFAULT_TENANT,
    ) -> ActionView:
        """Give device, host and merged bytes back; the next request loads it again.

        Raises: NotFound, Unavailable (requests still run after `timeout_s`).
        """
        raise NotImplementedError

    async def merge(
        self, name: str, version: int | None = None, *, tenant: str = DEFAULT_TENANT
    ) -> ActionView:
        """Load a version and make a merged copy of it beside the untouched base.

        Raises: NotFound, Conflict (merge_budget), Unavailable.
        """
        raise NotImplementedError

    async def unmerge(
        self, name: str, version: int | None = None, *, tenant: str = DEFAULT_TENANT
    ) -> ActionView:
        """Drop the merged copy; a repeat is a no-op.

        Raises: NotFound.
        """
        raise NotImplementedError

    def resolve(self, model: str, *, tenant: str = DEFAULT_TENANT) -> ResolvedModel:
        """Say what a model string means now. A look-up in memory: never waits.

        Raises: NotFound (model_not_found).
        """
        raise NotImplementedError

    async def acquire(self, resolved: ResolvedModel) -> None:
        """Make sure that requests for `resolved` can be submitted; a no-op for the base.

        Await it right before `engine.generate`. Requests that come at once load it once.

        Raises: NotFound (deleted since), Conflict (it does not fit this base), Unavailable.
        """
        raise NotImplementedError

    def models(self, *, tenant: str = DEFAULT_TENANT) -> Sequence[ModelView]:
        """Return the entries of `GET /v1/models`: base names, bare names, `name@alias`."""
        raise NotImplementedError

    def model(self, model_id: str, *, tenant: str = DEFAULT_TENANT) -> ModelView:
        """Return one entry of `GET /v1/models`; any model string that resolves has one.

        Raises: NotFound (model_not_found).
        """
        raise NotImplementedError
