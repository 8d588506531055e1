"""A version's files on their way into a folder: held to its digest, then there as a whole.

What the server sends chooses neither names nor places; more bytes than it announced are refused.
"""

import hashlib
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

import httpx
from anyio import to_thread

from quickchange_client.adapter import AdapterVersion
from quickchange_client.adapter_folder import CONFIG_FILE, TASK_FILE, WEIGHTS_FILE
from quickchange_client.errors import (
    AnswerInvalid,
    ArgumentInvalid,
    FolderNotWritten,
    StreamInterrupted,
)
from quickchange_client.multipart import Progress


class VersionFolder:
    """A folder that gets a version's files. Use it in `with`; `finish` puts it in its place.

    Until then everything lies in a hidden folder beside it, which goes when the block ends.
    """

    def __init__(
        self, folder: str | Path, version: AdapterVersion, progress: Progress | None
    ) -> None:
        self._folder = Path(folder).expanduser().absolute()
        self._partial = self._folder.parent / f".{self._folder.name}.{secrets.token_hex(4)}"
        self._version = version
        self._progress = progress
        self._digest = hashlib.sha256()
        self._num_bytes = 0

    @property
    def files(self) -> tuple[str, ...]:
        """The version's files in the digest's order: each is to be saved once, in this order."""
        task = () if self._version.task is None else (TASK_FILE,)
        return (CONFIG_FILE, WEIGHTS_FILE, *task)

    def __enter__(self) -> Self:
        """Make room.

        Raises: ArgumentInvalid when something is there already; FolderNotWritten.
        """
        with _writing(self._folder):
            if self._folder.exists() and not _is_empty(self._folder):
                raise ArgumentInvalid(
                    f"{str(self._folder)!r} is there already; name another folder"
                )
            self._folder.parent.mkdir(parents=True, exist_ok=True)
            self._partial.mkdir()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        shutil.rmtree(self._partial, ignore_errors=True)

    def save(self, file: str, response: httpx.Response) -> None:
        """Write one file as it arrives, and close the response.

        Raises: StreamInterrupted; AnswerInvalid when more comes than was announced;
        FolderNotWritten.
        """
        try:
            with self._writer(file) as write:
                for block in response.iter_bytes():
                    write(block)
        finally:
            response.close()

    async def save_async(self, file: str, response: httpx.Response) -> None:
        """Do as `save`; the disk is written in a thread."""
        try:
            with self._writer(file) as write:
                async for block in response.aiter_bytes():
                    await to_thread.run_sync(write, block)
        finally:
            await response.aclose()

    def finish(self) -> None:
        """Compare with the version's digest, and put the folder in its place.

        Raises: AnswerInvalid, FolderNotWritten.
        """
        if self._digest.hexdigest() != self._version.digest.removeprefix("sha256:"):
            raise AnswerInvalid(
                f"the files of {self._name} do not have its digest {self._version.digest}: "
                "they were changed on their way; nothing is kept"
            )
        with _writing(self._folder):
            self._partial.rename(self._folder)

    @property
    def _name(self) -> str:
        return f"{self._version.name}:{self._version.version}"

    @contextmanager
    def _writer(self, file: str) -> Iterator[Callable[[bytes], None]]:
        sha256 = hashlib.sha256()
        try:
            with _writing(self._folder), (self._partial / file).open("xb") as target:

                def write(block: bytes) -> None:
                    self._count(block)
                    sha256.update(block)
                    target.write(block)

                yield write
        except (httpx.TransportError, httpx.StreamError) as error:
            raise StreamInterrupted(
                f"{file} of {self._name} broke off; nothing is kept, try again"
            ) from error
        self._digest.update(sha256.digest())

    def _count(self, block: bytes) -> None:
        announced = self._version.bytes.file
        self._num_bytes += len(block)
        if self._num_bytes > announced:
            raise AnswerInvalid(f"more than the {announced} bytes of {self._name} arrived")
        if self._progress is not None:
            self._progress(self._num_bytes, announced)


def _is_empty(folder: Path) -> bool:
    return folder.is_dir() and not any(folder.iterdir())


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Turn the file system's errors into ours."""
    try:
        yield
    except OSError as error:
        raise FolderNotWritten(f"cannot write {str(folder)!r}: {error.strerror}") from error
