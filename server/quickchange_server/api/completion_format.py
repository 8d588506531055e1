"""`text_completion`, whole and in chunks, as OpenAI's clients read it; with `echo`."""

from collections.abc import Sequence

from quickchange_server.api.answer_format import (
    CollectedChoice,
    Json,
    envelope,
    timing_ms,
    usage_json,
)
from quickchange_server.api.choice_reader import ChoiceDelta, TokenEntry
from quickchange_server.api.generation_plan import GenerationPlan
from quickchange_server.api.generation_session import Usage
from quickchange_server.api.logprobs import completion_logprobs, entry_rows, prompt_rows
from quickchange_server.engine.request import TokenOutput
from quickchange_server.tokenizer import Tokenizer

KIND = "text_completion"


class CompletionFormat:
    """Answers of `POST /v1/completions`. `num_top` None: no log probabilities."""

    def __init__(
        self, plan: GenerationPlan, tokenizer: Tokenizer, num_top: int | None, has_usage: bool
    ) -> None:
        self._plan = plan
        self._tokenizer = tokenizer
        self._num_top = num_top
        self._has_usage = has_usage
        self._begun: set[int] = set()
        self._echoes = [self._echo(number) for number in range(len(plan.prompts))]

    def _echo(self, number: int) -> str:
        if not self._plan.echo:
            return ""
        prompt = self._plan.prompts[number]
        return self._tokenizer.decode(prompt.token_ids) if prompt.text is None else prompt.text

    def body(self, choices: Sequence[CollectedChoice], usage: Usage) -> Json:
        """Return the whole answer."""
        return {
            **envelope(self._plan.head, KIND),
            "choices": [
                {
                    "index": choice.index,
                    "text": self._echo_of(choice.index) + choice.text,
                    "logprobs": self._logprobs(choice.index, choice.entries, choice.first),
                    "finish_reason": choice.finish_reason,
                }
                for choice in choices
            ],
            "usage": usage_json(usage),
        }

    def chunks(self, delta: ChoiceDelta) -> list[Json]:
        """Return a chunk for new text, the first with the echoed prompt, and one for the end."""
        chunks = []
        is_first = delta.index not in self._begun
        self._begun.add(delta.index)
        text = (self._echo_of(delta.index) if is_first else "") + delta.text
        if text or delta.entries:
            first = delta.output if is_first else None
            logprobs = self._logprobs(delta.index, delta.entries, first)
            chunks.append(self._chunk(delta, text, logprobs))
        if delta.finish_reason is not None:
            chunks.append(self._chunk(delta, "", None, delta.finish_reason))
        return chunks

    def usage_chunk(self, usage: Usage) -> Json:
        """Return the chunk with `choices: []` that ends a stream which asked for usage."""
        counted = {**usage_json(usage), **timing_ms(usage)}
        return {**envelope(self._plan.head, KIND), "choices": [], "usage": counted}

    def _chunk(
        self, delta: ChoiceDelta, text: str, logprobs: Json | None, reason: str | None = None
    ) -> Json:
        choice = {
            "index": delta.index,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": reason,
        }
        usage = {"usage": None} if self._has_usage else {}
        return {**envelope(self._plan.head, KIND), "choices": [choice], **usage}

    def _echo_of(self, index: int) -> str:
        return self._echoes[index // self._plan.num_choices]

    def _logprobs(
        self, index: int, entries: Sequence[TokenEntry], first: TokenOutput | None
    ) -> Json | None:
        """Return the rows of `entries`; those of an echoed prompt go before the first ones."""
        if self._num_top is None:
            return None
        rows = entry_rows(entries, len(self._echo_of(index)))
        if self._plan.echo and first is not None and first.prompt_logprobs is not None:
            prompt = self._plan.prompts[index // self._plan.num_choices]
            rows = prompt_rows(prompt, first.prompt_logprobs, self._tokenizer) + rows
        return completion_logprobs(rows, self._tokenizer, self._num_top)
