"""How far a version moves what the base says of a fixed prompt: measured only when nobody waits.

The version is a guest in memory while it is measured: it takes room that is free, nobody's place,
and leaves at once. The prompt runs through base and version as two ordinary requests.
"""

import asyncio
import logging
import math
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from quickchange_adapters.weights import AdapterWeights

from quickchange_server.adapter_loader import AdapterLoader
from quickchange_server.engine.interface import GenerationEngine
from quickchange_server.engine.request import (
    AdapterRef,
    GenerationRequest,
    SamplingParams,
    TokenLogprobs,
)
from quickchange_server.shared_tasks import SharedTasks

PROBE_PROMPT = "A base stays resident while adapters are swapped in and out. What changes, and why?"
BUDGET_S = 1.0
MAX_TOKENS = 64  # of the prompt
MAX_BYTES = 64 << 20
KEY = "probe"
log = logging.getLogger(__name__)


class NotProbed(Exception):
    """Why nothing was measured: a sentence for the report, never an answer."""


@dataclass(frozen=True, slots=True)
class Probe:
    """What a version changes at the tokens of the prompt, the first one left out.

    `mean_change` and `max_change` are of the tokens' log probabilities, in nats; `num_top_changed`
    counts the places where another token became the likeliest.
    """

    num_tokens: int
    mean_change: float
    max_change: float
    num_top_changed: int
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Return the report's `probe`."""
        return asdict(self)


class AdapterProber:
    """Measures one version at a time, within a second, or says why it does not."""

    def __init__(
        self,
        engine: GenerationEngine,
        loader: AdapterLoader,
        prompt_ids: Sequence[int],
        budget_s: float = BUDGET_S,
    ) -> None:
        self._engine = engine
        self._loader = loader
        self._prompt_ids = tuple(prompt_ids)[: min(MAX_TOKENS, engine.max_model_len - 1)]
        self._budget_s = budget_s
        self._tasks: SharedTasks[Probe] = SharedTasks()

    async def stop(self) -> None:
        """Give up what is being measured."""
        await self._tasks.stop()

    async def measure(
        self, digest: str, num_bytes: int, read: Callable[[], AdapterWeights]
    ) -> Probe:
        """Return what a version of so many bytes changes; `read` gives its tensors, in a thread.

        What takes longer than the budget is left behind: it ends by itself and takes its guest
        along.

        Raises: NotProbed.
        """
        if len(self._prompt_ids) < 2:
            raise NotProbed("there is no prompt to measure with")
        if num_bytes > MAX_BYTES:
            raise NotProbed(f"loading more than {MAX_BYTES >> 20} MiB would take too long")
        if self._tasks.is_running(KEY):
            raise NotProbed("another version was being measured")
        self._check_idle()
        work = self._tasks.run(KEY, lambda: self._measure(digest, read))
        try:
            return await asyncio.wait_for(work, self._budget_s)
        except TimeoutError:
            raise NotProbed(f"it took more than {self._budget_s:g} s") from None
        except NotProbed:
            raise
        except Exception as error:  # whatever it is, it is no reason to refuse an upload
            log.warning("an upload could not be measured", exc_info=error)
            raise NotProbed("it went wrong; the server's log says how") from error

    def _check_idle(self) -> None:
        snapshot = self._engine.snapshot()
        if snapshot.num_running or snapshot.num_waiting:
            raise NotProbed("requests were running, which it would have held up")

    async def _measure(self, digest: str, read: Callable[[], AdapterWeights]) -> Probe:
        started_s = time.monotonic()
        async with self._loader.guest(digest, read) as has_room:
            self._check_idle()
            if not has_room:
                raise NotProbed("it would have taken the place of an adapter in memory")
            base, adapted = await asyncio.gather(self._ask(), self._ask(AdapterRef(digest)))
        return _compared(base, adapted, time.monotonic() - started_s)

    async def _ask(self, *adapters: AdapterRef) -> Sequence[TokenLogprobs]:
        """Return each token's log probability, and the likeliest in its place."""
        name = f"probe-{secrets.token_hex(8)}"
        request = GenerationRequest(
            name,
            self._prompt_ids,
            adapters,
            SamplingParams(temperature=0),
            max_tokens=1,
            cache_scope=name,
            prompt_logprobs=1,
        )
        async for output in self._engine.generate(request):
            if output.failure is not None:
                raise NotProbed(f"the prompt failed: {output.failure.message}")
            if output.prompt_logprobs is not None:
                return [each for each in output.prompt_logprobs if each is not None]
        raise NotProbed("the engine gave no log probabilities")


def _compared(
    base: Sequence[TokenLogprobs], adapted: Sequence[TokenLogprobs], seconds: float
) -> Probe:
    pairs = list(zip(base, adapted, strict=True))
    changes = [abs(a.logprob - b.logprob) for a, b in pairs]
    if not pairs or not all(map(math.isfinite, changes)):
        raise NotProbed("the log probabilities are not finite")
    num_top_changed = sum(_top(a) != _top(b) for a, b in pairs)
    mean = sum(changes) / len(changes)
    return Probe(len(pairs), mean, max(changes), num_top_changed, round(seconds, 4))


def _top(entry: TokenLogprobs) -> int:
    return entry.top[0][0] if entry.top else entry.token_id
