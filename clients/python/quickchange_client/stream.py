"""A running generation, chunk by chunk. To leave it is to cancel it: the connection closes."""

import json
from collections.abc import AsyncIterator, Iterator
from types import TracebackType
from typing import Generic, Self

import httpx

from quickchange_client.answer import AnswerMeta, AnswerT
from quickchange_client.connection import error_from_json, meta_of
from quickchange_client.errors import AnswerInvalid, StreamInterrupted
from quickchange_client.sse import SseDecoder

DONE = "[DONE]"


class Stream(Generic[AnswerT]):
    """Iterate over it once; use it as a context manager if you may leave early.

    Raises while iterating: ApiError (the server failed), StreamInterrupted (it went away).
    """

    def __init__(self, response: httpx.Response, chunk: type[AnswerT]) -> None:
        self._response = response
        self._reader = _ChunkReader(chunk, meta_of(response))
        self._chunks = self._read()

    @property
    def meta(self) -> AnswerMeta:
        """Status and headers of the answer."""
        return self._reader.meta

    def __iter__(self) -> Iterator[AnswerT]:
        return self._chunks

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
        """End the stream; the server stops generating."""
        self._response.close()

    def _read(self) -> Iterator[AnswerT]:
        try:
            for block in self._response.iter_bytes():
                yield from self._reader.feed(block)
                if self._reader.is_done:
                    return
            raise self._reader.interrupted()
        except (httpx.TransportError, httpx.StreamError) as error:
            raise self._reader.interrupted() from error
        finally:
            self.close()


class AsyncStream(Generic[AnswerT]):
    """Iterate over it once; use it as an async context manager if you may leave early.

    Raises while iterating: ApiError (the server failed), StreamInterrupted (it went away).
    """

    def __init__(self, response: httpx.Response, chunk: type[AnswerT]) -> None:
        self._response = response
        self._reader = _ChunkReader(chunk, meta_of(response))
        self._chunks = self._read()

    @property
    def meta(self) -> AnswerMeta:
        """Status and headers of the answer."""
        return self._reader.meta

    def __aiter__(self) -> AsyncIterator[AnswerT]:
        return self._chunks

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
        """End the stream; the server stops generating."""
        await self._response.aclose()

    async def _read(self) -> AsyncIterator[AnswerT]:
        try:
            async for block in self._response.aiter_bytes():
                for chunk in self._reader.feed(block):
                    yield chunk
                if self._reader.is_done:
                    return
            raise self._reader.interrupted()
        except (httpx.TransportError, httpx.StreamError) as error:
            raise self._reader.interrupted() from error
        finally:
            await self.close()


class _ChunkReader(Generic[AnswerT]):
    """Bytes in, chunks out; what both kinds of stream share."""

    def __init__(self, chunk: type[AnswerT], meta: AnswerMeta) -> None:
        self.meta = meta
        self.is_done = False
        self._chunk = chunk
        self._decoder = SseDecoder()
        self._num_chunks = 0

    def feed(self, block: bytes) -> Iterator[AnswerT]:
        """Yield the chunks that this block completes; sets `is_done` at the announced end."""
        for data in self._decoder.feed(block):
            if data == DONE:
                self.is_done = True
                return
            self._num_chunks += 1
            yield self._read(data)

    def interrupted(self) -> StreamInterrupted:
        """Return the error for a stream that ended without its end."""
        return StreamInterrupted(
            f"the stream broke off after {self._num_chunks} chunks, before the server ended it; "
            "what came so far is not the whole answer"
        )

    def _read(self, data: str) -> AnswerT:
        try:
            value = json.loads(data)
            if (error := error_from_json(value, request_id=self.meta.request_id)) is not None:
                raise error
            chunk = self._chunk.model_validate(value)
        except ValueError as error:
            raise AnswerInvalid(f"the stream held {data[:200]!r}, which is no chunk") from error
        chunk.set_meta(self.meta)
        return chunk
