"""`POST /v1/chat/completions` and `/v1/completions`: from a body to an answer or a stream.

Order matters: everything that can be refused is refused before the first header goes out.
"""

from collections.abc import Mapping

from fastapi import APIRouter, Request
from starlette.responses import Response

from quickchange_server.api.answer_format import AnswerFormat
from quickchange_server.api.auth import Generator
from quickchange_server.api.chat_format import ChatFormat
from quickchange_server.api.completion_format import CompletionFormat
from quickchange_server.api.field_policy import (
    NEUTRAL_IN_CHAT,
    NEUTRAL_IN_COMPLETIONS,
    check_extra_fields,
)
from quickchange_server.api.generation_plan import GenerationPlan
from quickchange_server.api.generation_planner import (
    chat_top_logprobs,
    plan_chat,
    plan_completion,
)
from quickchange_server.api.generation_route import GenerationRoute
from quickchange_server.api.generation_run import (
    AnswerWay,
    refusals_counted,
    respond,
    text_readers,
)
from quickchange_server.api.named_adapters import check_models
from quickchange_server.api.schemas import ChatBody, CompletionBody, GenerationBody
from quickchange_server.api.services import AppServices, Services
from quickchange_server.api.streaming import StreamShape

router = APIRouter(tags=["generation"], route_class=GenerationRoute)


@router.post("/v1/chat/completions")
async def chat_completions(
    body: ChatBody, request: Request, services: Services, caller: Generator
) -> Response:
    """Answer a conversation, whole or as server-sent events."""
    with refusals_counted(services):
        check_models(caller, body)
        headers = _ignored(body, NEUTRAL_IN_CHAT, services)
        plan = await plan_chat(body, services, caller.tenant)
    answer = ChatFormat(plan.head, services.tokenizer, chat_top_logprobs(body), _has_usage(body))
    way = _way(plan, services, answer, body, headers)
    return await respond(request, services, plan, way)


@router.post("/v1/completions")
async def completions(
    body: CompletionBody, request: Request, services: Services, caller: Generator
) -> Response:
    """Continue one or more prompts, whole or as server-sent events."""
    with refusals_counted(services):
        check_models(caller, body)
        headers = _ignored(body, NEUTRAL_IN_COMPLETIONS, services)
        plan = await plan_completion(body, services, caller.tenant)
    answer = CompletionFormat(plan, services.tokenizer, body.logprobs, _has_usage(body))
    way = _way(plan, services, answer, body, headers)
    return await respond(request, services, plan, way)


def _ignored(
    body: GenerationBody, neutral: Mapping[str, tuple[object, ...]], services: AppServices
) -> dict[str, str]:
    return check_extra_fields(body.model_extra or {}, neutral, body.n or 1, services.is_strict)


def _has_usage(body: GenerationBody) -> bool:
    return body.stream_options is not None and body.stream_options.include_usage


def _way(
    plan: GenerationPlan,
    services: AppServices,
    answer: AnswerFormat,
    body: GenerationBody,
    headers: dict[str, str],
) -> AnswerWay:
    stream = StreamShape(_has_usage(body)) if body.stream else None
    return AnswerWay(answer, text_readers(plan, services), stream, headers)
