"""From what a body says to token ids. Knows nothing of sampling."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from quickchange_adapters.task import Task

from quickchange_server.api.schemas import ChatMessage, Prompt
from quickchange_server.errors import ContextLengthExceeded, InvalidRequest
from quickchange_server.tokenizer import Tokenizer

DEFAULT_COMPLETION_TOKENS = 16
_TEMPLATE_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
}


@dataclass(frozen=True, slots=True)
class PromptIds:
    """One prompt. `text` is what was tokenised; None when token ids were sent."""

    token_ids: tuple[int, ...]
    text: str | None = None


async def read_prompts(
    prompt: Prompt, tokenizer: Tokenizer, vocab_size: int, task: Task
) -> tuple[PromptIds, ...]:
    """Return the prompts of a completion, in the task's form and tokenised.

    Token ids that were sent stay as they are; they must be below `vocab_size`.

    Raises: InvalidRequest.
    """
    texts = [prompt] if isinstance(prompt, str) else [p for p in prompt if isinstance(p, str)]
    if texts:
        texts = [task.render_prompt(text) for text in texts]
        encoded = await tokenizer.encode_many_async(texts)
        return tuple(PromptIds(_some(i), text) for i, text in zip(encoded, texts, strict=True))
    lists = [p for p in prompt if isinstance(p, list)]
    if not lists:
        lists = [[p for p in prompt if isinstance(p, int)]]
    return tuple(PromptIds(_known(_some(each), vocab_size)) for each in lists)


def _known(token_ids: tuple[int, ...], vocab_size: int) -> tuple[int, ...]:
    for token_id in (min(token_ids), max(token_ids)):
        if not 0 <= token_id < vocab_size:
            raise InvalidRequest(
                f"prompt: {token_id} is not a token id; they are below {vocab_size}",
                param="prompt",
            )
    return token_ids


def _some(token_ids: Sequence[int], field: str = "prompt") -> tuple[int, ...]:
    if not token_ids:
        raise InvalidRequest(f"{field}: is empty; send at least 1 token", param=field)
    return tuple(token_ids)


async def read_chat(messages: Sequence[ChatMessage], tokenizer: Tokenizer, task: Task) -> PromptIds:
    """Return the prompt that the base's chat template makes of a conversation in the task's form.

    Raises: InvalidRequest.
    """
    token_ids = await tokenizer.encode_chat(task.render_chat(template_messages(messages)))
    return PromptIds(_some(token_ids, "messages"))


def template_messages(messages: Sequence[ChatMessage]) -> list[Mapping[str, str]]:
    """Return messages as a chat template reads them: a role it knows, and plain text.

    Raises: InvalidRequest naming the place.
    """
    return [_template_message(f"messages[{i}]", each) for i, each in enumerate(messages)]


def _template_message(place: str, message: ChatMessage) -> Mapping[str, str]:
    role = _TEMPLATE_ROLES.get(message.role)
    if role is None:
        raise InvalidRequest(
            f"{place}.role: {message.role[:40]!r} is not served; use {', '.join(_TEMPLATE_ROLES)}",
            param=f"{place}.role",
        )
    for name in ("tool_calls", "function_call"):
        if (message.model_extra or {}).get(name):
            raise InvalidRequest(
                f"{place}.{name}: is not supported", param=name, code="unsupported_field"
            )
    return {"role": role, "content": _content_text(place, message)}


def _content_text(place: str, message: ChatMessage) -> str:
    if isinstance(message.content, str):
        return message.content
    if message.content is None:
        if message.role == "assistant":
            return ""
        raise InvalidRequest(f"{place}.content: is missing", param=f"{place}.content")
    texts = []
    for number, part in enumerate(message.content):
        if part.type != "text" or part.text is None:
            where = f"{place}.content[{number}]"
            raise InvalidRequest(
                f"{where}: a part of type {part.type[:40]!r} is not served; "
                'send {"type": "text", "text": …}',
                param=where,
            )
        texts.append(part.text)
    return "\n".join(texts)


def fit_max_tokens(
    num_prompt_tokens: int,
    wanted: int | None,
    default: int | None,
    max_model_len: int,
    field: str,
) -> int:
    """Return how many tokens may be generated: `wanted`, or `default` as far as there is room.

    A default of None fills the context.

    Raises: ContextLengthExceeded, which names the `field` that holds the prompt.
    """
    room = max_model_len - num_prompt_tokens
    if room < 1:
        raise ContextLengthExceeded(
            f"the prompt has {num_prompt_tokens} tokens and the context holds {max_model_len}, "
            "of which one must be left for the answer; shorten the prompt",
            param=field,
        )
    if wanted is None:
        return room if default is None else min(default, room)
    if wanted > room:
        raise ContextLengthExceeded(
            f"{num_prompt_tokens} prompt tokens and max_tokens {wanted} are more than the "
            f"context's {max_model_len}; shorten the prompt or ask for at most {room}",
            param=field,
        )
    return wanted
