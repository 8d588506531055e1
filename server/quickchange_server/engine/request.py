"""What crosses the engine's seam: plain, picklable data and nothing else."""

from dataclasses import dataclass, field
from typing import Literal

from quickchange_adapters.names import DEFAULT_TENANT

FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass(frozen=True, slots=True, order=True)
class AdapterRef:
    """One adapter of a request: the version's digest, and its weight in the mix."""

    digest: str
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is chosen. Defaults are OpenAI's, then neutral values.

    `temperature` 0 is greedy; `top_k` 0 and `top_p` 1 switch those filters off. `seed` None: the
    engine draws one. `logit_bias` pairs are (token id, added to its logit). `logprobs` None: none
    reported, else how many alternatives beside the chosen token.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    logprobs: int | None = None


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One choice to generate. `n` choices are `n` requests that differ in id and `choice`.

    Attributes:
        request_id: unique while the request lives.
        prompt_ids: token ids, at least one.
        adapters: none (the base), one, or a mix of up to four.
        max_tokens: most tokens to generate, at least 1; prompt + max_tokens fit the context.
        min_tokens: the end-of-text and stop ids cannot be drawn before so many.
        stop_token_ids: ids that end the answer; the model's own end ids are added by the engine.
        ignore_eos: the model's own end ids do not end the answer.
        cache_scope: KV is shared only between equal scopes (tenant and salt).
        choice: index among the `n` choices; part of the sampler's key.
        prompt_logprobs: None, or how many alternatives to report for each prompt token.
        tenant: who asks; tenants share rows and KV blocks fairly. Never part of the answer.
    """

    request_id: str
    prompt_ids: tuple[int, ...]
    adapters: tuple[AdapterRef, ...] = ()
    sampling: SamplingParams = field(default_factory=SamplingParams)
    max_tokens: int = 16
    min_tokens: int = 0
    stop_token_ids: frozenset[int] = frozenset()
    ignore_eos: bool = False
    cache_scope: str = ""
    choice: int = 0
    prompt_logprobs: int | None = None
    tenant: str = DEFAULT_TENANT


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log probability of one token and of the likeliest alternatives at its place."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class RequestFailure:
    """Why a request ended without an answer; `code` is one of the contract's."""

    code: str
    message: str


@dataclass(frozen=True, slots=True)
class TokenOutput:
    """What one step gave one request.

    Attributes:
        request_id: whose it is.
        token_ids: new tokens, in order; may be empty (a failure, an abort).
        finish_reason: set on the last output of a request.
        stop_token_id: the last of `token_ids` when it ended the answer: counted, never shown.
        logprobs: one entry per new token, if asked for.
        prompt_logprobs: on the first output, one entry per prompt token, the first one None.
        failure: set when finish_reason is "error".
        num_cached_tokens: prompt tokens whose KV was reused.
        queue_s: arrival to first schedule, on the first output.
        ttft_s: arrival to first token, on the first output.
    """

    request_id: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    logprobs: tuple[TokenLogprobs, ...] | None = None
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
    failure: RequestFailure | None = None
    num_cached_tokens: int = 0
    queue_s: float | None = None
    ttft_s: float | None = None
