"""One choice: from the engine's tokens to the text that may be shown. Knows no HTTP shapes."""

from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Literal, Protocol

from quickchange_server.detokenizer import Detokenizer
from quickchange_server.engine.interface import GenerationEngine
from quickchange_server.engine.request import GenerationRequest, TokenLogprobs, TokenOutput
from quickchange_server.errors import (
    Conflict,
    GenerationFailed,
    QuickchangeError,
    Unavailable,
)
from quickchange_server.stop_strings import StopStringFilter

ShownFinish = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class TokenEntry:
    """A shown token's log probabilities, and where its text begins in the answer."""

    offset: int
    logprobs: TokenLogprobs


@dataclass(frozen=True, slots=True)
class ChoiceDelta:
    """What one engine output adds to a choice.

    `text` may be empty: half a character, or the beginning of a stop string, waits. `num_tokens`
    counts generated tokens, shown or not. `output` is the engine's, for times and the prompt.
    """

    index: int
    text: str
    num_tokens: int
    finish_reason: ShownFinish | None
    entries: tuple[TokenEntry, ...]
    output: TokenOutput


class OutputReader(Protocol):
    """Makes deltas of a choice's outputs, in order."""

    def read(self, output: TokenOutput) -> ChoiceDelta:
        """Take one output; nothing may follow a delta with a finish_reason."""


class PromptReader:
    """For a request that only scores its prompt: what is generated is not shown or counted."""

    def __init__(self, index: int) -> None:
        self._index = index

    def read(self, output: TokenOutput) -> ChoiceDelta:
        """End the choice at once, with the prompt's log probabilities in `output`."""
        return ChoiceDelta(self._index, "", 0, "length", (), output)


class ChoiceReader:
    """Decode, look for stop strings, and keep log probabilities in step with the shown text."""

    def __init__(
        self, index: int, detokenizer: Detokenizer, stop: StopStringFilter, min_tokens: int = 0
    ) -> None:
        self._index = index
        self._detokenizer = detokenizer
        self._stop = stop
        self._min_tokens = min_tokens
        self._num_tokens = 0
        self._num_decoded_chars = 0
        self._num_shown_chars = 0
        self._waiting: deque[TokenEntry] = deque()

    def read(self, output: TokenOutput) -> ChoiceDelta:
        """Take one output; nothing may follow a delta with a finish_reason."""
        parts = [self._show(place, output) for place in range(len(output.token_ids))]
        is_over = output.finish_reason is not None
        if is_over:
            parts += [self._pass(self._detokenizer.flush()), self._stop.flush()]
        text = "".join(parts)
        self._num_shown_chars += len(text)
        is_stopped = self._stop.matched is not None
        entries = self._release(everything=is_over and not is_stopped)
        reason = shown_reason(output, is_stopped)
        return ChoiceDelta(self._index, text, len(output.token_ids), reason, entries, output)

    def _show(self, place: int, output: TokenOutput) -> str:
        """Return the text that one token makes visible; the id that ends the answer has none."""
        self._num_tokens += 1
        token_id = output.token_ids[place]
        is_last = place + 1 == len(output.token_ids)
        if self._stop.matched is not None or (is_last and token_id == output.stop_token_id):
            return ""
        if output.logprobs is not None:
            self._waiting.append(TokenEntry(self._num_decoded_chars, output.logprobs[place]))
        return self._pass(self._detokenizer.push(token_id))

    def _pass(self, text: str) -> str:
        self._num_decoded_chars += len(text)
        if self._num_tokens < self._min_tokens:
            return text
        return self._stop.push(text)

    def _release(self, everything: bool) -> tuple[TokenEntry, ...]:
        """Return the entries whose text is out; all of them at an end without stop string."""
        released = []
        while self._waiting and (everything or self._waiting[0].offset < self._num_shown_chars):
            released.append(self._waiting.popleft())
        return tuple(released)


def shown_reason(output: TokenOutput, is_stopped: bool) -> ShownFinish | None:
    """Return why a choice ended, if it did; `is_stopped`: a stop string was found."""
    if is_stopped:
        return "stop"
    return output.finish_reason if output.finish_reason in ("stop", "length") else None


async def read_choice(
    engine: GenerationEngine, request: GenerationRequest, reader: OutputReader
) -> AsyncIterator[ChoiceDelta]:
    """Yield a choice's deltas; a stop string, or closing this early, aborts the engine request.

    Raises: QueueFull, Unavailable, GenerationFailed.
    """
    outputs = engine.generate(request)
    try:
        async for output in outputs:
            _raise_for_failure(output)
            delta = reader.read(output)
            yield delta
            if delta.finish_reason is not None:
                return
    finally:
        close = getattr(outputs, "aclose", None)
        if close is not None:
            await close()


_FAILURES: dict[str, type[QuickchangeError]] = {
    "draining": Unavailable,
    "adapter_not_loaded": Unavailable,
    "out_of_memory": Unavailable,
    "adapter_quarantined": Conflict,
}
"""Engine failures that are not the server's own: others are 500."""


def _raise_for_failure(output: TokenOutput) -> None:
    if output.finish_reason == "abort":
        raise Unavailable("the engine stopped before the answer was complete; try again")
    if output.finish_reason == "error":
        failure = output.failure
        if failure is None:
            raise GenerationFailed("the engine gave up on this request")
        kind = _FAILURES.get(failure.code, GenerationFailed)
        raise kind(failure.message, code=failure.code)
