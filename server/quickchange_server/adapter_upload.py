"""One upload before it is anybody's: its form, its staged files, and how it is refused."""

import asyncio
from collections.abc import AsyncIterable, AsyncIterator, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from quickchange_adapters.errors import BlobTooLarge, Problem
from quickchange_adapters.names import DEFAULT_TENANT, adapter_name_problem, alias_problem
from quickchange_adapters.records import CONFIG_FILE, TASK_FILE, WEIGHTS_FILE, FileRecord, Quota
from quickchange_adapters.store import StagedFile, Store
from quickchange_adapters.task import Task, TaskReading, read_task_file

from quickchange_server.answers import as_answers
from quickchange_server.errors import (
    Conflict,
    InvalidRequest,
    QuickchangeError,
    TooLarge,
)

FileName = Literal["adapter_config.json", "adapter_model.safetensors", "task.json"]

BLOCK_BYTES = 1 << 20
VISIBILITIES = (None, "public", "private")
PART_OF: dict[str, str] = {
    CONFIG_FILE: "adapter_config",
    WEIGHTS_FILE: "adapter_model",
    TASK_FILE: "task",
}
"""The form's part that holds a file."""


@dataclass(frozen=True, slots=True)
class UploadTerms:
    """What the server adds to a form: who uploads, and what holds for everybody like them."""

    actor: str = ""
    default_visibility: str = "public"
    quota: Quota | None = None


@dataclass(frozen=True, slots=True)
class UploadForm:
    """The fields of `POST /v1/adapters`; a missing file is reported, not raised by the caller.

    `tags` empty and `visibility` None leave those of an adapter that exists as they are. `problems`
    are what was found while the form was read; what they are about is not looked at again.
    """

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
    terms: UploadTerms = UploadTerms()
    problems: tuple[Problem, ...] = ()

    @property
    def staged(self) -> tuple[StagedFile, ...]:
        """The files that came."""
        files = (self.adapter_config, self.adapter_model, self.task)
        return tuple(file for file in files if file is not None)


class UploadRefused(InvalidRequest):
    """An upload that cannot be served; `code` and `param` are the first problem's."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        first = problems[0]
        super().__init__(_sentence(problems), code=first.code, param=first.where or None)
        self.problems = tuple(problems)


def refusal(problems: Sequence[Problem]) -> QuickchangeError:
    """Return the error that refuses an upload; its status is that of the first problem's code."""
    first = problems[0]
    kind = {"conflict": Conflict, "too_large": TooLarge}.get(first.code)
    if kind is None:
        return UploadRefused(problems)
    error = kind(_sentence(problems), param=first.where or None)
    error.problems = tuple(problems)
    return error


def form_problems(form: UploadForm, taken_names: Collection[str]) -> list[Problem]:
    """Return what is wrong with an upload apart from what its files hold."""
    problems = [adapter_name_problem(form.name) if form.name else _MISSING_NAME]
    if form.name in taken_names:
        message = f"the name {form.name!r} is served by this process itself"
        problems.append(Problem("conflict", "name", message, "take another name"))
    if form.alias is not None:
        problems.append(alias_problem(form.alias))
    if form.visibility not in VISIBILITIES:
        message = f"visibility is {form.visibility!r}, not public or private"
        problems.append(Problem("config_invalid", "visibility", message))
    if form.adapter_config is None:
        problems.append(_missing("config_invalid", "adapter_config", CONFIG_FILE))
    if form.adapter_model is None:
        problems.append(_missing("weights_invalid", "adapter_model", WEIGHTS_FILE))
    said = {problem.where for problem in form.problems}
    found = [problem for problem in problems if problem is not None and problem.where not in said]
    return [*form.problems, *found]


def read_task_part(form: UploadForm) -> TaskReading:
    """Read the task.json of an upload; without one, a task that fills nothing. Raises OSError."""
    return TaskReading(Task()) if form.task is None else read_task_file(form.task.path)


def by_part(problem: Problem) -> Problem:
    """Name the form's part where a problem is about a whole file."""
    return replace(problem, where=PART_OF.get(problem.where, problem.where))


def file_records(form: UploadForm) -> tuple[FileRecord, ...]:
    """Return the files of a version, in the digest's order."""
    files = (
        (CONFIG_FILE, form.adapter_config),
        (WEIGHTS_FILE, form.adapter_model),
        (TASK_FILE, form.task),
    )
    return tuple(
        FileRecord(name, file.sha256, file.num_bytes) for name, file in files if file is not None
    )


async def stage_file(
    store: Store, file: FileName, chunks: AsyncIterable[bytes], max_bytes: int
) -> StagedFile:
    """Write one part to the store's incoming folder; a failure leaves nothing.

    Raises: TooLarge, Unavailable, StorageFull.
    """
    try:
        with as_answers():
            writer = await asyncio.to_thread(store.stage, max_bytes)
            try:
                async for block in _blocks(chunks):
                    await asyncio.to_thread(writer.write, block)
                return await asyncio.to_thread(writer.finish)
            finally:
                writer.abort()
    except BlobTooLarge as error:
        raise TooLarge(f"{file} is larger than {max_bytes} bytes", param=PART_OF[file]) from error


async def _blocks(chunks: AsyncIterable[bytes]) -> AsyncIterator[bytes]:
    """Gather small chunks, so that a thread is asked once per megabyte."""
    block = bytearray()
    async for chunk in chunks:
        block += chunk
        if len(block) >= BLOCK_BYTES:
            yield bytes(block)
            block.clear()
    if block:
        yield bytes(block)


_MISSING_NAME = Problem("invalid_name", "name", "name: is missing")


def _missing(code: str, where: str, file: str) -> Problem:
    return Problem(code, where, f"the part {where} ({file}) is missing")


def _sentence(problems: Sequence[Problem]) -> str:
    first = problems[0]
    hint = f"; {first.hint}" if first.hint else ""
    more = f" (and {len(problems) - 1} more problems)" if len(problems) > 1 else ""
    return f"{first.message}{hint}{more}"
