"""One request while the engine works on it."""

import time
from dataclasses import dataclass, field

from quickchange_adapters.pool import Slot

from quickchange_server.engine.request import GenerationRequest, TokenLogprobs


@dataclass(slots=True, eq=False)
class Sequence:
    """A request's tokens, how far their KV is computed, and what it holds.

    | state | `blocks` | `slots` | where |
    |---|---|---|---|
    | waiting (also after a preemption) | none | none | the scheduler's waiting line |
    | prefill: several tokens left to compute | held | held | running |
    | decode: one token left to compute | held | held | running |
    | ended | none | none | nowhere |
    """

    request: GenerationRequest
    seed: int
    token_ids: list[int]
    end_ids: frozenset[int] = frozenset()
    num_computed: int = 0
    num_cached: int = 0
    blocks: list[int] = field(default_factory=list)
    block_keys: list[bytes] = field(default_factory=list)
    slots: tuple[Slot, ...] = ()
    passed_since: int | None = None
    last_step: int = 0
    arrival_s: float = field(default_factory=time.monotonic)
    scheduled_s: float | None = None
    first_token_s: float | None = None
    prompt_logprobs: list[TokenLogprobs | None] = field(default_factory=list)

    @property
    def request_id(self) -> str:
        """Id of the request."""
        return self.request.request_id

    @property
    def num_prompt(self) -> int:
        """Tokens of the prompt."""
        return len(self.request.prompt_ids)

    @property
    def num_generated(self) -> int:
        """Tokens generated so far."""
        return len(self.token_ids) - self.num_prompt

    @property
    def num_pending(self) -> int:
        """Tokens whose KV is still to be computed; 1 in decode."""
        return len(self.token_ids) - self.num_computed

    @property
    def generated_ids(self) -> list[int]:
        """Tokens generated so far."""
        return self.token_ids[self.num_prompt :]

    @classmethod
    def from_request(
        cls, request: GenerationRequest, seed: int, end_ids: frozenset[int]
    ) -> "Sequence":
        """Make a waiting sequence; `end_ids` end its answer (the model's and its own)."""
        return cls(request, seed, list(request.prompt_ids), end_ids)
