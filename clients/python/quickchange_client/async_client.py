"""The client for async code. Says what can be asked; how it is sent is the connection's matter."""

from collections.abc import AsyncIterator, Sequence
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
    AdapterPage,
    AdapterReport,
    AdapterVersion,
)
from quickchange_client.adapter_folder import AdapterFolder
from quickchange_client.alias_history import DEFAULT_ALIAS, version_before
from quickchange_client.answer import AnswerT
from quickchange_client.call import Call, LoadTier, UploadOptions, Visibility
from quickchange_client.client import CHAT_PATH, COMPLETION_PATH, DEFAULT_TIMEOUT_S, Events
from quickchange_client.connection import AsyncConnection
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
from quickchange_client.keys import AsyncKeys
from quickchange_client.multipart import Progress
from quickchange_client.retry import RetryPolicy
from quickchange_client.server_state import Health, Memory, Model, ModelList
from quickchange_client.settings import Settings
from quickchange_client.stream import AsyncStream


class AsyncQuickchange:
    """A client of one server. Share it between tasks; close it, or use it in `async with`.

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
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._connection = AsyncConnection.open(
            Settings.read(url, api_key),
            timeout_s=timeout_s,
            retry=retry or RetryPolicy(),
            transport=transport,
        )
        self.adapters = AsyncAdapters(self._connection)
        self.models = AsyncModels(self._connection)
        self.keys = AsyncKeys(self._connection)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close all connections."""
        await self._connection.close()

    async def chat(
        self, model: str, messages: str | Sequence[Message], **options: Unpack[ChatOptions]
    ) -> ChatCompletion:
        """Answer a conversation; a bare string is one user message."""
        body = chat_body(model, messages, options)
        return await self._connection.send(call.generate(CHAT_PATH, body, ChatCompletion))

    async def stream_chat(
        self, model: str, messages: str | Sequence[Message], **options: Unpack[ChatOptions]
    ) -> AsyncStream[ChatChunk]:
        """Answer a conversation chunk by chunk; the last chunk carries the usage."""
        return await self._stream(CHAT_PATH, chat_body(model, messages, options), ChatChunk)

    async def complete(
        self, model: str, prompt: Prompt, **options: Unpack[CompletionOptions]
    ) -> Completion:
        """Continue a prompt: text, token ids, or several of either."""
        body = completion_body(model, prompt, options)
        return await self._connection.send(call.generate(COMPLETION_PATH, body, Completion))

    async def stream_complete(
        self, model: str, prompt: Prompt, **options: Unpack[CompletionOptions]
    ) -> AsyncStream[Completion]:
        """Continue a prompt chunk by chunk; the last chunk carries the usage."""
        return await self._stream(
            COMPLETION_PATH, completion_body(model, prompt, options), Completion
        )

    async def memory(self) -> Memory:
        """Return the server's bytes by part."""
        return await self._connection.send(call.memory())

    async def health(self) -> Health:
        """Return normally when the server takes requests. Raises: Unavailable when it does not."""
        return await self._connection.send(call.health())

    async def _stream(
        self, path: str, body: dict[str, object], chunk: type[AnswerT]
    ) -> AsyncStream[AnswerT]:
        request: Call[AnswerT] = call.generate_stream(path, body, chunk)
        return AsyncStream(await self._connection.exchange(request, is_stream=True), chunk)


