"""The bodies that requests may have. Bounds are here; what needs the engine is checked later."""

from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictInt,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
)
from pydantic_core import PydanticCustomError
from quickchange_adapters.api_keys import KeyScope
from quickchange_adapters.task import MAX_STOP_STRINGS

MAX_CHOICES = 16
MAX_LOGPROBS = 20
MAX_PROMPTS = 256
MAX_MIX = 4
MAX_BIASES = 1024
MAX_MESSAGES = 4096
INT64 = 1 << 63
UINT64 = 1 << 64


def _one_of(what: str) -> WrapValidator:
    """Say in one sentence what a union accepts, not once per alternative."""

    def validate(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
        try:
            return handler(value)
        except ValidationError as error:
            if any(each["type"] == NOT_TEXT.type for each in error.errors()):
                raise NOT_TEXT from error
            raise PydanticCustomError("not_one_of", "must be {what}", {"what": what}) from error

    return WrapValidator(validate)


NOT_TEXT = PydanticCustomError("not_text", "holds half of a surrogate pair, which is no character")


def _check_text(value: str) -> str:
    """Refuse what JSON can spell and UTF-8 cannot."""
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise NOT_TEXT from error
    return value


def _check_count(value: Any) -> Any:
    """Refuse too many prompts before each of them is looked at."""
    is_many = isinstance(value, list) and value and not isinstance(value[0], int)
    if is_many and len(value) > MAX_PROMPTS:
        raise PydanticCustomError(
            "too_many", "{num} prompts; at most {limit}", {"num": len(value), "limit": MAX_PROMPTS}
        )
    return value


def _check_num_biases(value: Any) -> Any:
    if isinstance(value, dict) and len(value) > MAX_BIASES:
        raise PydanticCustomError(
            "too_many", "{num} tokens; at most {limit}", {"num": len(value), "limit": MAX_BIASES}
        )
    return value


# Without fail_fast, a list of a million wrong items takes minutes: each gets an error of its own.
Text = Annotated[str, AfterValidator(_check_text)]
Texts = Annotated[list[Text], Field(fail_fast=True)]
# Strict: `true` is no number.
TokenIds = Annotated[list[StrictInt], Field(fail_fast=True)]
Prompt = Annotated[
    Text | TokenIds | Texts | Annotated[list[TokenIds], Field(fail_fast=True)],
    _one_of("a string, a list of strings, a list of token ids, or a list of such lists"),
    BeforeValidator(_check_count),
]
Stop = Annotated[Text | Texts, _one_of("a string or a list of strings")]
LogitBias = Annotated[
    dict[str, Annotated[float, Field(ge=-100, le=100)]], BeforeValidator(_check_num_biases)
]

RawPrompt = Annotated[
    bool | None, Field(description="true: the adapter's task.json fills nothing in this request")
]


class OpenModel(BaseModel):
    """A body that keeps fields it does not know, so that they can be named."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)


class StreamOptions(OpenModel):
    """What a stream carries beside the answer."""

    include_usage: bool = False


class MixPart(BaseModel):
    """One adapter of a mix."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    model: str = Field(min_length=1, max_length=256)
    weight: float = Field(1.0, ge=-100, le=100)


class ContentPart(OpenModel):
    """One part of a message's content; only text is served."""

    type: Text
    text: Text | None = None


class ChatMessage(OpenModel):
    """One turn of a conversation."""

    role: Text
    content: Annotated[
        Text | Annotated[list[ContentPart], Field(fail_fast=True)] | None,
        _one_of("a string or a list of parts like {type, text}"),
    ] = None


class GenerationBody(OpenModel):
    """What chat and completions have in common."""

    model: str = Field(min_length=1, max_length=256)
    adapters: Annotated[list[MixPart], Field(fail_fast=True)] | None = Field(
        None, min_length=1, max_length=MAX_MIX
    )
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, lt=INT64)
    min_p: float | None = Field(None, ge=0, le=1)
    seed: int | None = Field(None, ge=-INT64, lt=INT64)
    stop: Stop | None = None
    stop_token_ids: TokenIds | None = Field(None, max_length=MAX_STOP_STRINGS)
    ignore_eos: bool | None = None
    min_tokens: int | None = Field(None, ge=0, lt=INT64)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    repetition_penalty: float | None = Field(None, gt=0, le=10)
    logit_bias: LogitBias | None = None
    cache_salt: str | None = Field(None, min_length=1, max_length=256)
    raw_prompt: RawPrompt = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None


