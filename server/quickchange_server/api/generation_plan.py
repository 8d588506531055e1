"""From a checked body to engine requests: the model, the sampling, one request per choice."""

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace

from quickchange_adapters.task import MAX_STOP_CHARS, MAX_STOP_STRINGS

from quickchange_server.adapter_service import AdapterService
from quickchange_server.adapter_views import ResolvedModel
from quickchange_server.api.prompts import PromptIds
from quickchange_server.api.schemas import GenerationBody
from quickchange_server.engine.request import AdapterRef, GenerationRequest, SamplingParams
from quickchange_server.errors import InvalidRequest, NotFound

FINGERPRINT_HEX = 12
GREEDY_BELOW = 1e-5
"""Temperatures below this are served as 0: dividing by them would leave the number range."""


@dataclass(frozen=True, slots=True)
class ModelChoice:
    """What answers: the base, one adapter, or a mix of up to four with their weights."""

    resolved: tuple[ResolvedModel, ...]
    weights: tuple[float, ...]

    @property
    def adapters(self) -> tuple[AdapterRef, ...]:
        """The adapters, as the engine names them."""
        pairs = zip(self.resolved, self.weights, strict=True)
        return tuple(
            AdapterRef(model.digest, weight) for model, weight in pairs if model.kind == "adapter"
        )

    @property
    def labels(self) -> tuple[str, ...]:
        """What metrics call the adapters, each once."""
        labels = [model.label for model in self.resolved if model.kind == "adapter"]
        return tuple(dict.fromkeys(labels))


@dataclass(frozen=True, slots=True)
class AnswerHead:
    """What every part of an answer repeats."""

    id: str
    created: int
    model: str
    fingerprint: str


@dataclass(frozen=True, slots=True)
class GenerationPlan:
    """An API request, ready to be submitted.

    `requests` has one entry per choice: index = prompt · `num_choices` + choice.
    `is_prompt_only`: the prompt is scored and echoed, and nothing generated is shown.
    """

    head: AnswerHead
    model: ModelChoice
    prompts: tuple[PromptIds, ...]
    requests: tuple[GenerationRequest, ...]
    num_choices: int
    stop: tuple[str, ...] = ()
    echo: bool = False
    is_prompt_only: bool = False

    @property
    def tenant(self) -> str:
        """Who asks."""
        return self.requests[0].tenant


def resolve_model(body: GenerationBody, service: AdapterService, tenant: str) -> ModelChoice:
    """Say what `model` and `adapters` mean now.

    Raises: NotFound, InvalidRequest when a mix is asked of an adapter.
    """
    model = service.resolve(body.model, tenant=tenant)
    if not body.adapters:
        return ModelChoice((model,), (1.0,))
    if model.kind != "base":
        raise InvalidRequest(
            f"model: {body.model!r} is an adapter; with `adapters` it must be the base",
            param="model",
        )
    parts = tuple(
        _resolve_part(part.model, f"adapters[{place}].model", service, tenant)
        for place, part in enumerate(body.adapters)
    )
    return ModelChoice(parts, tuple(part.weight for part in body.adapters))


def _resolve_part(name: str, where: str, service: AdapterService, tenant: str) -> ResolvedModel:
    """Say what an adapter of a mix is. Raises: NotFound, InvalidRequest for the base."""
    try:
        part = service.resolve(name, tenant=tenant)
    except NotFound as error:
        raise NotFound(str(error), code=error.code, param=where) from error
    if part.kind == "base":
        raise InvalidRequest(f"{where}: {part.served_name!r} is the base", param=where)
    return part


def answer_head(prefix: str, model_name: str, base_digest: str, model: ModelChoice) -> AnswerHead:
    """Return a fresh id, the time, and the digests' prefixes as fingerprint."""
    digests = [base_digest, *(ref.digest for ref in model.adapters)]
    fingerprint = "fp_" + "_".join(digest[:FINGERPRINT_HEX] for digest in digests)
    return AnswerHead(f"{prefix}-{uuid.uuid4().hex}", int(time.time()), model_name, fingerprint)


def sampling_params(body: GenerationBody, logprobs: int | None, vocab_size: int) -> SamplingParams:
    """Return a body's sampling, with OpenAI's defaults.

    Raises: InvalidRequest for a token id that is none.
    """
    temperature = 1.0 if body.temperature is None else body.temperature
    return SamplingParams(
        temperature=0.0 if temperature < GREEDY_BELOW else temperature,
        top_k=max(body.top_k or 0, 0),
        top_p=1.0 if body.top_p is None else body.top_p,
        min_p=body.min_p or 0.0,
        seed=body.seed,
        repetition_penalty=body.repetition_penalty or 1.0,
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        logit_bias=_logit_bias(body, vocab_size),
        logprobs=logprobs,
    )


def _logit_bias(body: GenerationBody, vocab_size: int) -> tuple[tuple[int, float], ...]:
    pairs = []
    for key, value in (body.logit_bias or {}).items():
        is_id = key.isascii() and key.isdigit() and len(key) < 10
        if not is_id or int(key) >= vocab_size:
            raise InvalidRequest(
                f"logit_bias: {key[:20]!r} is not a token id; they are below {vocab_size}",
                param="logit_bias",
            )
        pairs.append((int(key), value))
    return tuple(pairs)


def end_ids(body: GenerationBody, vocab_size: int) -> frozenset[int]:
    """Return the token ids that end an answer beside the model's own.

    Raises: InvalidRequest for one that is none.
    """
    for token_id in body.stop_token_ids or ():
        if not 0 <= token_id < vocab_size:
            raise InvalidRequest(
                f"stop_token_ids: {token_id} is not a token id; they are below {vocab_size}",
                param="stop_token_ids",
                code="invalid_token_id",
            )
    return frozenset(body.stop_token_ids or ())


def stop_strings(stop: str | list[str] | None) -> tuple[str, ...]:
    """Return the stop strings of a body; empty ones stop nothing.

    Raises: InvalidRequest naming the limit.
    """
    stops = [stop] if isinstance(stop, str) else list(stop or ())
    if len(stops) > MAX_STOP_STRINGS:
        raise InvalidRequest(
            f"stop: {len(stops)} strings; at most {MAX_STOP_STRINGS}", param="stop"
        )
    if any(len(each) > MAX_STOP_CHARS for each in stops):
        raise InvalidRequest(
            f"stop: a string is longer than {MAX_STOP_CHARS} characters", param="stop"
        )
    return tuple(each for each in stops if each)


def engine_requests(
    template: GenerationRequest, prompts: Sequence[PromptIds], max_tokens: Sequence[int], n: int
) -> tuple[GenerationRequest, ...]:
    """Return one request per prompt and choice; `template` holds what they share.

    Raises: InvalidRequest when `min_tokens` cannot be reached.
    """
    if template.min_tokens > min(max_tokens):
        raise InvalidRequest(
            f"min_tokens: {template.min_tokens} is more than the {min(max_tokens)} that may be "
            "generated",
            param="min_tokens",
        )
    return tuple(
        replace(
            template,
            request_id=f"{template.request_id}-{number * n + choice}",
            prompt_ids=prompt.token_ids,
            max_tokens=limit,
            choice=choice,
        )
        for number, (prompt, limit) in enumerate(zip(prompts, max_tokens, strict=True))
        for choice in range(n)
    )
