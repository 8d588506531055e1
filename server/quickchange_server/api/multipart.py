"""Read multipart/form-data part by part while it arrives; nothing is spooled or kept.

Source: RFC 7578. The syntax is python_multipart's job; what a part is for, the caller's.
"""

import logging
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from quickchange_server.errors import InvalidRequest, TooLarge, UnsupportedMediaType

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks

MAX_PARTS = 32
# It warns of any malformed byte, so anybody could fill the log; the answer says what is wrong.
logging.getLogger("python_multipart").setLevel(logging.ERROR)
_PART_END: Final = None


class FormInvalid(InvalidRequest):
    """The bytes are not a form, or break off: nothing after this place can be read."""

    code = "invalid_form"


@dataclass(frozen=True, slots=True)
class _PartBegin:
    name: str


class MultipartReader:
    """One body. Read each part's bytes to the end before the next part is asked for."""

    def __init__(self, content_type: str, body: AsyncIterator[bytes]) -> None:
        self._body = body
        self._events: deque[_PartBegin | bytes | None] = deque()
        self._headers: list[tuple[bytearray, bytearray]] = []
        self._num_parts = 0
        self._is_over = False
        self._parser = self._make_parser(_boundary(content_type))

    def _make_parser(self, boundary: bytes) -> MultipartParser:
        callbacks: MultipartCallbacks = {
            "on_part_begin": self._headers.clear,
            "on_header_begin": lambda: self._headers.append((bytearray(), bytearray())),
            "on_header_field": lambda data, a, b: self._headers[-1][0].extend(data[a:b]),
            "on_header_value": lambda data, a, b: self._headers[-1][1].extend(data[a:b]),
            "on_headers_finished": self._begin_part,
            "on_part_data": lambda data, a, b: self._events.append(data[a:b]),
            "on_part_end": lambda: self._events.append(_PART_END),
            "on_end": self._end,
        }
        try:
            return MultipartParser(boundary, callbacks)
        except FormParserError as error:
            raise FormInvalid(f"the form cannot be read: {error}") from error

    def _begin_part(self) -> None:
        self._num_parts += 1
        if self._num_parts > MAX_PARTS:
            raise FormInvalid(f"the form has more than {MAX_PARTS} parts")
        self._events.append(_PartBegin(_part_name(self._headers)))

    def _end(self) -> None:
        self._is_over = True

    async def parts(self) -> AsyncIterator[tuple[str, AsyncIterator[bytes]]]:
        """Yield each part's name and its bytes as they come.

        Raises: FormInvalid when the body is not a form, or ends early.
        """
        while await self._more():
            begin = self._events.popleft()
            if isinstance(begin, _PartBegin):
                yield begin.name, self._chunks()
        async for _ in self._body:
            pass

    async def _chunks(self) -> AsyncIterator[bytes]:
        while await self._more():
            item = self._events.popleft()
            if not isinstance(item, bytes):
                return
            yield item

    async def _more(self) -> bool:
        """Make sure that there is an event; False at the end of the form."""
        while not self._events and not self._is_over:
            try:
                self._parser.write(await anext(self._body))
            except StopAsyncIteration:
                raise FormInvalid("the form ends before its last part") from None
            except FormParserError as error:
                raise FormInvalid(f"the form cannot be read: {error}") from error
        return bool(self._events)


def _boundary(content_type: str) -> bytes:
    kind, options = parse_options_header(content_type)
    boundary = options.get(b"boundary")
    if kind != b"multipart/form-data" or not boundary:
        raise UnsupportedMediaType(
            f"the content type {content_type[:80]!r} is not read here; send multipart/form-data "
            "with a boundary (curl -F does)"
        )
    return boundary


def _part_name(headers: list[tuple[bytearray, bytearray]]) -> str:
    """Return the field name; the client's file name is ignored."""
    for field, value in headers:
        if bytes(field).lower() == b"content-disposition":
            _, options = parse_options_header(bytes(value))
            return options.get(b"name", b"").decode(errors="replace")
    raise FormInvalid("a part of the form has no Content-Disposition")


async def read_text(name: str, chunks: AsyncIterator[bytes], max_bytes: int) -> str:
    """Return the text of a small part.

    Raises: TooLarge, InvalidRequest when it is not UTF-8, FormInvalid.
    """
    data = bytearray()
    async for chunk in chunks:
        data += chunk
        if len(data) > max_bytes:
            raise TooLarge(f"{name}: is larger than {max_bytes} bytes", param=name)
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"{name}: is not UTF-8", param=name) from error
