"""Turn token ids into text one at a time. Knows nothing of stop strings, requests or HTTP.

Both classes promise: no part ends inside a UTF-8 character, and the pushed parts and the flush,
joined, equal one decode of all ids. One exception: where pieces of a byte-fallback vocabulary form
invalid UTF-8, one decode turns the whole run into U+FFFD, also characters that were out already.
"""

import codecs
from collections.abc import Callable, Collection, Sequence
from typing import Protocol

REPLACEMENT = "\ufffd"


class Detokenizer(Protocol):
    """Decoder with memory, for one answer."""

    def push(self, token_id: int) -> str:
        """Return the text that this token completes; may be empty."""

    def flush(self) -> str:
        """Return what was held back; an unfinished character becomes U+FFFD."""


class ByteLevelDetokenizer:
    """For tokenizers whose tokens are byte strings (GPT-2, Llama 3, Qwen): constant time a token.

    A UTF-8 decoder with memory does what one decode of all bytes would do.
    """

    def __init__(self, token_bytes: Callable[[int], bytes], hidden_ids: Collection[int]) -> None:
        self._token_bytes = token_bytes
        self._hidden_ids = hidden_ids
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """Return the text that this token completes; may be empty."""
        if token_id in self._hidden_ids:
            return ""
        return self._decoder.decode(self._token_bytes(token_id))

    def flush(self) -> str:
        """Return what was held back; an unfinished character becomes U+FFFD."""
        return self._decoder.decode(b"", final=True)


class WindowDetokenizer:
    """For every other tokenizer: decode a short window twice and take the difference.

    The window starts with tokens whose text is out already, because decoders look at their
    neighbours (a leading space is dropped only at the very start). Text that ends in U+FFFD may be
    half a character and waits.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], hidden_ids: Collection[int]) -> None:
        self._decode = decode
        self._hidden_ids = hidden_ids
        self._known: list[int] = []
        self._pending: list[int] = []

    def push(self, token_id: int) -> str:
        """Return the text that this token completes; may be empty."""
        if token_id in self._hidden_ids:
            return ""
        self._pending.append(token_id)
        text = self._new_text()
        if not text or text.endswith(REPLACEMENT):
            return ""
        self._known, self._pending = self._pending, []
        return text

    def flush(self) -> str:
        """Return what was held back; an unfinished character becomes U+FFFD."""
        text = self._new_text()
        self._known, self._pending = self._known + self._pending, []
        return text

    def _new_text(self) -> str:
        known = self._decode(self._known)
        return self._decode(self._known + self._pending)[len(known) :]
