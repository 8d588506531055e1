"""The base's tokenizer and chat template, as the HTTP edge needs them. Knows nothing of requests.

Calls go to the Rust tokenizer directly: the wrapper around it changes shared settings on each
call, which is not safe from several threads.
"""

import asyncio
import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Self

from quickchange_server.detokenizer import ByteLevelDetokenizer, Detokenizer, WindowDetokenizer
from quickchange_server.errors import InvalidRequest

MAX_INLINE_CHARS = 8_000
"""Longer texts are tokenised in a thread (about 2 ms of event loop at most)."""

_BYTE_PIECE = re.compile(r"^<0x([0-9A-F]{2})>$")


def _byte_of_char() -> dict[str, int]:
    """Return byte-level BPE's alphabet: which character stands for which byte.

    Visible Latin-1 characters stand for themselves, the other 68 bytes, in order, for U+0100 on.
    """
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in visible]
    alphabet = {chr(byte): byte for byte in visible}
    alphabet.update({chr(0x100 + place): byte for place, byte in enumerate(hidden)})
    return alphabet


class Tokenizer:
    """Text to ids and back, and chat messages to text.

    Attributes:
        vocab_size: ids are in [0, vocab_size).
        special_ids: ids that are never shown in an answer.
        is_byte_level: each token is a byte string.
    """

    def __init__(self, pretrained: Any) -> None:
        from tokenizers import decoders

        self._pretrained = pretrained
        self._backend = pretrained.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        self.vocab_size: int = len(pretrained)
        self.is_byte_level = isinstance(self._backend.decoder, decoders.ByteLevel)
        added = self._backend.get_added_tokens_decoder()
        self.special_ids = frozenset(i for i, token in added.items() if token.special)
        self._alphabet = _byte_of_char()
        self._bytes: dict[int, bytes] = {}

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read the tokenizer of a base from its folder; never from the network."""
        from transformers import AutoTokenizer

        return cls(AutoTokenizer.from_pretrained(str(folder), local_files_only=True))

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Return the ids of a text. Gives the interpreter lock back while it works."""
        batch = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        return list(batch[0].ids)

    def encode_many(self, texts: Sequence[str], add_special_tokens: bool = True) -> list[list[int]]:
        """Return the ids of each text; one by one, so that no other core is taken."""
        return [self.encode(text, add_special_tokens) for text in texts]

    async def encode_many_async(
        self, texts: Sequence[str], add_special_tokens: bool = True
    ) -> list[list[int]]:
        """Return the ids of each text; much text does not hold up the event loop."""
        if sum(map(len, texts)) <= MAX_INLINE_CHARS:
            return self.encode_many(texts, add_special_tokens)
        return await asyncio.to_thread(self.encode_many, texts, add_special_tokens)

    async def encode_async(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Return the ids of a text; a long one does not hold up the event loop."""
        (token_ids,) = await self.encode_many_async([text], add_special_tokens)
        return token_ids

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Return the text of ids."""
        text: str = self._backend.decode(token_ids, skip_special_tokens=skip_special_tokens)
        return text

    def detokenizer(self) -> Detokenizer:
        """Return a decoder with memory for one answer."""
        if self.is_byte_level:
            return ByteLevelDetokenizer(self.token_bytes, self.special_ids)
        return WindowDetokenizer(partial(self.decode, skip_special_tokens=False), self.special_ids)

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes that one token stands for; empty for an id without a token."""
        known = self._bytes.get(token_id)
        if known is None:
            known = self._bytes[token_id] = self._find_bytes(token_id)
        return known

    def token_piece(self, token_id: int) -> str:
        """Return the token as the vocabulary spells it."""
        piece: str | None = self._backend.id_to_token(token_id)
        return piece or ""

    def _find_bytes(self, token_id: int) -> bytes:
        piece = self.token_piece(token_id)
        if self.is_byte_level:
            values = [self._alphabet.get(char) for char in piece]
            known = [value for value in values if value is not None]
            return bytes(known) if len(known) == len(values) else piece.encode()
        byte = _BYTE_PIECE.match(piece)
        return bytes([int(byte[1], 16)]) if byte else piece.replace("\u2581", " ").encode()

    @property
    def has_chat_template(self) -> bool:
        """Whether `render_chat` can work."""
        return bool(self._pretrained.chat_template)

    def render_chat(
        self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Return the prompt that the base's own chat template makes of messages.

        Raises: InvalidRequest when there is no template, or it refuses these messages.
        """
        from jinja2 import TemplateError

        if not self.has_chat_template:
            raise InvalidRequest(
                "this base has no chat template; use /v1/completions",
                code="chat_template_missing",
            )
        try:
            text = self._pretrained.apply_chat_template(
                [dict(message) for message in messages],
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
            )
        except TemplateError as error:
            raise InvalidRequest(
                f"the base's chat template refuses these messages: {error}", param="messages"
            ) from error
        return str(text)

    async def encode_chat(
        self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool = True
    ) -> list[int]:
        """Return the ids of rendered messages; the template writes the special tokens itself."""
        text = self.render_chat(messages, add_generation_prompt)
        return await self.encode_async(text, add_special_tokens=False)
