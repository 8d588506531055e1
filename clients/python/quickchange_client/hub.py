"""Adapters that lie on the Hugging Face Hub, fetched to this machine. Knows no Quickchange server.

A revision is resolved once, to a commit, and every file is taken from that commit. Only the files
of an adapter are fetched, up to the sizes that a server takes; nothing of a repository is run or
unpickled.

Source: the Hub's API, `GET /api/models/{repo}/revision/{revision}` and
`GET /{repo}/resolve/{commit}/{file}`.
"""

import hashlib
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import quote

import httpx
from pydantic import BaseModel, Field, ValidationError

from quickchange_client.adapter_folder import CONFIG_FILE, PICKLE_FILE, TASK_FILE, WEIGHTS_FILE
from quickchange_client.errors import ArgumentInvalid, FolderNotWritten, HubFetchFailed
from quickchange_client.multipart import Progress
from quickchange_client.settings import HUB_TOKEN_VARIABLE, HUB_VARIABLE, HubSettings

PREFIX = "hf:"
COMMIT_CHARS = 12
MAX_BYTES = {CONFIG_FILE: 256 << 10, TASK_FILE: 16 << 10, WEIGHTS_FILE: 1 << 30}
TIMEOUT_S = 60.0
_PART = re.compile(r"[A-Za-z0-9][\w.-]*")
_COMMIT = re.compile(r"[0-9a-f]{40,64}")


@dataclass(frozen=True, slots=True)
class HubSource:
    """A place on the Hub: `hf:ORG/NAME`, then `/FOLDER` and `@REVISION` where they are needed."""

    repo: str
    folder: str = ""
    revision: str = "main"

    @classmethod
    def parse(cls, text: str) -> "HubSource":
        """Read `hf:org/name@revision`. Raises: ArgumentInvalid."""
        place, _, revision = text.removeprefix(PREFIX).partition("@")
        parts = place.split("/")
        if len(parts) < 2 or not all(_PART.fullmatch(part) for part in parts):
            raise ArgumentInvalid(f"{text!r} is no place on the Hub; write hf:ORG/NAME@REVISION")
        return cls("/".join(parts[:2]), "/".join(parts[2:]), revision or "main")

    def path(self, file: str) -> str:
        """Return where a file of the adapter lies in the repository."""
        return f"{self.folder}/{file}" if self.folder else file


class LargeFile(BaseModel):
    """What the Hub knows of a file that it keeps by its sha256."""

    sha256: str = ""


class RepositoryFile(BaseModel):
    """One file of a repository."""

    rfilename: str
    size: int | None = None
    lfs: LargeFile | None = None


class Repository(BaseModel):
    """What the Hub says of a revision: its commit, and the files in it."""

    sha: str = Field(pattern=_COMMIT.pattern)
    siblings: list[RepositoryFile] = Field(default_factory=list)


