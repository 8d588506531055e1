"""Generation: what may be asked, and what comes back. OpenAI's shapes, with the server's additions.

An option that is None, or left out, is not sent: the task's or the server's default holds.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Required, TypedDict

from pydantic import Field

from quickchange_client.answer import Answer, Part

Message = Mapping[str, Any]
Prompt = str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]]


class MixPart(TypedDict, total=False):
    """One adapter of a mix, and its weight (1.0 when left out)."""

    model: Required[str]
    weight: float


class GenerationOptions(TypedDict, total=False):
    """What chat and plain completions share.

    `adapters` mixes up to four adapters; `model` must then be a base. `raw_prompt` leaves the
    adapter's task.json aside: its prompt form and its defaults. `extra_body` adds fields that have
    no name here.
    """

    max_tokens: int | None
    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    seed: int | None
    n: int | None
    stop: str | Sequence[str] | None
    stop_token_ids: Sequence[int] | None
    min_tokens: int | None
    ignore_eos: bool | None
    presence_penalty: float | None
    frequency_penalty: float | None
    repetition_penalty: float | None
    logit_bias: Mapping[str, float] | None
    cache_salt: str | None
    adapters: Sequence[MixPart] | None
    raw_prompt: bool | None
    extra_body: Mapping[str, Any] | None


class ChatOptions(GenerationOptions, total=False):
    """Options of a chat completion."""

    logprobs: bool | None
    top_logprobs: int | None


class CompletionOptions(GenerationOptions, total=False):
    """Options of a plain completion."""

    logprobs: int | None
    echo: bool | None


class PromptTokensDetails(Part):
    """Of the prompt's tokens, how many needed no computing."""

    cached_tokens: int = 0


class Usage(Part):
    """Tokens of a request; in a stream also its times, which come as headers otherwise."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    total_tokens: int = 0
    prompt_tokens_details: PromptTokensDetails | None = None
    queue_ms: float | None = None
    ttft_ms: float | None = None


class ChatMessage(Part):
    """What the model said."""

    role: str = "assistant"
    content: str | None = None


class ChatChoice(Part):
    """One of the `n` answers of a chat completion."""

    index: int = 0
    message: ChatMessage
    finish_reason: str | None = None
    logprobs: Any = None


class ChatCompletion(Answer):
    """Answer of `chat`."""

    id: str
    object: str = "chat.completion"
    created: int = 0
    model: str
    choices: list[ChatChoice]
    usage: Usage | None = None
    system_fingerprint: str | None = None

    @property
    def text(self) -> str:
        """Content of the first choice."""
        return (self.choices[0].message.content or "") if self.choices else ""


class ChatDelta(Part):
    """What one chunk adds to a message."""

    role: str | None = None
    content: str | None = None


class ChatChunkChoice(Part):
    """One choice's share of a chunk."""

    index: int = 0
    delta: ChatDelta = Field(default_factory=ChatDelta)
    finish_reason: str | None = None
    logprobs: Any = None


class ChatChunk(Answer):
    """One event of `stream_chat`."""

    id: str
    object: str = "chat.completion.chunk"
    created: int = 0
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None
    system_fingerprint: str | None = None

    @property
    def text(self) -> str:
        """What this chunk adds to the first choice; empty when it adds nothing."""
        return "".join(c.delta.content or "" for c in self.choices if c.index == 0)


class CompletionChoice(Part):
    """One choice of a completion, or its share of a chunk."""

    index: int = 0
    text: str = ""
    finish_reason: str | None = None
    logprobs: Any = None


class Completion(Answer):
    """Answer of `complete`, and one event of `stream_complete`."""

    id: str
    object: str = "text_completion"
    created: int = 0
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None
    system_fingerprint: str | None = None

    @property
    def text(self) -> str:
        """Text of the first choice; of a chunk, what it adds."""
        return "".join(choice.text for choice in self.choices if choice.index == 0)


def chat_body(
    model: str, messages: str | Sequence[Message], options: ChatOptions
) -> dict[str, Any]:
    """Return the body of a chat completion; a bare string is one user message."""
    turns = [{"role": "user", "content": messages}] if isinstance(messages, str) else messages
    return {"model": model, "messages": [dict(turn) for turn in turns], **_given(options)}


def completion_body(model: str, prompt: Prompt, options: CompletionOptions) -> dict[str, Any]:
    """Return the body of a plain completion."""
    return {"model": model, "prompt": prompt, **_given(options)}


def _given(options: GenerationOptions) -> dict[str, Any]:
    fields = {name: value for name, value in options.items() if value is not None}
    extra = fields.pop("extra_body", {})
    return {**fields, **dict(extra)}  # type: ignore[call-overload]
