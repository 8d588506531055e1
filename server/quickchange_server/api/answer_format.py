"""What chat and completions answers have in common: collected choices, usage, the format's seam."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from quickchange_server.api.choice_reader import ChoiceDelta, ShownFinish, TokenEntry
from quickchange_server.api.generation_plan import AnswerHead
from quickchange_server.api.generation_session import Usage
from quickchange_server.engine.request import TokenOutput

Json = dict[str, Any]


@dataclass(slots=True)
class CollectedChoice:
    """A whole choice, from all its deltas."""

    index: int
    text: str = ""
    finish_reason: ShownFinish | None = None
    entries: list[TokenEntry] = field(default_factory=list)
    first: TokenOutput | None = None

    def add(self, delta: ChoiceDelta) -> None:
        """Append one delta."""
        self.text += delta.text
        self.entries += delta.entries
        self.finish_reason = delta.finish_reason
        self.first = self.first or delta.output


class AnswerFormat(Protocol):
    """The JSON of one answer, whole or in chunks; made anew for each request."""

    def body(self, choices: Sequence[CollectedChoice], usage: Usage) -> Json | list[Json]:
        """Return the whole answer."""

    def chunks(self, delta: ChoiceDelta) -> list[Json]:
        """Return the chunks of a stream that a delta makes; often one, sometimes none."""

    def usage_chunk(self, usage: Usage) -> Json:
        """Return the chunk with `choices: []` that ends a stream which asked for usage."""


def usage_json(usage: Usage) -> Json:
    """Return OpenAI's usage object."""
    return {
        "prompt_tokens": usage.num_prompt_tokens,
        "completion_tokens": usage.num_generated_tokens,
        "total_tokens": usage.num_prompt_tokens + usage.num_generated_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.num_cached_tokens},
    }


def timing_ms(usage: Usage) -> dict[str, float]:
    """Return queue and first-token times, in milliseconds, as far as they are known."""
    times = {"queue_ms": usage.queue_s, "ttft_ms": usage.ttft_s}
    return {name: round(value * 1000, 3) for name, value in times.items() if value is not None}


def envelope(head: AnswerHead, kind: str) -> Json:
    """Return the fields that every part of an answer repeats."""
    return {
        "id": head.id,
        "object": kind,
        "created": head.created,
        "model": head.model,
        "system_fingerprint": head.fingerprint,
    }
