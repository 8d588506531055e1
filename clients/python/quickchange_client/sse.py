"""Server-sent events, read from bytes as they arrive. Knows no JSON and no HTTP.

Works on bytes, because only CR, LF and CRLF end a line: text helpers that also split at U+2028 or
U+0085 tear JSON strings apart.

Source: WHATWG HTML, section 9.2.6 (interpreting an event stream).
"""

from collections.abc import Iterator

BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class SseDecoder:
    """Turn blocks of bytes, cut anywhere, into the data of each event.

    Comments, event names, ids and retry times are skipped; an unfinished event at the end of the
    bytes is dropped, as the standard asks.
    """

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[str] = []
        self._is_at_start = True

    def feed(self, block: bytes) -> Iterator[str]:
        """Yield the data of every event that this block completes."""
        for line in self._lines(block):
            if line:
                self._take_field(line)
            elif self._data:
                yield "\n".join(self._data)
                self._data = []

    def _lines(self, block: bytes) -> list[bytes]:
        text = self._without_mark(self._rest + block)
        is_cut_in_crlf = text.endswith(b"\r")
        held = text[-1:] if is_cut_in_crlf else b""
        text = text[: len(text) - len(held)].replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        *lines, rest = text.split(b"\n")
        self._rest = rest + held
        return lines

    def _without_mark(self, text: bytes) -> bytes:
        if not self._is_at_start or (len(text) < 3 and BYTE_ORDER_MARK.startswith(text)):
            return text
        self._is_at_start = False
        return text.removeprefix(BYTE_ORDER_MARK)

    def _take_field(self, line: bytes) -> None:
        name, _, value = line.partition(b":")
        if name == b"data":
            self._data.append(value.removeprefix(b" ").decode("utf-8", "replace"))
