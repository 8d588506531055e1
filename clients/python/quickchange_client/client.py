"""The client for plain code. Says what can be asked; how it is sent is the connection's matter."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self, Unpack

import httpx

from quickchange_client import call
from quickchange_client.adapter import (
    Adapter,
    AdapterAction,
    AdapterConfig,
    AdapterDeletion,
    AdapterEvent,
    AdapterPage,
    AdapterReport,
    AdapterVersion,
)
from quickchange_client.adapter_folder import AdapterFolder
from quickchange_client.alias_history import DEFAULT_ALIAS, version_before
from quickchange_client.answer import AnswerT
from quickchange_client.call import Call, LoadTier, UploadOptions, Visibility
from quickchange_client.connection import Connection
from quickchange_client.download import VersionFolder
from quickchange_client.generation import (
    ChatChunk,
    ChatCompletion,
    ChatOptions,
    Completion,
    CompletionOptions,
    Message,
    Prompt,
    chat_body,
    completion_body,
)
from quickchange_client.keys import Keys
from quickchange_client.multipart import Progress
from quickchange_client.retry import RetryPolicy
from quickchange_client.server_state import Health, Memory, Model, ModelList
from quickchange_client.settings import Settings
from quickchange_client.stream import Stream

Events = list[AdapterEvent]
DEFAULT_TIMEOUT_S = 600.0
CHAT_PATH = "/v1/chat/completions"
COMPLETION_PATH = "/v1/completions"


class Quickchange:
    """A client of one server. Safe to share between threads; close it, or use it in `with`.

    `url` and `api_key` fall back to QUICKCHANGE_URL and QUICKCHANGE_API_KEY, then to
    http://127.0.0.1:8000 and no key. `timeout_s` bounds the wait for each next byte. Every method
    raises the tree in `quickchange_client.errors`.
    """

    def __init__(
        self,
        url: str | None = None,
        *,
        api_key: str | None = None,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        retry: RetryPolicy | None = None,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self._connection = Connection.open(
            Settings.read(url, api_key),
            timeout_s=timeout_s,
            retry=retry or RetryPolicy(),
            transport=transport,
        )
        self.adapters = Adapters(self._connection)
        self.models = Models(self._connection)
        self.keys = Keys(self._connection)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close all connections."""
        self._connection.close()

    def chat(
        self, model: str, messages: str | Sequence[Message], **options: Unpack[ChatOptions]
    ) -> ChatCompletion:
        """Answer a conversation; a bare string is one user message."""
        body = chat_body(model, messages, options)
        return self._connection.send(call.generate(CHAT_PATH, body, ChatCompletion))

    def stream_chat(
        self, model: str, messages: str | Sequence[Message], **options: Unpack[ChatOptions]
    ) -> Stream[ChatChunk]:
        """Answer a conversation chunk by chunk; the last chunk carries the usage."""
        return self._stream(CHAT_PATH, chat_body(model, messages, options), ChatChunk)

    def complete(
        self, model: str, prompt: Prompt, **options: Unpack[CompletionOptions]
    ) -> Completion:
        """Continue a prompt: text, token ids, or several of either."""
        body = completion_body(model, prompt, options)
        return self._connection.send(call.generate(COMPLETION_PATH, body, Completion))

    def stream_complete(
        self, model: str, prompt: Prompt, **options: Unpack[CompletionOptions]
    ) -> Stream[Completion]:
        """Continue a prompt chunk by chunk; the last chunk carries the usage."""
        return self._stream(COMPLETION_PATH, completion_body(model, prompt, options), Completion)

    def memory(self) -> Memory:
        """Return the server's bytes by part."""
        return self._connection.send(call.memory())

    def health(self) -> Health:
        """Return normally when the server takes requests. Raises: Unavailable when it does not."""
        return self._connection.send(call.health())

    def _stream(self, path: str, body: dict[str, object], chunk: type[AnswerT]) -> Stream[AnswerT]:
        request: Call[AnswerT] = call.generate_stream(path, body, chunk)
        return Stream(self._connection.exchange(request, is_stream=True), chunk)


