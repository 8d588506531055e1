"""Every call of the API, described once for the plain and the async client. Sends nothing."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, Literal
from urllib.parse import quote

from quickchange_client.adapter import (
    Adapter,
    AdapterAction,
    AdapterConfig,
    AdapterDeletion,
    AdapterPage,
    AdapterReport,
    AdapterVersion,
    EventPage,
)
from quickchange_client.adapter_folder import CONFIG_FILE, AdapterFolder
from quickchange_client.answer import Answer, AnswerT
from quickchange_client.errors import ArgumentInvalid
from quickchange_client.multipart import FilePart, MultipartBody, Progress
from quickchange_client.server_state import Health, Memory, Model, ModelList

JSON_TYPE = "application/json"
WEIGHTS_TYPE = "application/octet-stream"

Visibility = Literal["public", "private"]
Verb = Literal["unload", "pin", "unpin", "merge", "unmerge", "disable", "enable"]
LoadTier = Literal["host", "device"]
MAX_EVENTS = 100


@dataclass(frozen=True, slots=True)
class Call(Generic[AnswerT]):
    """One request, and what its answer is read as.

    `is_repeatable`: doing it twice leaves the server as doing it once does, so it may be sent again
    when the connection broke and nobody knows whether it arrived.
    """

    method: str
    path: str
    answer: type[AnswerT]
    body: Mapping[str, Any] | None = None
    form: MultipartBody | None = None
    query: Mapping[str, str | int | float] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    is_repeatable: bool = True


@dataclass(frozen=True, slots=True)
class UploadOptions:
    """How an upload is checked and published.

    `alias` is pointed at the version in the same transaction. `allow_noop` accepts an adapter that
    changes nothing; `strict_base` refuses one whose config names another base. `visibility` None:
    as it is, and for a new name what the server takes. `tags` take the place of the adapter's own;
    None leaves those.
    """

    name: str
    alias: str | None = None
    allow_noop: bool = False
    strict_base: bool = False
    visibility: Visibility | None = None
    tags: tuple[str, ...] | None = None

    def fields(self) -> dict[str, str]:
        """Return the form's text fields; what is at its default is left out.

        Raises: ArgumentInvalid if a tag holds a comma.
        """
        texts = {
            "name": self.name,
            "alias": self.alias,
            "visibility": self.visibility,
            "tags": None if self.tags is None else _joined(self.tags),
            "allow_noop": "true" if self.allow_noop else None,
            "strict_base": "true" if self.strict_base else None,
        }
        return {key: text for key, text in texts.items() if text is not None}


def generate(path: str, body: Mapping[str, Any], answer: type[AnswerT]) -> Call[AnswerT]:
    """Generate; never sent twice on its own unless the server did not begin."""
    return Call("POST", path, answer, body=body, is_repeatable=False)


def generate_stream(path: str, body: Mapping[str, Any], answer: type[AnswerT]) -> Call[AnswerT]:
    """Generate, chunk by chunk, with the usage at the end."""
    usage = {"include_usage": True}
    return generate(path, {"stream_options": usage, **body, "stream": True}, answer)


def upload(
    folder: AdapterFolder, options: UploadOptions, progress: Progress | None = None
) -> Call[AdapterVersion]:
    """Upload; repeatable, because equal bytes under a name are the version that is there."""
    form = _upload_form(folder, options, progress)
    return Call("POST", "/v1/adapters", AdapterVersion, form=form)


def dry_run(
    folder: AdapterFolder, options: UploadOptions, progress: Progress | None = None
) -> Call[AdapterReport]:
    """Have an upload checked; nothing is kept."""
    form = _upload_form(folder, options, progress)
    return Call("POST", "/v1/adapters", AdapterReport, form=form, query={"dry_run": "true"})


def list_adapters(after: str | None, limit: int | None) -> Call[AdapterPage]:
    """List adapters by name."""
    query: dict[str, str | int | float] = {}
    if after is not None:
        query["after"] = after
    if limit is not None:
        query["limit"] = limit
    return Call("GET", "/v1/adapters", AdapterPage, query=query)


def get_adapter(name: str) -> Call[Adapter]:
    """Get an adapter with its versions and aliases."""
    return Call("GET", _adapter_path(name), Adapter)


def get_version(name: str, version: int) -> Call[AdapterVersion]:
    """Get one version."""
    return Call("GET", _adapter_path(name, "versions", str(version)), AdapterVersion)


def get_file(name: str, version: int, file: str) -> Call[Answer]:
    """Download one file of a version; its answer is to be read as a stream of bytes."""
    return Call("GET", _adapter_path(name, "versions", str(version), "files", file), Answer)


def get_config(name: str, version: int) -> Call[AdapterConfig]:
    """Get a version's adapter_config.json."""
    path = _adapter_path(name, "versions", str(version), "files", CONFIG_FILE)
    return Call("GET", path, AdapterConfig)


