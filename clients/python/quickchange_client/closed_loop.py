"""A closed loop of streamed completions: a client sends its next request when its last has ended.

Times are those of this side, in seconds, from the sending of a request; a token's time is that of
the piece of text that brought it. The server should have nothing else to do.
"""

import asyncio
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from quickchange_client.async_client import AsyncQuickchange

TEXT = (
    "river stone window letter garden winter music candle harbour story paper morning silver "
    "mountain village ocean kitchen journey shadow summer market bridge forest lantern"
)
WORDS = tuple(TEXT.split())


@dataclass(frozen=True, slots=True)
class LoadPlan:
    """What is asked for: `models` in turn, by `num_clients` at once."""

    models: Sequence[str]
    num_clients: int = 4
    num_requests: int = 4
    prompt_words: int = 64
    max_tokens: int = 64
    seed: int = 0


@dataclass(slots=True)
class RequestTimes:
    """One request: seconds to the first text, between texts, and to the end; its tokens."""

    ttft_s: float = 0.0
    e2e_s: float = 0.0
    gaps_s: list[float] = field(default_factory=list)
    num_prompt_tokens: int = 0
    num_tokens: int = 0

    @property
    def tpot_s(self) -> float | None:
        """Mean seconds per token after the first."""
        return (self.e2e_s - self.ttft_s) / (self.num_tokens - 1) if self.num_tokens > 1 else None


@dataclass(frozen=True, slots=True)
class LoadFigures:
    """All requests of a loop, and how long it took."""

    requests: tuple[RequestTimes, ...]
    seconds: float

    @property
    def tokens_per_s(self) -> float:
        """Generated tokens of all clients over the loop's time, prefill included."""
        return sum(each.num_tokens for each in self.requests) / self.seconds


async def run_load(
    client: AsyncQuickchange, plan: LoadPlan, on_end: Callable[[], object] = lambda: None
) -> LoadFigures:
    """Run every client's requests; `on_end` is called after each request.

    Raises: QuickchangeError as soon as one request fails.
    """
    started = time.perf_counter()
    loops = [_run_client(client, plan, index, on_end) for index in range(plan.num_clients)]
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(loop) for loop in loops]
    seconds = time.perf_counter() - started
    return LoadFigures(tuple(times for task in tasks for times in task.result()), seconds)


async def _run_client(
    client: AsyncQuickchange, plan: LoadPlan, index: int, on_end: Callable[[], object]
) -> list[RequestTimes]:
    done = []
    for number in range(plan.num_requests):
        place = index + number * plan.num_clients
        words = random.Random(f"{plan.seed}-{place}").choices(WORDS, k=plan.prompt_words)
        model = plan.models[place % len(plan.models)]
        done.append(await _run_request(client, model, " ".join(words), plan.max_tokens))
        on_end()
    return done


async def _run_request(
    client: AsyncQuickchange, model: str, prompt: str, max_tokens: int
) -> RequestTimes:
    times, last = RequestTimes(), time.perf_counter()
    started = last
    options = {"max_tokens": max_tokens, "temperature": 0.0, "ignore_eos": True}
    async with await client.stream_complete(model, prompt, **options) as stream:  # type: ignore[arg-type]
        async for chunk in stream:
            now = time.perf_counter()
            if chunk.usage is not None:
                times.num_tokens = chunk.usage.completion_tokens
                times.num_prompt_tokens = chunk.usage.prompt_tokens
            if any(choice.text for choice in chunk.choices):
                if times.ttft_s:
                    times.gaps_s.append(now - last)
                else:
                    times.ttft_s = now - started
                last = now
    times.e2e_s = last - started
    return times


def percentile(values: Sequence[float], share: float) -> float:
    """Return the nearest-rank percentile; 0 of nothing."""
    ordered = sorted(values)
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)] if ordered else 0.0
