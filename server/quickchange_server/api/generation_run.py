"""From a plan to its answer, whole or as a stream, whatever the answer's dialect.

Everything that can be refused is refused before the first header goes out.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from fastapi import Request
from pydantic_core import to_json
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from quickchange_server.adapter_uses import check_not_quarantined
from quickchange_server.api.answer_format import AnswerFormat, CollectedChoice, timing_ms
from quickchange_server.api.choice_reader import (
    ChoiceDelta,
    ChoiceReader,
    OutputReader,
    PromptReader,
    read_choice,
)
from quickchange_server.api.cold_loads import count_if_cold
from quickchange_server.api.error_handlers import CLIENT_LEFT
from quickchange_server.api.generation_plan import GenerationPlan
from quickchange_server.api.generation_session import GenerationSession, SessionLabel
from quickchange_server.api.services import AppServices
from quickchange_server.api.streaming import (
    EventStream,
    StreamShape,
    wait_for_disconnect,
    while_connected,
)
from quickchange_server.errors import InvalidRequest, QuickchangeError, Unavailable
from quickchange_server.metrics import Outcome, RequestSummary
from quickchange_server.request_record import GenerationRecord
from quickchange_server.stop_strings import StopStringFilter

MAX_STARTS = 4
MAX_SHOWN_CHARS = 4000
ReaderOf = Callable[[int], OutputReader]
"""Makes the reader of one choice, by the choice's index."""


@dataclass(frozen=True, slots=True)
class AnswerWay:
    """How a plan is answered. `stream` None: whole. `headers` are added to."""

    answer: AnswerFormat
    reader_of: ReaderOf
    stream: StreamShape | None = None
    headers: dict[str, str] = field(default_factory=dict)


@contextmanager
def refusals_counted(services: AppServices) -> Iterator[None]:
    """Count a request that ends in this block, before it is started."""
    try:
        yield
    except ClientDisconnect:
        services.metrics.on_request_end(RequestSummary("cancelled"))
        raise
    except QuickchangeError:
        services.metrics.on_request_end(RequestSummary("rejected"))
        raise


async def admit(
    request: Request, plan: GenerationPlan, services: AppServices, *, is_repeat: bool = False
) -> None:
    """Make sure that the plan may be submitted now; it counts as in flight until its session ends.

    `is_repeat`: it was admitted before, and is still the same request.

    Raises: InvalidRequest when it never can be, QueueFull, RateLimited, Unavailable, NotFound,
    Conflict when an adapter is quarantined, ClientDisconnect when the client leaves meanwhile.
    """
    num_places = services.engine.max_requests
    _check_num_choices(plan, num_places)
    services.engine.check_admission(len(plan.requests))
    services.requests.hold(plan.head.id, plan.tenant, len(plan.requests), num_places)
    try:
        await _acquire(request, plan, services, is_repeat)
    except BaseException:
        _give_back(plan, services)
        raise


def _give_back(plan: GenerationPlan, services: AppServices) -> None:
    """Give back what `admit` took; a repeat is a no-op."""
    services.adapters.part(plan.head.id)
    services.requests.release(plan.head.id)


async def _acquire(
    request: Request, plan: GenerationPlan, services: AppServices, is_repeat: bool
) -> None:
    """Have the plan's adapters loaded, together if it mixes; cold ones count for its tenant."""
    parts = [resolved for resolved in plan.model.resolved if resolved.kind == "adapter"]
    for part in parts:  # before their loads are counted
        check_not_quarantined(services.engine, part)
    if not parts:
        return
    digests = list(dict.fromkeys(part.digest for part in parts))

    async def acquire() -> None:
        if not is_repeat:  # here, so that nobody else counts before these are known as loading
            count_if_cold(digests, services, plan.tenant)
        if len(parts) == 1:
            await services.adapters.acquire(parts[0], is_repeat=is_repeat)
        else:
            await services.adapters.acquire_mix(plan.head.id, parts, is_repeat=is_repeat)

    if all(map(services.engine.is_loaded, digests)):
        await acquire()
    else:
        await while_connected(request.receive, acquire())


def _check_num_choices(plan: GenerationPlan, max_requests: int) -> None:
    if len(plan.requests) > max_requests:
        raise InvalidRequest(
            f"{len(plan.prompts)} prompts with n {plan.num_choices} are {len(plan.requests)} "
            f"choices; at most {max_requests} may run and wait (--max-batch-rows and --max-queue): "
            "send fewer in one request",
            param="n" if len(plan.prompts) == 1 else "prompt",
        )


