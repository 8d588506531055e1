"""Answers of `POST /generate` and `/generate_stream`, as the clients of TGI and LoRAX read them.

A token's text is its own, the end token's too; the text of an answer ends with the stop string that
ended it. Both are what those servers do, and not what OpenAI's API does.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from quickchange_server.api.answer_format import CollectedChoice, Json
from quickchange_server.api.choice_reader import ChoiceDelta, TokenEntry, shown_reason
from quickchange_server.api.generation_plan import GenerationPlan
from quickchange_server.api.generation_session import Usage
from quickchange_server.api.logprobs import FLOOR
from quickchange_server.detokenizer import Detokenizer
from quickchange_server.engine.request import TokenLogprobs, TokenOutput
from quickchange_server.stop_strings import StopStringFilter
from quickchange_server.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class ShownParts:
    """What an answer shows beside the text.

    Attributes:
        prompt: what stands before the generated text.
        has_details, has_prompt_tokens: how it ended, with its tokens; and those of the prompt.
        num_alternatives: how many other tokens stand beside each.
        seed: with which it can be repeated; None: nothing was drawn.
        is_list: the whole answer is a list of one.
    """

    prompt: str = ""
    has_details: bool = False
    has_prompt_tokens: bool = False
    num_alternatives: int = 0
    seed: int | None = None
    is_list: bool = False


class TokenReader:
    """Decodes one choice; its text goes on to the end of the stop string that ends it."""

    def __init__(self, detokenizer: Detokenizer, stop: StopStringFilter) -> None:
        self._detokenizer = detokenizer
        self._stop = stop

    def read(self, output: TokenOutput) -> ChoiceDelta:
        """Take one output; nothing may follow a delta with a finish_reason."""
        text, num_read = "", 0
        for token_id in output.token_ids:
            num_read += 1
            is_end = token_id == output.stop_token_id and num_read == len(output.token_ids)
            text += "" if is_end else self._pass(self._detokenizer.push(token_id))
            if self._stop.matched is not None:
                break
        if output.finish_reason is not None and self._stop.matched is None:
            text += self._pass(self._detokenizer.flush()) + self._stop.flush()
        entries = tuple(TokenEntry(0, each) for each in (output.logprobs or ())[:num_read])
        reason = shown_reason(output, is_stopped=self._stop.matched is not None)
        return ChoiceDelta(0, text, num_read, reason, entries, output)

    def _pass(self, piece: str) -> str:
        """Return what can be shown now, with the stop string once it is complete."""
        return self._stop.push(piece) + (self._stop.matched or "")


class GenerateFormat:
    """One answer, whole or token by token; made anew for each request."""

    def __init__(
        self, plan: GenerationPlan, tokenizer: Tokenizer, end_ids: frozenset[int], parts: ShownParts
    ) -> None:
        self._plan = plan
        self._tokenizer = tokenizer
        self._end_ids = end_ids
        self._parts = parts
        self._detokenizer = tokenizer.detokenizer()
        self._text = parts.prompt
        self._num_tokens = 0

    def body(self, choices: Sequence[CollectedChoice], usage: Usage) -> Json | list[Json]:
        """Return the whole answer."""
        (choice,) = choices
        answer: Json = {"generated_text": self._text + choice.text}
        if self._parts.has_details:
            answer["details"] = {
                **self._end(choice.finish_reason, choice.entries),
                "generated_tokens": usage.num_generated_tokens,
                "skipped_tokens": 0,
                "prefill": self._prefill(choice.first),
                "tokens": self._tokens(choice.entries, is_end=True),
            }
        return [answer] if self._parts.is_list else answer

    def chunks(self, delta: ChoiceDelta) -> list[Json]:
        """Return an event per token; the last one has the whole text."""
        self._text += delta.text
        self._num_tokens += delta.num_tokens
        is_end = delta.finish_reason is not None
        tokens = self._tokens(delta.entries, is_end)
        events: list[Json] = [
            {"token": token, "generated_text": None, "details": None} for token in tokens
        ]
        if is_end:
            events = events or [{"token": _NO_TOKEN, "generated_text": None, "details": None}]
            events[-1]["generated_text"] = self._text
            if self._parts.has_details:
                counted = {"generated_tokens": self._num_tokens}
                events[-1]["details"] = self._end(delta.finish_reason, delta.entries) | counted
        return events

    def usage_chunk(self, usage: Usage) -> Json:
        """Never asked for: the last event has what is counted."""
        raise AssertionError("this dialect's streams have no usage event")

    def _end(self, reason: str | None, entries: Sequence[TokenEntry]) -> Json:
        is_end_token = bool(entries) and entries[-1].logprobs.token_id in self._end_ids
        stopped = "eos_token" if is_end_token else "stop_sequence"
        return {
            "finish_reason": "length" if reason == "length" else stopped,
            "prompt_tokens": len(self._plan.prompts[0].token_ids),
            "seed": self._parts.seed,
        }

    def _tokens(self, entries: Sequence[TokenEntry], is_end: bool) -> list[Json]:
        tokens = [self._token(entry.logprobs) for entry in entries]
        if is_end and tokens and not tokens[-1]["special"]:
            tokens[-1]["text"] += self._detokenizer.flush()
        return tokens

    def _token(self, known: TokenLogprobs) -> Json:
        is_special = known.token_id in self._tokenizer.special_ids
        text = self._piece(known.token_id)
        token: Json = {
            "id": known.token_id,
            "text": text if is_special else self._detokenizer.push(known.token_id),
            "logprob": max(known.logprob, FLOOR),
            "special": is_special,
            "skipped": False,
        }
        if self._parts.num_alternatives:
            token["alternative_tokens"] = [
                {"id": each, "text": self._piece(each), "logprob": max(value, FLOOR)}
                for each, value in known.top[: self._parts.num_alternatives]
            ]
        return token

    def _prefill(self, first: TokenOutput | None) -> list[Json]:
        known = first.prompt_logprobs if first is not None else None
        if not self._parts.has_prompt_tokens or known is None:
            return []
        return [
            {
                "id": token_id,
                "text": self._piece(token_id),
                "logprob": each and max(each.logprob, FLOOR),
            }
            for token_id, each in zip(self._plan.prompts[0].token_ids, known, strict=True)
        ]

    def _piece(self, token_id: int) -> str:
        return self._tokenizer.token_bytes(token_id).decode(errors="replace")


_NO_TOKEN: Json = {"id": 0, "text": "", "logprob": 0.0, "special": True, "skipped": False}
"""Stands in the last event of an answer whose end brought no token."""
