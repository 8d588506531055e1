"""Check a body against the engine and the adapters, and turn it into a plan."""

from collections.abc import Sequence

from quickchange_server.api.generation_plan import (
    GenerationPlan,
    ModelChoice,
    answer_head,
    end_ids,
    engine_requests,
    resolve_model,
    sampling_params,
    stop_strings,
)
from quickchange_server.api.prompts import (
    DEFAULT_COMPLETION_TOKENS,
    PromptIds,
    fit_max_tokens,
    read_chat,
    read_prompts,
)
from quickchange_server.api.schemas import ChatBody, CompletionBody, GenerationBody
from quickchange_server.api.services import AppServices
from quickchange_server.api.task_filling import fill_sampling, task_of
from quickchange_server.engine.request import GenerationRequest
from quickchange_server.errors import InvalidRequest


def vocab_size(services: AppServices) -> int:
    """Return the number of token ids that tokenizer and model both know."""
    modules = services.engine.base.modules.values()
    rows = [module.in_features for module in modules if module.kind == "embedding"]
    return min([services.tokenizer.vocab_size, *rows])


def chat_top_logprobs(body: ChatBody) -> int | None:
    """Return how many alternatives a chat asks for; None: no log probabilities at all.

    Raises: InvalidRequest for `top_logprobs` without `logprobs`.
    """
    if body.logprobs:
        return body.top_logprobs or 0
    if body.top_logprobs:
        raise InvalidRequest("top_logprobs: needs logprobs: true", param="top_logprobs")
    return None


async def plan_chat(body: ChatBody, services: AppServices, tenant: str) -> GenerationPlan:
    """Return the plan of a chat.

    Raises: InvalidRequest, ContextLengthExceeded, NotFound.
    """
    model = resolve_model(body, services.adapters, tenant)
    task = task_of(body, model)
    body = fill_sampling(body, task)
    top = chat_top_logprobs(body)
    prompt = await read_chat(body.messages, services.tokenizer, task)
    wanted = body.max_completion_tokens or body.max_tokens
    max_model_len = services.engine.max_model_len
    limit = fit_max_tokens(
        len(prompt.token_ids), wanted, task.max_tokens, max_model_len, "messages"
    )
    head = answer_head("chatcmpl", body.model, services.engine.base.digest, model)
    shared = _shared_request(head.id, body, model, services, tenant, top)
    n = body.n or 1
    requests = engine_requests(shared, [prompt], [limit], n)
    return GenerationPlan(head, model, (prompt,), requests, n, stop_strings(body.stop))


async def plan_completion(
    body: CompletionBody,
    services: AppServices,
    tenant: str,
    default_tokens: int | None = DEFAULT_COMPLETION_TOKENS,
) -> GenerationPlan:
    """Return the plan of a completion. `max_tokens` 0 scores the prompt alone, with `echo`.

    `default_tokens` hold when neither body nor task say how many; None fills the context.

    Raises: InvalidRequest, ContextLengthExceeded, NotFound.
    """
    model = resolve_model(body, services.adapters, tenant)
    task = task_of(body, model)
    body = fill_sampling(body, task)
    is_prompt_only = body.max_tokens == 0
    if is_prompt_only and not body.echo:
        raise InvalidRequest("max_tokens: 0 needs echo: true; else at least 1", param="max_tokens")
    prompts = await read_prompts(body.prompt, services.tokenizer, vocab_size(services), task)
    default = task.max_tokens or default_tokens
    limits = _completion_limits(body, prompts, default, services.engine.max_model_len)
    head = answer_head("cmpl", body.model, services.engine.base.digest, model)
    shared = _shared_request(head.id, body, model, services, tenant, body.logprobs)
    n = body.n or 1
    return GenerationPlan(
        head,
        model,
        prompts,
        engine_requests(shared, prompts, limits, n),
        n,
        stop_strings(body.stop),
        bool(body.echo),
        is_prompt_only,
    )


def _completion_limits(
    body: CompletionBody, prompts: Sequence[PromptIds], default: int | None, max_model_len: int
) -> list[int]:
    wanted = 1 if body.max_tokens == 0 else body.max_tokens
    return [
        fit_max_tokens(len(prompt.token_ids), wanted, default, max_model_len, "prompt")
        for prompt in prompts
    ]


def _shared_request(
    request_id: str,
    body: GenerationBody,
    model: ModelChoice,
    services: AppServices,
    tenant: str,
    logprobs: int | None,
) -> GenerationRequest:
    """Return what all choices of a body have in common."""
    num_ids = vocab_size(services)
    has_echo = isinstance(body, CompletionBody) and bool(body.echo)
    return GenerationRequest(
        request_id=request_id,
        prompt_ids=(),
        adapters=model.adapters,
        sampling=sampling_params(body, logprobs, num_ids),
        min_tokens=body.min_tokens or 0,
        stop_token_ids=end_ids(body, num_ids),
        ignore_eos=bool(body.ignore_eos),
        cache_scope=f"{tenant}/{body.cache_salt or ''}",
        prompt_logprobs=logprobs if has_echo else None,
        tenant=tenant,
    )