async def respond(
    request: Request, services: AppServices, plan: GenerationPlan, way: AnswerWay
) -> Response:
    """Admit a plan, start it and answer it; a client that leaves ends it.

    Raises: what `admit` does, and GenerationFailed.
    """
    if plan.model.adapters:
        digests = ",".join(ref.digest for ref in plan.model.adapters)
        way.headers["x-quickchange-adapter-digest"] = digests
    session = await _admitted(request, services, plan)
    try:
        await _start(session, request, plan, services, way.reader_of)
        if way.stream is not None:
            return EventStream(session, way.answer, way.stream, services.ping_s, way.headers)
        response = await _whole_answer(request, session, way.answer, way.headers)
    except BaseException as error:
        await session.close(_outcome_of(error))
        raise
    await session.close()
    return response


def _outcome_of(error: BaseException) -> Outcome | None:
    """Return what a request that ended so is counted as; None: what its session noted."""
    if isinstance(error, ClientDisconnect):
        return "cancelled"
    is_fault = isinstance(error, Exception) and not isinstance(error, QuickchangeError)
    return "error" if is_fault else None


async def _admitted(
    request: Request, services: AppServices, plan: GenerationPlan
) -> GenerationSession:
    """Admit a plan. What it then holds is given back by its session, or here if there is none."""
    with refusals_counted(services):
        await admit(request, plan, services)
    try:
        lengths = tuple(len(prompt.token_ids) for prompt in plan.prompts)
        record = _recorded(request, services, plan)
        arrival_s = request.state.arrival_s
        label = SessionLabel(lengths, plan.num_choices, plan.model.labels, arrival_s, record)
        return GenerationSession(label, services.metrics, lambda: _give_back(plan, services))
    except BaseException:
        _give_back(plan, services)
        raise


def _recorded(request: Request, services: AppServices, plan: GenerationPlan) -> GenerationRecord:
    """Note in the request's record what is about to run."""
    record = GenerationRecord(
        plan.head.model,
        is_chat=request.url.path.endswith("/chat/completions"),
        digests=tuple(ref.digest for ref in plan.model.adapters),
        num_choices=len(plan.requests),
    )
    if services.shows_prompts:
        decode = services.tokenizer.decode
        texts = (decode(prompt.token_ids, skip_special_tokens=False) for prompt in plan.prompts)
        record.prompts = tuple(text[:MAX_SHOWN_CHARS] for text in texts)
    request.state.record.generation = record
    return record


async def _start(
    session: GenerationSession,
    request: Request,
    plan: GenerationPlan,
    services: AppServices,
    reader_of: ReaderOf,
) -> None:
    """Submit a plan; an adapter that was unloaded since it was acquired is acquired again.

    Raises: QueueFull, Unavailable, NotFound, Conflict.
    """
    for _ in range(MAX_STARTS):
        if await _has_started(session, _choices(plan, services, reader_of)):
            services.adapters.part(plan.head.id)  # its requests hold them now
            return
        await admit(request, plan, services, is_repeat=True)
    raise Unavailable("the adapter is being loaded and unloaded in turn: try again")


async def _has_started(
    session: GenerationSession, choices: Sequence[AsyncIterator[ChoiceDelta]]
) -> bool:
    """Start a session; False: an adapter is not loaded any more."""
    try:
        await session.start(choices)
    except Unavailable as error:
        if error.code != "adapter_not_loaded":
            raise
        return False
    return True


def _choices(
    plan: GenerationPlan, services: AppServices, reader_of: ReaderOf
) -> list[AsyncIterator[ChoiceDelta]]:
    return [
        read_choice(services.engine, each, reader_of(index))
        for index, each in enumerate(plan.requests)
    ]


def text_readers(plan: GenerationPlan, services: AppServices) -> ReaderOf:
    """Return what reads a plan's choices as text that ends before a stop string."""

    def reader_of(index: int) -> OutputReader:
        if plan.is_prompt_only:
            return PromptReader(index)
        return ChoiceReader(
            index,
            services.tokenizer.detokenizer(),
            StopStringFilter(plan.stop),
            plan.requests[index].min_tokens,
        )

    return reader_of


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
