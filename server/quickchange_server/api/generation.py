"""`POST /v1/chat/completions` and `/v1/completions`: from a body to an answer or a stream.

Order matters: everything that can be refused is refused before the first header goes out.
"""

import asyncio
from collections.abc import AsyncIterator, Mapping

from fastapi import APIRouter, Request
from pydantic_core import to_json
from starlette.responses import Response

from quickchange_server.api.answer_format import AnswerFormat, CollectedChoice, timing_ms
from quickchange_server.api.auth import Generator
from quickchange_server.api.chat_format import ChatFormat
from quickchange_server.api.choice_reader import (
    ChoiceDelta,
    ChoiceReader,
    OutputReader,
    PromptReader,
    read_choice,
)
from quickchange_server.api.completion_format import CompletionFormat
from quickchange_server.api.error_handlers import CLIENT_LEFT
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
from quickchange_server.api.generation_session import GenerationSession, SessionLabel
from quickchange_server.api.named_adapters import check_models
from quickchange_server.api.schemas import ChatBody, CompletionBody, GenerationBody
from quickchange_server.api.services import AppServices, Services
from quickchange_server.api.streaming import EventStream, wait_for_disconnect
from quickchange_server.errors import Conflict, InvalidRequest, QuickchangeError, Unavailable
from quickchange_server.metrics import RequestSummary
from quickchange_server.stop_strings import StopStringFilter

MAX_STARTS = 4

router = APIRouter(tags=["generation"], route_class=GenerationRoute)


@router.post("/v1/chat/completions")
async def chat_completions(
    body: ChatBody, request: Request, services: Services, caller: Generator
) -> Response:
    """Answer a conversation, whole or as server-sent events."""
    try:
        check_models(caller, body)
        headers = _ignored(body, NEUTRAL_IN_CHAT, services)
        plan = await plan_chat(body, services, caller.tenant)
        await _admit(plan, services)
    except QuickchangeError:
        services.metrics.on_request_end(RequestSummary("rejected"))
        raise
    answer = ChatFormat(plan.head, services.tokenizer, chat_top_logprobs(body), _has_usage(body))
    return await _respond(request, services, plan, answer, body, headers)


@router.post("/v1/completions")
async def completions(
    body: CompletionBody, request: Request, services: Services, caller: Generator
) -> Response:
    """Continue one or more prompts, whole or as server-sent events."""
    try:
        check_models(caller, body)
        headers = _ignored(body, NEUTRAL_IN_COMPLETIONS, services)
        plan = await plan_completion(body, services, caller.tenant)
        await _admit(plan, services)
    except QuickchangeError:
        services.metrics.on_request_end(RequestSummary("rejected"))
        raise
    answer = CompletionFormat(plan, services.tokenizer, body.logprobs, _has_usage(body))
    return await _respond(request, services, plan, answer, body, headers)


def _ignored(
    body: GenerationBody, neutral: Mapping[str, tuple[object, ...]], services: AppServices
) -> dict[str, str]:
    return check_extra_fields(body.model_extra or {}, neutral, body.n or 1, services.is_strict)


def _has_usage(body: GenerationBody) -> bool:
    return body.stream_options is not None and body.stream_options.include_usage


async def _admit(plan: GenerationPlan, services: AppServices) -> None:
    """Make sure that the plan may be submitted now.

    Raises: InvalidRequest when it never can be, QueueFull, Unavailable, NotFound, Conflict when an
    adapter is quarantined.
    """
    _check_num_choices(plan, services.engine.max_requests)
    services.engine.check_admission(len(plan.requests))
    quarantined = services.engine.snapshot().quarantined
    for resolved in plan.model.resolved:
        if resolved.kind == "adapter" and resolved.digest in quarantined:
            raise Conflict(
                f"the adapter {resolved.served_name!r} gave non-finite values repeatedly and is "
                "out of service; upload a sound version",
                code="adapter_quarantined",
            )
    for resolved in plan.model.resolved:
        await services.adapters.acquire(resolved)


def _check_num_choices(plan: GenerationPlan, max_requests: int) -> None:
    if len(plan.requests) > max_requests:
        raise InvalidRequest(
            f"{len(plan.prompts)} prompts with n {plan.num_choices} are {len(plan.requests)} "
            f"choices; at most {max_requests} may run and wait (--max-batch-rows and --max-queue): "
            "send fewer in one request",
            param="n" if len(plan.prompts) == 1 else "prompt",
        )


async def _respond(
    request: Request,
    services: AppServices,
    plan: GenerationPlan,
    answer: AnswerFormat,
    body: GenerationBody,
    headers: dict[str, str],
) -> Response:
    if plan.model.adapters:
        digests = ",".join(ref.digest for ref in plan.model.adapters)
        headers["x-quickchange-adapter-digest"] = digests
    lengths = tuple(len(prompt.token_ids) for prompt in plan.prompts)
    label = SessionLabel(lengths, plan.num_choices, plan.model.labels, request.state.arrival_s)
    session = await _started(plan, label, services)
    try:
        if body.stream:
            return EventStream(session, answer, _has_usage(body), services.ping_s, headers)
        response = await _whole_answer(request, session, answer, headers)
    except BaseException:
        await session.close()
        raise
    await session.close()
    return response


async def _started(
    plan: GenerationPlan, label: SessionLabel, services: AppServices
) -> GenerationSession:
    """Submit a plan; an adapter that was unloaded since it was acquired is acquired again.

    Raises: QueueFull, Unavailable, NotFound, Conflict.
    """
    for _ in range(MAX_STARTS):
        session = GenerationSession(label, services.metrics)
        try:
            await session.start(_choices(plan, services))
        except Unavailable as error:
            await session.close()
            if error.code != "adapter_not_loaded":
                raise
            await _admit(plan, services)
        except BaseException:
            await session.close()
            raise
        else:
            return session
    raise Unavailable("the adapter is being loaded and unloaded in turn: try again")


def _choices(plan: GenerationPlan, services: AppServices) -> list[AsyncIterator[ChoiceDelta]]:
    return [
        read_choice(services.engine, each, _reader(index, plan, services))
        for index, each in enumerate(plan.requests)
    ]


def _reader(index: int, plan: GenerationPlan, services: AppServices) -> OutputReader:
    if plan.is_prompt_only:
        return PromptReader(index)
    return ChoiceReader(
        index,
        services.tokenizer.detokenizer(),
        StopStringFilter(plan.stop),
        plan.requests[index].min_tokens,
    )


async def _whole_answer(
    request: Request,
    session: GenerationSession,
    answer: AnswerFormat,
    headers: dict[str, str],
) -> Response:
    """Wait for all choices; when the client leaves first, nobody reads what is returned."""
    collecting = asyncio.create_task(_collect(session))
    leaving = asyncio.create_task(wait_for_disconnect(request.receive))
    try:
        await asyncio.wait((collecting, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not collecting.done():
            return Response(status_code=CLIENT_LEFT)
        choices = collecting.result()
    finally:
        collecting.cancel()
        leaving.cancel()
    for name, value in timing_ms(session.usage).items():
        headers[f"x-quickchange-{name.replace('_', '-')}"] = str(value)
    body = to_json(answer.body(choices, session.usage), inf_nan_mode="null")
    return Response(body, headers=headers, media_type="application/json")


async def _collect(session: GenerationSession) -> list[CollectedChoice]:
    choices: dict[int, CollectedChoice] = {}
    while not session.is_complete:
        for delta in await session.next_deltas():
            choices.setdefault(delta.index, CollectedChoice(delta.index)).add(delta)
    return [choices[index] for index in sorted(choices)]