class Hub:
    """Fetches from one Hub; use it in `with`."""

    def __init__(
        self, settings: HubSettings, *, transport: httpx.BaseTransport | None = None
    ) -> None:
        self._url = settings.url
        headers = {"Authorization": f"Bearer {settings.token}"} if settings.token else {}
        self._http = httpx.Client(
            headers=headers,
            timeout=TIMEOUT_S,
            follow_redirects=True,
            transport=transport or httpx.HTTPTransport(retries=2),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._http.close()

    def fetch(self, source: HubSource, folder: Path, progress: Progress | None = None) -> str:
        """Save the adapter's files in a folder that is there; return the commit they are of.

        `progress(received_bytes, total_bytes)`.

        Raises: HubFetchFailed, FolderNotWritten.
        """
        repository = self._look_up(source)
        files = _files_to_fetch(source, repository)
        received = _Received(sum(each.size or 0 for each in files.values()), progress)
        for name, file in files.items():
            address = f"{self._url}/{source.repo}/resolve/{repository.sha}/{quote(file.rfilename)}"
            self._save(address, folder / name, file, received)
        return repository.sha

    def _look_up(self, source: HubSource) -> Repository:
        place = f"/api/models/{source.repo}/revision/{quote(source.revision, safe='')}"
        with self._asking(f"{source.repo}@{source.revision}"):
            answer = self._http.get(f"{self._url}{place}", params={"blobs": "true"})
            answer.raise_for_status()
            return Repository.model_validate_json(answer.content)

    def _save(
        self, address: str, target: Path, file: RepositoryFile, received: "_Received"
    ) -> None:
        sha256 = hashlib.sha256()
        num_bytes = 0
        with (
            self._asking(file.rfilename),
            self._http.stream("GET", address) as answer,
            target.open("xb") as output,
        ):
            answer.raise_for_status()
            for block in answer.iter_bytes():
                num_bytes += len(block)
                _check_size(target.name, num_bytes)
                sha256.update(block)
                output.write(block)
                received.add(len(block))
        wanted = file.lfs.sha256 if file.lfs else ""
        if wanted and wanted != sha256.hexdigest():
            raise HubFetchFailed(f"{file.rfilename} came changed: the Hub names another sha256")

    @contextmanager
    def _asking(self, what: str) -> Iterator[None]:
        """Turn what goes wrong between here and the Hub into our errors."""
        try:
            yield
        except httpx.HTTPStatusError as error:
            raise HubFetchFailed(self._refusal(what, error.response.status_code)) from error
        except httpx.HTTPError as error:
            reason = str(error) or type(error).__name__
            raise HubFetchFailed(
                f"cannot fetch {what} from {self._url} ({HUB_VARIABLE}): {reason}"
            ) from error
        except OSError as error:
            raise FolderNotWritten(f"cannot keep {what} here: {error.strerror}") from error
        except (httpx.InvalidURL, ValidationError) as error:
            raise HubFetchFailed(f"{self._url} does not answer as the Hub does") from error

    def _refusal(self, what: str, status: int) -> str:
        if status in (401, 403):
            return (
                f"{self._url} does not show {what}: there is no such thing, or it needs a token "
                f"that may read it, in the variable {HUB_TOKEN_VARIABLE}"
            )
        if status == 404:
            return f"{self._url} has no {what}: look at the repository's name and revision"
        return f"{self._url} answered HTTP {status} for {what}; try again later"


class _Received:
    """Counts what has come of all files, and tells whoever watches."""

    def __init__(self, total_bytes: int, progress: Progress | None) -> None:
        self._total_bytes = total_bytes
        self._progress = progress
        self._num_bytes = 0

    def add(self, num_bytes: int) -> None:
        self._num_bytes += num_bytes
        if self._progress is not None:
            self._progress(self._num_bytes, max(self._num_bytes, self._total_bytes))


def _files_to_fetch(source: HubSource, repository: Repository) -> dict[str, RepositoryFile]:
    """Return the adapter's files by the names they have in an adapter's folder.

    Raises: HubFetchFailed when one is missing or too large.
    """
    there = {file.rfilename: file for file in repository.siblings}
    wanted = {name: there.get(source.path(name)) for name in MAX_BYTES}
    found = {name: file for name, file in wanted.items() if file is not None}
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if name not in found:
            raise HubFetchFailed(_missing(source, name, there.__contains__))
    for name, file in found.items():
        _check_size(name, file.size or 0)
    return found


def _missing(source: HubSource, name: str, is_there: Callable[[str], bool]) -> str:
    problem = f"{source.repo}@{source.revision} has no {source.path(name)}"
    if name == WEIGHTS_FILE and is_there(source.path(PICKLE_FILE)):
        return f"{problem}, only {PICKLE_FILE}, and pickled weights are never uploaded"
    return f"{problem}; an adapter in a folder of the repository is hf:ORG/NAME/FOLDER@REVISION"


def _check_size(name: str, num_bytes: int) -> None:
    if num_bytes > MAX_BYTES[name]:
        raise HubFetchFailed(f"{name} is larger than the {MAX_BYTES[name]} bytes that are taken")
