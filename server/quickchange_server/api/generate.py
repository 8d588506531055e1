"""`POST /generate`, `/generate_stream` and `/`: what clients of TGI and LoRAX send.

A request becomes a completion: the same model strings, tasks, limits and cache. Only the names of
fields, the defaults (greedy; to the context's end) and the shape of answers are that dialect's.
"""

import secrets
from dataclasses import dataclass

from fastapi import APIRouter, Request
from quickchange_adapters.task import Task
from starlette.responses import Response

from quickchange_server.api.auth import Generator
from quickchange_server.api.error_shapes import generate_error_body
from quickchange_server.api.field_policy import NEUTRAL_IN_GENERATE, check_extra_fields
from quickchange_server.api.generate_format import GenerateFormat, ShownParts, TokenReader
from quickchange_server.api.generation_plan import GenerationPlan
from quickchange_server.api.generation_planner import plan_completion
from quickchange_server.api.generation_route import GenerationRoute
from quickchange_server.api.generation_run import AnswerWay, refusals_counted, respond
from quickchange_server.api.named_adapters import check_model
from quickchange_server.api.schemas import (
    INT64,
    UINT64,
    CompatGenerateBody,
    CompletionBody,
    GenerateBody,
    GenerateParameters,
)
from quickchange_server.api.services import AppServices, Services
from quickchange_server.api.streaming import StreamShape
from quickchange_server.errors import InvalidRequest
from quickchange_server.principal import Principal
from quickchange_server.stop_strings import StopStringFilter

BASE_MODEL_ID = "__base_model__"
"""What LoRAX calls the base in `adapter_id`."""
_STREAM = StreamShape(end=b"", failure=generate_error_body)


@dataclass(frozen=True, slots=True)
class _Shape:
    """How a route answers."""

    is_stream: bool = False
    is_list: bool = False


router = APIRouter(tags=["TGI and LoRAX"], route_class=GenerationRoute)


@router.post("/generate")
async def generate(
    body: GenerateBody, request: Request, services: Services, caller: Generator
) -> Response:
    """Continue a prompt as TGI and LoRAX do; the answer is whole."""
    return await _respond(body, request, services, caller, _Shape())


@router.post("/generate_stream")
async def generate_stream(
    body: GenerateBody, request: Request, services: Services, caller: Generator
) -> Response:
    """Continue a prompt as TGI and LoRAX do, with an event for each token."""
    return await _respond(body, request, services, caller, _Shape(is_stream=True))


@router.post("/")
async def compat_generate(
    body: CompatGenerateBody, request: Request, services: Services, caller: Generator
) -> Response:
    """Continue a prompt: what `lorax-client` and `text-generation` call. Whole, it is in a list."""
    shape = _Shape(is_stream=bool(body.stream), is_list=True)
    return await _respond(body, request, services, caller, shape)


async def _respond(
    body: GenerateBody,
    request: Request,
    services: AppServices,
    caller: Principal,
    shape: _Shape,
) -> Response:
    wanted = body.parameters or GenerateParameters()
    with refusals_counted(services):
        headers = _check_fields(body, wanted, services.is_strict)
        if shape.is_stream and wanted.decoder_input_details:
            raise InvalidRequest(
                "decoder_input_details: is not available in a stream",
                param="decoder_input_details",
                code="unsupported_field",
            )
        completion = _completion(body.inputs, wanted, services, caller)
        if shape.is_stream or _needs_tokens(wanted):
            completion.logprobs = wanted.return_k_alternatives or 0
        plan = await plan_completion(completion, services, caller.tenant, None)
    answer = _format(body.inputs, wanted, plan, services, shape.is_list)
    reader = TokenReader(services.tokenizer.detokenizer(), StopStringFilter(plan.stop))
    way = AnswerWay(answer, lambda _: reader, _STREAM if shape.is_stream else None, headers)
    return await respond(request, services, plan, way)


def _check_fields(
    body: GenerateBody, wanted: GenerateParameters, is_strict: bool
) -> dict[str, str]:
    """Return the header that names unknown fields.

    Raises: InvalidRequest for what would change the answer and is not done here.
    """
    extra = {**(body.model_extra or {}), **(wanted.model_extra or {})}
    extra.pop("api_token", None)  # for a hub's private adapters, which nobody fetches here
    if wanted.adapter_source not in (None, "", "local"):
        raise InvalidRequest(
            f"adapter_source: {wanted.adapter_source[:40]!r} is not supported: nothing is fetched "
            "on a request; upload the adapter (POST /v1/adapters) and leave adapter_source out",
            param="adapter_source",
            code="unsupported_field",
        )
    return check_extra_fields(extra, NEUTRAL_IN_GENERATE, 1, is_strict)


def _completion(
    inputs: str, wanted: GenerateParameters, services: AppServices, caller: Principal
) -> CompletionBody:
    """Return the completion that a request asks for.

    Raises: NotFound.
    """
    base = services.engine.base.name
    model = wanted.adapter_id if wanted.adapter_id not in (None, "", BASE_MODEL_ID) else base
    assert model is not None
    check_model(caller, model)
    task = services.adapters.resolve(model, tenant=caller.tenant).task or Task()
    return CompletionBody(
        model=model,
        prompt=inputs,
        max_tokens=wanted.max_new_tokens,
        temperature=_temperature(wanted, Task() if wanted.raw_prompt else task),
        top_k=wanted.top_k,
        top_p=wanted.top_p,
        seed=_seed(wanted.seed),
        repetition_penalty=wanted.repetition_penalty,
        stop=wanted.stop or None,
        ignore_eos=wanted.ignore_eos_token,
        raw_prompt=wanted.raw_prompt,
        echo=bool(wanted.decoder_input_details),
    )


def _temperature(wanted: GenerateParameters, task: Task) -> float:
    """Return the temperature that is meant: tokens are drawn only when something asks for it."""
    filters = (wanted.top_k, None if wanted.top_p == 1 else wanted.top_p)
    is_drawn = wanted.do_sample or any(each is not None for each in filters)
    if wanted.temperature is not None and (is_drawn or wanted.temperature != 1):
        return wanted.temperature
    if wanted.temperature is None and task.temperature is not None:
        return task.temperature
    return 1.0 if is_drawn else 0.0


def _seed(seed: int | None) -> int:
    """Return a seed for the sampler, drawn if none came; those of 64 bits keep their bits."""
    if seed is None:
        return secrets.randbelow(INT64)
    return seed if seed < INT64 else seed - UINT64


def _needs_tokens(wanted: GenerateParameters) -> bool:
    return bool(wanted.details or wanted.decoder_input_details)


def _format(
    inputs: str,
    wanted: GenerateParameters,
    plan: GenerationPlan,
    services: AppServices,
    is_list: bool,
) -> GenerateFormat:
    sampling = plan.requests[0].sampling
    assert sampling.seed is not None
    parts = ShownParts(
        prompt=inputs if wanted.return_full_text else "",
        has_details=_needs_tokens(wanted),
        has_prompt_tokens=bool(wanted.decoder_input_details),
        num_alternatives=wanted.return_k_alternatives or 0,
        seed=sampling.seed % UINT64 if sampling.temperature > 0 else None,
        is_list=is_list,
    )
    return GenerateFormat(plan, services.tokenizer, services.engine.eos_token_ids, parts)
