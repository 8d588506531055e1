"""`chat.completion` and `chat.completion.chunk`, as OpenAI's clients read them."""

from collections.abc import Sequence

from quickchange_server.api.answer_format import (
    CollectedChoice,
    Json,
    envelope,
    timing_ms,
    usage_json,
)
from quickchange_server.api.choice_reader import ChoiceDelta, TokenEntry
from quickchange_server.api.generation_plan import AnswerHead
from quickchange_server.api.generation_session import Usage
from quickchange_server.api.logprobs import chat_logprobs
from quickchange_server.tokenizer import Tokenizer


class ChatFormat:
    """Answers of `POST /v1/chat/completions`. `num_top` None: no log probabilities."""

    def __init__(
        self, head: AnswerHead, tokenizer: Tokenizer, num_top: int | None, has_usage: bool
    ) -> None:
        self._head = head
        self._tokenizer = tokenizer
        self._num_top = num_top
        self._has_usage = has_usage
        self._begun: set[int] = set()

    def body(self, choices: Sequence[CollectedChoice], usage: Usage) -> Json:
        """Return the whole answer."""
        return {
            **self._envelope("chat.completion"),
            "choices": [
                {
                    "index": choice.index,
                    "message": {"role": "assistant", "content": choice.text, "refusal": None},
                    "logprobs": self._logprobs(choice.entries),
                    "finish_reason": choice.finish_reason,
                }
                for choice in choices
            ],
            "usage": usage_json(usage),
        }

    def chunks(self, delta: ChoiceDelta) -> list[Json]:
        """Return a chunk for new text, the first with the role, and one for the end."""
        chunks = []
        is_end = delta.finish_reason is not None
        is_first = delta.index not in self._begun
        if delta.text or delta.entries or (is_end and is_first):
            self._begun.add(delta.index)
            role = {"role": "assistant"} if is_first else {}
            chunks.append(
                self._chunk(delta, {**role, "content": delta.text}, self._logprobs(delta.entries))
            )
        if is_end:
            chunks.append(self._chunk(delta, {}, None, delta.finish_reason))
        return chunks

    def usage_chunk(self, usage: Usage) -> Json:
        """Return the chunk with `choices: []` that ends a stream which asked for usage."""
        counted = {**usage_json(usage), **timing_ms(usage)}
        return {**self._envelope("chat.completion.chunk"), "choices": [], "usage": counted}

    def _chunk(
        self, delta: ChoiceDelta, said: Json, logprobs: Json | None, reason: str | None = None
    ) -> Json:
        choice = {
            "index": delta.index,
            "delta": said,
            "logprobs": logprobs,
            "finish_reason": reason,
        }
        usage = {"usage": None} if self._has_usage else {}
        return {**self._envelope("chat.completion.chunk"), "choices": [choice], **usage}

    def _logprobs(self, entries: Sequence[TokenEntry]) -> Json | None:
        if self._num_top is None:
            return None
        return chat_logprobs(entries, self._tokenizer, self._num_top)

    def _envelope(self, kind: str) -> Json:
        return envelope(self._head, kind)
