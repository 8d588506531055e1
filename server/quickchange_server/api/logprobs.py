"""Log probabilities in OpenAI's two shapes. JSON has no -inf: the floor stands for it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from quickchange_server.api.choice_reader import TokenEntry
from quickchange_server.api.prompts import PromptIds
from quickchange_server.engine.request import TokenLogprobs
from quickchange_server.tokenizer import Tokenizer

Json = dict[str, Any]
FLOOR = -9999.0


@dataclass(frozen=True, slots=True)
class TokenRow:
    """One line of the completions' shape; a prompt's first token has no log probability."""

    token_id: int
    offset: int
    logprobs: TokenLogprobs | None


def chat_logprobs(entries: Sequence[TokenEntry], tokenizer: Tokenizer, num_top: int) -> Json:
    """Return `{"content": [{token, logprob, bytes, top_logprobs}], "refusal"}`."""
    content = [
        {
            **_chat_token(entry.logprobs.token_id, entry.logprobs.logprob, tokenizer),
            "top_logprobs": [
                _chat_token(token_id, value, tokenizer)
                for token_id, value in entry.logprobs.top[:num_top]
            ],
        }
        for entry in entries
    ]
    return {"content": content, "refusal": None}


def _chat_token(token_id: int, logprob: float, tokenizer: Tokenizer) -> Json:
    token = tokenizer.token_bytes(token_id)
    return {
        "token": token.decode(errors="replace"),
        "logprob": max(logprob, FLOOR),
        "bytes": list(token),
    }


def completion_logprobs(rows: Sequence[TokenRow], tokenizer: Tokenizer, num_top: int) -> Json:
    """Return `{"tokens", "token_logprobs", "top_logprobs", "text_offset"}`."""
    known = [row.logprobs for row in rows]
    return {
        "tokens": [_completion_token(row.token_id, tokenizer) for row in rows],
        "token_logprobs": [each and max(each.logprob, FLOOR) for each in known],
        "top_logprobs": [each and _top(each, tokenizer, num_top) for each in known],
        "text_offset": [row.offset for row in rows],
    }


def _top(logprobs: TokenLogprobs, tokenizer: Tokenizer, num_top: int) -> dict[str, float]:
    """Return the likeliest tokens and the chosen one, by text; of equal texts the likelier."""
    top: dict[str, float] = {}
    for token_id, value in (*logprobs.top[:num_top], (logprobs.token_id, logprobs.logprob)):
        top.setdefault(_completion_token(token_id, tokenizer), max(value, FLOOR))
    return top


def _completion_token(token_id: int, tokenizer: Tokenizer) -> str:
    """Return a token's text; half a character as `bytes:` and the hex of each byte."""
    token = tokenizer.token_bytes(token_id)
    try:
        return token.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token)


def entry_rows(entries: Sequence[TokenEntry], start: int) -> list[TokenRow]:
    """Return generated tokens as rows; their text begins at `start` of the choice's text."""
    return [
        TokenRow(entry.logprobs.token_id, start + entry.offset, entry.logprobs) for entry in entries
    ]


def prompt_rows(
    prompt: PromptIds, logprobs: Sequence[TokenLogprobs | None], tokenizer: Tokenizer
) -> list[TokenRow]:
    """Return an echoed prompt's tokens as rows."""
    detokenizer = tokenizer.detokenizer()
    rows, offset = [], 0
    for token_id, known in zip(prompt.token_ids, logprobs, strict=True):
        rows.append(TokenRow(token_id, offset, known))
        offset += len(detokenizer.push(token_id))
    return rows