class Adapters:
    """What can be done with adapters. `version` None: what the bare name means (`default`)."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def upload(
        self,
        folder: str | Path,
        *,
        name: str,
        alias: str | None = None,
        visibility: Visibility | None = None,
        tags: Sequence[str] | None = None,
        allow_noop: bool = False,
        strict_base: bool = False,
        progress: Progress | None = None,
    ) -> AdapterVersion:
        """Upload a PEFT adapter's folder; return the version, with `meta.status` 201 if it is new.

        The first version of a name goes live at once, later ones when an alias is moved to them:
        `alias="default"` does so in the same transaction. `visibility` says whether other tenants
        may use it. `tags` take the place of the adapter's. `progress(sent_bytes, total_bytes)`.

        Raises: FolderInvalid, before anything is sent; UploadRefused, with all problems.
        """
        labels = None if tags is None else tuple(tags)
        options = UploadOptions(name, alias, allow_noop, strict_base, visibility, labels)
        return self._connection.send(call.upload(AdapterFolder.find(folder), options, progress))

    def dry_run(
        self,
        folder: str | Path,
        *,
        name: str,
        allow_noop: bool = False,
        strict_base: bool = False,
        progress: Progress | None = None,
    ) -> AdapterReport:
        """Have the server check a folder as an upload would be, keeping nothing."""
        options = UploadOptions(name, None, allow_noop, strict_base)
        return self._connection.send(call.dry_run(AdapterFolder.find(folder), options, progress))

    def list(self, *, after: str | None = None, limit: int | None = None) -> AdapterPage:
        """Return one page of adapters, sorted by name; `iterate` walks all pages."""
        return self._connection.send(call.list_adapters(after, limit))

    def iterate(self) -> Iterator[Adapter]:
        """Yield every adapter, asking for pages as needed."""
        page = self.list()
        yield from page.data
        while page.has_more and page.last_id is not None:
            page = self.list(after=page.last_id)
            yield from page.data

    def get(self, name: str) -> Adapter:
        """Return an adapter with its versions and aliases."""
        return self._connection.send(call.get_adapter(name))

    def get_version(self, name: str, version: int) -> AdapterVersion:
        """Return one version with the report of its upload."""
        return self._connection.send(call.get_version(name, version))

    def get_config(self, name: str, version: int) -> AdapterConfig:
        """Return a version's adapter_config.json, as it was uploaded."""
        return self._connection.send(call.get_config(name, version))

    def download(
        self, name: str, version: int, folder: str | Path, *, progress: Progress | None = None
    ) -> AdapterVersion:
        """Save a version's files, as they were uploaded, in a folder that is new or empty.

        They are compared with the version's digest before the folder is there; `upload` takes it
        as it is. `progress(received_bytes, total_bytes)`.

        Raises: ArgumentInvalid when the folder holds something, FolderNotWritten,
        StreamInterrupted, AnswerInvalid.
        """
        found = self.get_version(name, version)
        with VersionFolder(folder, found, progress) as target:
            for file in target.files:
                request = call.get_file(name, version, file)
                response = self._connection.exchange(request, is_stream=True)
                target.save(file, response)
            target.finish()
        return found

    def delete(
        self,
        name: str,
        version: int | None = None,
        *,
        timeout_s: float | None = None,
        if_match: str | None = None,
    ) -> AdapterDeletion:
        """Delete one version, or with `version` None the whole adapter.

        New requests do not find it at once; running ones finish, waited for up to `timeout_s`.
        `if_match` (an ETag) refuses if the adapter changed.
        """
        request = call.delete_adapter(name, version, timeout_s, if_match)
        return self._connection.send(request)

    def set_alias(
        self, name: str, alias: str, version: int, *, if_match: str | None = None
    ) -> Adapter:
        """Point an alias at a version; `if_match` (an ETag) refuses if the adapter changed."""
        return self._connection.send(call.set_alias(name, alias, version, if_match))

    def delete_alias(self, name: str, alias: str, *, if_match: str | None = None) -> Adapter:
        """Remove an alias; its version stays."""
        return self._connection.send(call.delete_alias(name, alias, if_match))

    def events(self, name: str) -> Events:
        """Return what was done to a name, oldest first; a deleted name keeps its log.

        The oldest events go by age and number (`--event-days`, `--events-per-adapter`).
        """
        page = self._connection.send(call.list_events(name, 0))
        found = page.data
        while page.has_more:
            page = self._connection.send(call.list_events(name, int(found[-1].id)))
            found += page.data
        return found

    def rollback(self, name: str, alias: str = DEFAULT_ALIAS) -> Adapter:
        """Point an alias at what it meant before; a second time, back again.

        Versions that were deleted or disabled since are passed over.

        Raises: ArgumentInvalid when it meant nothing else; PreconditionFailed when somebody
        changes the adapter meanwhile.
        """
        adapter = self.get(name)
        version = version_before(adapter, self.events(name), alias)
        return self.set_alias(name, alias, version, if_match=adapter.meta.etag)

    def load(
        self, name: str, version: int | None = None, *, tier: LoadTier | None = None
    ) -> AdapterAction:
        """Bring a version into memory before the first request needs it.

        `tier` device: into the device's too; None is host.
        """
        return self._connection.send(call.load(name, version, tier))

    def unload(self, name: str, version: int | None = None) -> AdapterAction:
        """Give device, host and merged bytes back; the next request loads it again."""
        return self._connection.send(call.act("unload", name, version))

    def pin(
        self, name: str, version: int | None = None, *, here_only: bool = False
    ) -> AdapterAction:
        """Load a version now and keep it loaded: on every server, or `here_only`."""
        request = call.act("pin", name, version, here_only=here_only)
        return self._connection.send(request)

    def unpin(
        self, name: str, version: int | None = None, *, here_only: bool = False
    ) -> AdapterAction:
        """Let a version go like any other when room is needed."""
        request = call.act("unpin", name, version, here_only=here_only)
        return self._connection.send(request)

    def merge(
        self, name: str, version: int | None = None, *, here_only: bool = False
    ) -> AdapterAction:
        """Make a merged copy of the weights, beside the untouched base."""
        request = call.act("merge", name, version, here_only=here_only)
        return self._connection.send(request)

    def unmerge(
        self, name: str, version: int | None = None, *, here_only: bool = False
    ) -> AdapterAction:
        """Drop the merged copy."""
        request = call.act("unmerge", name, version, here_only=here_only)
        return self._connection.send(request)

    def disable(
        self,
        name: str,
        version: int | None = None,
        *,
        here_only: bool = False,
        if_match: str | None = None,
    ) -> AdapterAction:
        """Take a version out of service: 404 to new requests; the files stay."""
        request = call.act("disable", name, version, here_only=here_only, if_match=if_match)
        return self._connection.send(request)

    def enable(
        self,
        name: str,
        version: int | None = None,
        *,
        here_only: bool = False,
        if_match: str | None = None,
    ) -> AdapterAction:
        """Put a version back into service."""
        request = call.act("enable", name, version, here_only=here_only, if_match=if_match)
        return self._connection.send(request)


class Models:
    """What requests may use as `model`."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def list(self) -> ModelList:
        """Return the base, bare adapter names, and `name@alias`."""
        return self._connection.send(call.list_models())

    def get(self, model: str) -> Model:
        """Return what a model string means."""
        return self._connection.send(call.get_model(model))
