"""What becomes of request fields that the schemas do not list.

A known field at a value that changes nothing passes; at another value it is refused by name. An
unknown field is named in a response header, or refused when the server is strict.
"""

import re
from collections.abc import Mapping
from typing import Any

from quickchange_server.errors import InvalidRequest

Json = Mapping[str, Any]

BOOKKEEPING = frozenset(
    {
        "user",
        "metadata",
        "store",
        "service_tier",
        "parallel_tool_calls",
        "prompt_cache_key",
        "prompt_cache_retention",
        "safety_identifier",
        "request_id",
    }
)
"""Fields whose every value leaves the answer as it is."""

NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    "reasoning_effort": (),
    "verbosity": ("medium",),
    "suffix": ("",),
    "use_beam_search": (False,),
    "length_penalty": (1.0,),
    "typical_p": (1.0,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "include_stop_str_in_output": (False,),
    "truncate_prompt_tokens": (),
    "prompt_logprobs": (),
    "prompt_embeds": (),
    "allowed_token_ids": (),
    "bad_words": ([],),
    "structured_outputs": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "logits_processors": ([],),
    "documents": ([],),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
}
"""Known fields that are not served, and their values, beside null, that ask for nothing."""

NEUTRAL_IN_CHAT: Mapping[str, tuple[Any, ...]] = {
    **NEUTRAL,
    "echo": (False,),
    "add_special_tokens": (False,),
}
NEUTRAL_IN_COMPLETIONS: Mapping[str, tuple[Any, ...]] = {**NEUTRAL, "add_special_tokens": (True,)}

NEUTRAL_IN_GENERATE: Mapping[str, tuple[Any, ...]] = {
    "merged_adapters": (),
    "adapter_parameters": (),
    "typical_p": (1.0,),
    "truncate": (),
    "watermark": (False,),
    "frequency_penalty": (0,),
    "top_n_tokens": (0,),
    "response_format": ({"type": "text"},),
    "grammar": (),
    "schema": (),
    "apply_chat_template": (False,),
}
"""The same for `parameters` of `POST /generate`."""

NEUTRAL_IN_LORA_PATH: Mapping[str, tuple[Any, ...]] = {"is_3d_lora_weight": (False,)}
"""The same for `POST /v1/load_lora_adapter`."""

IGNORED_HEADER = "x-quickchange-ignored-fields"
MAX_NAMED_FIELDS = 20
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")


def check_extra_fields(
    extra: Json, neutral: Mapping[str, tuple[Any, ...]], num_choices: int, is_strict: bool
) -> dict[str, str]:
    """Return the response header that names unknown fields; empty when there are none.

    Raises: InvalidRequest for a known field that we do not do, or an unknown one when strict.
    """
    unknown = []
    for name, value in extra.items():
        if value is None or name in BOOKKEEPING:
            continue
        if name == "best_of":
            _check_neutral(name, value, tuple(dict.fromkeys((1, num_choices))))
        elif name in neutral:
            _check_neutral(name, value, neutral[name])
        else:
            unknown.append(_plain(name))
    if unknown and is_strict:
        raise InvalidRequest(
            f"{', '.join(unknown[:MAX_NAMED_FIELDS])}: not known here (--strict-fields)",
            param=unknown[0],
            code="unknown_field",
        )
    return {IGNORED_HEADER: ",".join(unknown[:MAX_NAMED_FIELDS])} if unknown else {}


def _check_neutral(name: str, value: Any, neutral: tuple[Any, ...]) -> None:
    if not any(value == plain for plain in neutral):
        accepted = " or ".join(["null", *map(repr, neutral)])
        raise InvalidRequest(
            f"{name}: is not supported; leave it out (accepted without effect: {accepted})",
            param=name,
            code="unsupported_field",
        )


def _plain(name: str) -> str:
    """Keep what is fit for a header; other names become `?`."""
    return name if _PLAIN_NAME.fullmatch(name) else "?"
