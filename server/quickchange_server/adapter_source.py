"""An adapter's files for a command: from a folder that PEFT wrote, or from a server by name."""

import json
import shutil
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote
from urllib.response import addinfourl

from quickchange_adapters.records import CONFIG_FILE, TASK_FILE, WEIGHTS_FILE

from quickchange_server.errors import CannotExport

TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class AdapterFiles:
    """What one version is made of; `name` is for messages."""

    name: str
    config: Path
    weights: Path
    task: Path | None


@contextmanager
def adapter_files(adapter: str, url: str, api_key: str | None) -> Iterator[AdapterFiles]:
    """Give an adapter's files: a folder's, or downloaded ones, which go with the block.

    `adapter` is a folder if it holds an adapter_config.json, else what a server calls it.

    Raises: CannotExport.
    """
    folder = Path(adapter).expanduser()
    if (folder / CONFIG_FILE).is_file():
        yield _files_in(folder, adapter)
        return
    if folder.is_dir():
        raise CannotExport(f"{adapter}: there is no {CONFIG_FILE} in that folder")
    with tempfile.TemporaryDirectory(prefix="quickchange-export-") as downloaded:
        name = _download(adapter, url.rstrip("/"), api_key, Path(downloaded))
        yield _files_in(Path(downloaded), name)


def _files_in(folder: Path, name: str) -> AdapterFiles:
    task = folder / TASK_FILE
    weights = folder / WEIGHTS_FILE
    if not weights.is_file():
        raise CannotExport(f"{name}: there is no {WEIGHTS_FILE}; pickles are not read")
    return AdapterFiles(name, folder / CONFIG_FILE, weights, task if task.is_file() else None)


def _download(adapter: str, url: str, api_key: str | None, folder: Path) -> str:
    """Fetch a version's files; return which version it is."""
    model = json.loads(_get(f"{url}/v1/models/{quote(adapter, safe=':@')}", api_key))
    name, _, number = str(model.get("root") or "").rpartition(":")
    if not (model.get("parent") and name and number.isdigit()):
        raise CannotExport(f"{adapter!r} is the base at {url}, not an adapter")
    path = f"{url}/v1/adapters/{quote(name, safe='')}/versions/{number}/files"
    for file in (CONFIG_FILE, WEIGHTS_FILE, TASK_FILE):
        try:
            _save(f"{path}/{file}", api_key, folder / file)
        except _NotThere:
            if file != TASK_FILE:
                raise
    return f"{name}:{number}"


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """The key goes to the server that was named, and nowhere else."""

    def redirect_request(self, *_: Any) -> None:
        """Follow nothing: the answer is an error with its status."""


_OPENER = urllib.request.build_opener(_NoRedirects)


class _NotThere(CannotExport):
    """The server has no such thing."""


def _get(address: str, api_key: str | None) -> bytes:
    with _opened(address, api_key) as answer:
        body: bytes = answer.read(1 << 20)
        return body


def _save(address: str, api_key: str | None, path: Path) -> None:
    with _opened(address, api_key) as answer, path.open("wb") as file:
        shutil.copyfileobj(answer, file)


@contextmanager
def _opened(address: str, api_key: str | None) -> Iterator[addinfourl]:
    if not address.startswith(("http://", "https://")):
        raise CannotExport(f"{address}: an address begins with http:// or https://")
    headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
    request = urllib.request.Request(address, headers=headers)
    try:
        with _OPENER.open(request, timeout=TIMEOUT_S) as answer:
            yield answer
    except urllib.error.HTTPError as error:
        kind = _NotThere if error.code == 404 else CannotExport
        raise kind(f"the server answered {error.code}: {_message(error)}") from error
    except (urllib.error.URLError, TimeoutError) as error:
        reason = getattr(error, "reason", error)
        raise CannotExport(
            f"no server answers at {address}: {reason}; name a folder, or another --url"
        ) from error


def _message(error: urllib.error.HTTPError) -> str:
    try:
        return str(json.loads(error.read(1 << 16))["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return str(error.reason)