class CompletionBody(GenerationBody):
    """Body of `POST /v1/completions`."""

    prompt: Prompt
    max_tokens: int | None = Field(None, ge=0, lt=INT64)
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    echo: bool | None = None


class ChatBody(GenerationBody):
    """Body of `POST /v1/chat/completions`."""

    messages: Annotated[list[ChatMessage], Field(fail_fast=True)] = Field(
        min_length=1, max_length=MAX_MESSAGES
    )
    max_tokens: int | None = Field(None, ge=1, lt=INT64)
    max_completion_tokens: int | None = Field(None, ge=1, lt=INT64)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)


class GenerateParameters(OpenModel):
    """`parameters` of TGI's and LoRAX's requests, as far as they are served."""

    adapter_id: str | None = Field(None, max_length=256)
    adapter_source: str | None = None
    max_new_tokens: int | None = Field(None, ge=1, lt=INT64)
    do_sample: bool | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    top_k: int | None = Field(None, ge=1, lt=INT64)
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=0, lt=UINT64)
    repetition_penalty: float | None = Field(None, gt=0, le=10)
    stop: Texts | None = None
    ignore_eos_token: bool | None = None
    return_full_text: bool | None = None
    details: bool | None = None
    decoder_input_details: bool | None = None
    return_k_alternatives: int | None = Field(None, ge=1, le=MAX_LOGPROBS)
    raw_prompt: RawPrompt = None


class GenerateBody(OpenModel):
    """Body of `POST /generate` and `/generate_stream`."""

    inputs: Text = Field(min_length=1)
    parameters: GenerateParameters | None = None


class CompatGenerateBody(GenerateBody):
    """Body of `POST /`, which is either."""

    stream: bool | None = None


class LoadLoraBody(OpenModel):
    """Body of vLLM's `POST /v1/load_lora_adapter`."""

    lora_name: Annotated[Text, Field(max_length=256)] | None = None
    lora_path: Annotated[Text, Field(max_length=4096)] | None = None
    load_inplace: bool = False


class UnloadLoraBody(OpenModel):
    """Body of vLLM's `POST /v1/unload_lora_adapter`."""

    lora_name: Annotated[Text, Field(max_length=256)] | None = None
    lora_int_id: int | None = None


class TokenizeBody(OpenModel):
    """Body of `POST /tokenize`: `prompt` or `messages`."""

    model: Text | None = None
    prompt: Text | None = None
    messages: Annotated[list[ChatMessage], Field(fail_fast=True)] | None = Field(
        None, min_length=1, max_length=MAX_MESSAGES
    )
    add_special_tokens: bool | None = None
    add_generation_prompt: bool = True
    raw_prompt: RawPrompt = None
    return_token_strs: bool | None = None


class DetokenizeBody(OpenModel):
    """Body of `POST /detokenize`."""

    model: Text | None = None
    tokens: Annotated[list[Annotated[StrictInt, Field(ge=0)]], Field(fail_fast=True)]


class AliasBody(BaseModel):
    """Body of `PUT /v1/adapters/{name}/aliases/{alias}`."""

    model_config = ConfigDict(extra="forbid")

    version: StrictInt = Field(ge=1, lt=INT64)


def _is_printable(text: str) -> str:
    if not text.isprintable():
        raise ValueError("must be printable text on one line")
    return text


def _has_no_repeat(values: list[Any]) -> list[Any]:
    if len(set(values)) < len(values):
        raise ValueError("must not name anything twice")
    return values


Name = Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9._-]{0,61}[a-z0-9])?\z")]
NoRepeat = AfterValidator(_has_no_repeat)


class KeyBody(BaseModel):
    """Body of `POST /v1/keys`. `adapters` null: not limited to named ones."""

    model_config = ConfigDict(extra="forbid")

    name: Annotated[str, Field(max_length=128), AfterValidator(_is_printable)] = ""
    tenant: Name | None = None
    scopes: Annotated[list[KeyScope], Field(min_length=1, max_length=5), NoRepeat] = ["generate"]
    adapters: Annotated[list[Name], Field(min_length=1, max_length=100), NoRepeat] | None = None


class ActionBody(BaseModel):
    """Body of what is done to one version; may be left out."""

    model_config = ConfigDict(extra="forbid")

    version: StrictInt | None = Field(None, ge=1, lt=INT64)


class LoadBody(ActionBody):
    """Body of load; may be left out."""

    tier: Literal["host", "device"] | None = None