class AsyncAdapters:
    """What can be done with adapters. `version` None: what the bare name means (`default`)."""

    def __init__(self, connection: AsyncConnection) -> None:
        self._connection = connection

    async def upload(
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
        return await self._connection.send(
            call.upload(AdapterFolder.find(folder), options, progress)
        )

    async def dry_run(
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
        return await self._connection.send(
            call.dry_run(AdapterFolder.find(folder), options, progress)
        )

    async def list(self, *, after: str | None = None, limit: int | None = None) -> AdapterPage:
        """Return one page of adapters, sorted by name; `iterate` walks all pages."""
        return await self._connection.send(call.list_adapters(after, limit))

    async def iterate(self) -> AsyncIterator[Adapter]:
        """Yield every adapter, asking for pages as needed."""
        page = await self.list()
        for adapter in page.data:
            yield adapter
        while page.has_more and page.last_id is not None:
            page = await self.list(after=page.last_id)
            for adapter in page.data:
                yield adapter

    async def get(self, name: str) -> Adapter:
        """Return an adapter with its versions and aliases."""
        return await self._connection.send(call.get_adapter(name))

    async def get_version(self, name: str, version: int) -> AdapterVersion:
        """Return one version with the report of its upload."""
        return await self._connection.send(call.get_version(name, version))

    async def get_config(self, name: str, version: int) -> AdapterConfig:
        """Return a version's adapter_config.json, as it was uploaded."""
        return await self._connection.send(call.get_config(name, version))

    async def download(
        self, name: str, version: int, folder: str | Path, *, progress: Progress | None = None
    ) -> AdapterVersion:
        """Save a version's files, as they were uploaded, in a folder that is new or empty.

        They are compared with the version's digest before the folder is there; `upload` takes it
        as it is. `progress(received_bytes, total_bytes)`.

        Raises: ArgumentInvalid when the folder holds something, FolderNotWritten,
        StreamInterrupted, AnswerInvalid.
        """
        found = await self.get_version(name, version)
        with VersionFolder(folder, found, progress) as target:
            for file in target.files:
                request = call.get_file(name, version, file)
                response = await self._connection.exchange(request, is_stream=True)
                await target.save_async(file, response)
            target.finish()
        return found

    async def delete(
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
        return await self._connection.send(request)

    async def set_alias(
        self, name: str, alias: str, version: int, *, if_match: str | None = None
    ) -> Adapter:
        """Point an alias at a version; `if_match` (an ETag) refuses if the adapter changed."""
        return await self._connection.send(call.set_alias(name, alias, version, if_match))

    async def delete_alias(self, name: str, alias: str, *, if_match: str | None = None) -> Adapter:
        """Remove an alias; its version stays."""
        return await self._connection.send(call.delete_alias(name, alias, if_match))

    async def events(self, name: str) -> Events:
        """Return what was done to a name, oldest first; a deleted name keeps its log.

        The oldest events go by age and number (`--event-days`, `--events-per-adapter`).
        """
        page = await self._connection.send(call.list_events(name, 0))
        found = page.data
        while page.has_more:
            page = await self._connection.send(call.list_events(name, int(found[-1].id)))
            found += page.data
        return found

    async def rollback(self, name: str, alias: str = DEFAULT_ALIAS) -> Adapter:
        """Point an alias at what it meant before; a second time, back again.

        Versions that were deleted or disabled since are passed over.

        Raises: ArgumentInvalid when it meant nothing else; PreconditionFailed when somebody
        changes the adapter meanwhile.
        """
        adapter = await self.get(name)
        version = version_before(adapter, await self.events(name), alias)
        return await self.set_alias(name, alias, version, if_match=adapter.meta.etag)

    async def load(
        self, name: str, version: int | None = None, *, tier: LoadTier | None = None
    ) -> AdapterAction:
        """Bring a version into memory before the first request needs it.

        `tier` device: into the device's too; None is host.
        """
        return await self._connection.send(call.load(name, version, tier))

    async def unload(self, name: str, version: int | None = None) -> AdapterAction:
        """Give device, host and merged bytes back; the next request loads it again."""
        return await self._connection.send(call.act("unload", name, version))

    async def pin(
        self, name: str, version: int | None = None, *, here_only: bool = False
    ) -> AdapterAction:
        """Load a version now and keep it loaded: on every server, or `here_only`."""
        request = call.act("pin", name, version, here_only=here_only)
        return await self._connection.send(request)

    async def unpin(
        self, name: str, version: int | None = None, *, here_only: bool = False
    ) -> AdapterAction:
        """Let a version go like any other when room is needed."""
        request = call.act("unpin", name, version, here_only=here_only)
        return await self._connection.send(request)

    async def merge(
        self, name: str, version: int | None = None, *, here_only: bool = False
    ) -> AdapterAction:
        """Make a merged copy of the weights, beside the untouched base."""
        request = call.act("merge", name, version, here_only=here_only)
        return await self._connection.send(request)

    async def unmerge(
        self, name: str, version: int | None = None, *, here_only: bool = False
    ) -> AdapterAction:
        """Drop the merged copy."""
        request = call.act("unmerge", name, version, here_only=here_only)
        return await self._connection.send(request)

    async def disable(
        self,
        name: str,
        version: int | None = None,
        *,
        here_only: bool = False,
        if_match: str | None = None,
    ) -> AdapterAction:
        """Take a version out of service: 404 to new requests; the files stay."""
        request = call.act("disable", name, version, here_only=here_only, if_match=if_match)
        return await self._connection.send(request)

    async def enable(
        self,
        name: str,
        version: int | None = None,
        *,
        here_only: bool = False,
        if_match: str | None = None,
    ) -> AdapterAction:
        """Put a version back into service."""
        request = call.act("enable", name, version, here_only=here_only, if_match=if_match)
        return await self._connection.send(request)


class AsyncModels:
    """What requests may use as `model`."""

    def __init__(self, connection: AsyncConnection) -> None:
        self._connection = connection

    async def list(self) -> ModelList:
        """Return the base, bare adapter names, and `name@alias`."""
        return await self._connection.send(call.list_models())

    async def get(self, model: str) -> Model:
        """Return what a model string means."""
        return await self._connection.send(call.get_model(model))