def delete_adapter(
    name: str, version: int | None, timeout_s: float | None, if_match: str | None
) -> Call[AdapterDeletion]:
    """Delete a version, or the whole adapter. Not repeated: the second answer would be 404."""
    more = () if version is None else ("versions", str(version))
    query: dict[str, str | int | float] = {} if timeout_s is None else {"timeout_s": timeout_s}
    return Call(
        "DELETE",
        _adapter_path(name, *more),
        AdapterDeletion,
        query=query,
        headers=_if_match(if_match),
        is_repeatable=False,
    )


def set_alias(name: str, alias: str, version: int, if_match: str | None) -> Call[Adapter]:
    """Point an alias at a version."""
    path = _adapter_path(name, "aliases", alias)
    return Call("PUT", path, Adapter, body={"version": version}, headers=_if_match(if_match))


def delete_alias(name: str, alias: str, if_match: str | None) -> Call[Adapter]:
    """Remove an alias. Not repeated: the second answer would be 404."""
    path = _adapter_path(name, "aliases", alias)
    return Call("DELETE", path, Adapter, headers=_if_match(if_match), is_repeatable=False)


def list_events(name: str, after: int) -> Call[EventPage]:
    """Get what was done to a name, oldest first, behind the event `after`."""
    query: dict[str, str | int | float] = {"after": after, "limit": MAX_EVENTS}
    return Call("GET", _adapter_path(name, "events"), EventPage, query=query)


def act(
    verb: Verb,
    name: str,
    version: int | None,
    *,
    here_only: bool = False,
    if_match: str | None = None,
) -> Call[AdapterAction]:
    """Do something to a version; a repeat changes nothing."""
    return Call(
        "POST",
        _adapter_path(name, verb),
        AdapterAction,
        body=None if version is None else {"version": version},
        query={"scope": "replica"} if here_only else {},
        headers=_if_match(if_match),
    )


def load(name: str, version: int | None, tier: LoadTier | None) -> Call[AdapterAction]:
    """Bring a version into memory; a repeat changes nothing."""
    body: dict[str, Any] = {} if version is None else {"version": version}
    if tier is not None:
        body["tier"] = tier
    return Call("POST", _adapter_path(name, "load"), AdapterAction, body=body or None)


def list_models() -> Call[ModelList]:
    """List what requests may use as `model`."""
    return Call("GET", "/v1/models", ModelList)


def get_model(model: str) -> Call[Model]:
    """Get one of these."""
    return Call("GET", f"/v1/models/{quote(_segment(model), safe='/:@')}", Model)


def memory() -> Call[Memory]:
    """Get the bytes by part."""
    return Call("GET", "/v1/memory", Memory)


def health() -> Call[Health]:
    """Ask whether requests are taken."""
    return Call("GET", "/health", Health)


def _upload_form(
    folder: AdapterFolder, options: UploadOptions, progress: Progress | None
) -> MultipartBody:
    files = [FilePart("adapter_config", folder.config, JSON_TYPE)]
    if folder.task is not None:
        files.append(FilePart("task", folder.task, JSON_TYPE))
    files.append(FilePart("adapter_model", folder.weights, WEIGHTS_TYPE))
    return MultipartBody(options.fields(), tuple(files), progress)


def _joined(tags: tuple[str, ...]) -> str:
    for tag in tags:
        if "," in tag or not tag.strip():
            raise ArgumentInvalid(f"{tag!r} is no tag: leave out commas, and say something")
    return ",".join(tags)


def _if_match(etag: str | None) -> dict[str, str]:
    return {} if etag is None else {"If-Match": etag}


def _adapter_path(name: str, *more: str) -> str:
    return "/".join(["/v1/adapters", *(quote(_name(part), safe="") for part in (name, *more))])


def _segment(text: str) -> str:
    if text in ("", ".", ".."):
        raise ArgumentInvalid(f"{text!r} names nothing; give a name such as 'sentiment'")
    return text


def _name(text: str) -> str:
    """Return a segment that is one at the server too, which reads `%2F` as a slash."""
    if "/" in text:
        raise ArgumentInvalid(f"{text!r} names nothing: no name holds a slash")
    return _segment(text)
