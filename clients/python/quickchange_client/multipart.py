"""A multipart/form-data body that is read from disk while it is sent. Knows no adapters.

Its length is known beforehand, so servers and proxies can refuse what is too large at once; it can
be sent again, from the start, when a request is repeated.

Source: RFC 7578.
"""

import secrets
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from anyio import to_thread

BLOCK_BYTES = 256 * 1024

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class FilePart:
    """A file to send under a field name."""

    field_name: str
    path: Path
    content_type: str

    def header(self, boundary: str) -> bytes:
        """Return what precedes the file's bytes."""
        return (
            f"--{boundary}\r\n"
            f'Content-Disposition: form-data; name="{self.field_name}"; '
            f'filename="{self.path.name}"\r\n'
            f"Content-Type: {self.content_type}\r\n\r\n"
        ).encode()


@dataclass(frozen=True)
class MultipartBody:
    """Text fields, then files. Iterate over it for the bytes, in a plain or an async loop.

    `progress(sent_bytes, total_bytes)` is called after each block; it starts again at the first
    block when the request is repeated.
    """

    fields: Mapping[str, str]
    files: tuple[FilePart, ...]
    progress: Progress | None = None
    boundary: str = field(default_factory=lambda: secrets.token_hex(16))

    @property
    def headers(self) -> dict[str, str]:
        """Return the headers that go with the body."""
        return {
            "Content-Type": f"multipart/form-data; boundary={self.boundary}",
            "Content-Length": str(self.num_bytes),
        }

    @property
    def num_bytes(self) -> int:
        """Bytes of the whole body."""
        framing = len(self._fields()) + len(self._end())
        return framing + sum(
            len(part.header(self.boundary)) + part.path.stat().st_size + len(b"\r\n")
            for part in self.files
        )

    def __iter__(self) -> Iterator[bytes]:
        """Yield the body block by block."""
        total_bytes = self.num_bytes
        sent_bytes = 0
        for block in self.blocks():
            yield block
            sent_bytes += len(block)
            self.report(sent_bytes, total_bytes)

    def blocks(self) -> Iterator[bytes]:
        """Yield the body block by block, telling nobody."""
        if self.fields:
            yield self._fields()
        for part in self.files:
            yield part.header(self.boundary)
            with part.path.open("rb") as file:
                while block := file.read(BLOCK_BYTES):
                    yield block
            yield b"\r\n"
        yield self._end()

    def report(self, sent_bytes: int, total_bytes: int) -> None:
        """Tell whoever watches how far the body has gone out."""
        if self.progress is not None:
            self.progress(sent_bytes, total_bytes)

    def _fields(self) -> bytes:
        return b"".join(
            f'--{self.boundary}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n'
            f"{value}\r\n".encode()
            for name, value in self.fields.items()
        )

    def _end(self) -> bytes:
        return f"--{self.boundary}--\r\n".encode()


class AsyncMultipartBody:
    """The same bytes for an async client: the disk is read in a thread."""

    def __init__(self, body: MultipartBody) -> None:
        self._body = body

    async def __aiter__(self) -> AsyncIterator[bytes]:
        """Yield the body block by block."""
        total_bytes = self._body.num_bytes
        sent_bytes = 0
        blocks = self._body.blocks()
        while block := await to_thread.run_sync(next, blocks, b""):
            yield block
            sent_bytes += len(block)
            self._body.report(sent_bytes, total_bytes)
