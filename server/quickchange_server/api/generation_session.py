"""One running API request: its choices side by side, its clock, and its end in the metrics.

Each choice has a task that moves its deltas into one queue, so whoever reads can wait with a time
limit, and closing the session cancels every choice. Knows no HTTP shapes.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass

from quickchange_server.api.choice_reader import ChoiceDelta
from quickchange_server.metrics import Outcome, RequestSummary, ServerMetrics
from quickchange_server.request_record import GenerationRecord


@dataclass(frozen=True, slots=True)
class SessionLabel:
    """Whose tokens are counted: prompt lengths, choices per prompt, adapters, and since when.

    `record` is filled at the end.
    """

    prompt_lengths: tuple[int, ...]
    num_choices: int
    adapters: tuple[str, ...]
    arrival_s: float
    record: GenerationRecord | None = None


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of a request; each prompt counts once, whatever the number of its choices.

    `queue_s` and `ttft_s` are the first choice's that got a token, as the engine measured them.
    """

    num_prompt_tokens: int
    num_generated_tokens: int
    num_cached_tokens: int
    queue_s: float | None
    ttft_s: float | None


@dataclass(slots=True)
class _ChoiceClock:
    first_s: float = 0.0
    last_s: float = 0.0
    num_tokens: int = 0
    num_cached_tokens: int | None = None


class GenerationSession:
    """Runs the choices of one request from `start` to `close`, which must be called."""

    def __init__(
        self,
        label: SessionLabel,
        metrics: ServerMetrics,
        on_close: Callable[[], None] = lambda: None,
    ) -> None:
        self._label = label
        self._metrics = metrics
        self._on_close = on_close
        self._queue: asyncio.Queue[ChoiceDelta | None] = asyncio.Queue()
        self._failure: Exception | None = None
        self._tasks: list[asyncio.Task[None]] = []
        num_open = len(label.prompt_lengths) * label.num_choices
        self._clocks = [_ChoiceClock() for _ in range(num_open)]
        self._num_open = num_open
        self._queue_s: float | None = None
        self._ttft_s: float | None = None
        self._outcome: Outcome | None = "cancelled"
        self._finish_reasons: list[str] = []

    async def start(self, choices: Sequence[AsyncIterator[ChoiceDelta]]) -> None:
        """Submit every choice. A refusal at this point is raised here, before any header.

        After a refusal it may be started again: it stays one request.

        Raises: QueueFull, Unavailable.
        """
        self._metrics.on_request_start(self._label.adapters)
        self._outcome, self._failure, self._queue = "cancelled", None, asyncio.Queue()
        self._tasks = [asyncio.create_task(self._pump(choice)) for choice in choices]
        await asyncio.sleep(0)
        if self._failure is not None:
            self._outcome = "rejected"
            await self._end_tasks()
            raise self._failure

    async def _pump(self, choice: AsyncIterator[ChoiceDelta]) -> None:
        try:
            async for delta in choice:
                self._note(self._clocks[delta.index], delta)
                self._queue.put_nowait(delta)
        except Exception as error:
            self._failure = self._failure or error
            self._queue.put_nowait(None)

    def _note(self, clock: _ChoiceClock, delta: ChoiceDelta) -> None:
        """Take the time of a delta when it arrives, not when a slow client reads it."""
        output, now = delta.output, time.monotonic()
        if clock.num_cached_tokens is None:
            clock.num_cached_tokens = output.num_cached_tokens
            clock.first_s = now
            self._metrics.on_first_token(now - self._label.arrival_s, self._label.adapters)
            if output.ttft_s is not None and output.queue_s is not None:
                self._metrics.on_prefill(output.ttft_s - output.queue_s)
            if self._ttft_s is None:
                self._queue_s, self._ttft_s = output.queue_s, output.ttft_s
        elif delta.num_tokens:
            for _ in range(delta.num_tokens):
                self._metrics.on_token_gap((now - clock.last_s) / delta.num_tokens)
        clock.num_tokens += delta.num_tokens
        clock.last_s = now
        if delta.finish_reason is not None:
            has_gaps, seconds = clock.num_tokens > 1, now - clock.first_s
            mean_gap_s = seconds / (clock.num_tokens - 1) if has_gaps else None
            self._metrics.on_choice_end(delta.finish_reason, mean_gap_s)
            self._finish_reasons.append(delta.finish_reason)

    @property
    def is_complete(self) -> bool:
        """Whether every choice has ended."""
        return self._num_open == 0

    async def next_deltas(self) -> list[ChoiceDelta]:
        """Wait for the next deltas, of any choices; do not call when complete.

        Raises: whatever ended a choice early.
        """
        deltas = await self._arrived()
        if not deltas:
            self._outcome = "error"
            raise self._failure or AssertionError("a choice ended without a reason")
        self._num_open -= sum(delta.finish_reason is not None for delta in deltas)
        if self.is_complete:
            self._outcome = "ok"
        return deltas

    async def _arrived(self) -> list[ChoiceDelta]:
        """Return what has come, at least one delta; none when the next thing is a failure."""
        items = [await self._queue.get()]
        while items[-1] is not None and not self._queue.empty():
            items.append(self._queue.get_nowait())
        if items[-1] is None and len(items) > 1:
            self._queue.put_nowait(None)
        return [item for item in items if item is not None]

    @property
    def usage(self) -> Usage:
        """What has been counted so far."""
        n = self._label.num_choices
        cached = [
            min(clock.num_cached_tokens or 0 for clock in self._clocks[start : start + n])
            for start in range(0, len(self._clocks), n)
        ]
        return Usage(
            sum(self._label.prompt_lengths),
            sum(clock.num_tokens for clock in self._clocks),
            sum(cached),
            self._queue_s,
            self._ttft_s,
        )

    async def close(self, known_outcome: Outcome | None = None) -> None:
        """Cancel what runs and count the request. A repeat does nothing.

        `known_outcome`: what it is counted as, whatever was noted.
        """
        noted, self._outcome = self._outcome, None
        if noted is None:
            return
        outcome = known_outcome or noted
        self._on_close()
        usage = self.usage
        duration_s = time.monotonic() - self._label.arrival_s if outcome == "ok" else None
        counted = usage.num_prompt_tokens if self._ttft_s is not None else 0
        self._metrics.on_request_end(
            RequestSummary(
                outcome,
                self._label.adapters,
                duration_s,
                usage.queue_s,
                counted,
                usage.num_generated_tokens,
            )
        )
        if self._label.record is not None:
            self._fill(self._label.record, outcome, usage)
        await self._end_tasks()

    async def _end_tasks(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _fill(self, record: GenerationRecord, outcome: Outcome, usage: Usage) -> None:
        record.outcome = outcome
        record.finish_reasons = tuple(self._finish_reasons)
        record.num_prompt_tokens = usage.num_prompt_tokens
        record.num_cached_tokens = usage.num_cached_tokens
        record.num_generated_tokens = usage.num_generated_tokens
        record.queue_s, record.ttft_s = usage.queue_s, usage.ttft_s
