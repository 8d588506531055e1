"""What is remembered of one HTTP request until it ends: for the log, and for traces.

Filled on its way by whoever knows; handed to the observers once, at the end. Texts of prompts are
in it only where the operator asked for them.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(slots=True)
class GenerationRecord:
    """What a generation adds: who answered, how much, and how long each stage took (seconds).

    `queue_s` lasts from arrival to the first schedule, `ttft_s` to the first token, both as the
    engine measured them for the first choice that got one; None: not reached.
    """

    model: str
    is_chat: bool = False
    digests: tuple[str, ...] = ()
    num_choices: int = 1
    outcome: str = ""
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_generated_tokens: int = 0
    finish_reasons: tuple[str, ...] = ()
    queue_s: float | None = None
    ttft_s: float | None = None
    prompts: tuple[str, ...] | None = None


@dataclass(slots=True)
class RequestRecord:
    """One request; `route` is its template, `arrived_at` in seconds since 1970."""

    id: str
    method: str
    path: str
    traceparent: str = ""
    route: str = ""
    status: int = 500
    error_code: str = ""
    tenant: str = ""
    duration_s: float = 0.0
    arrived_at: float = field(default_factory=time.time)
    generation: GenerationRecord | None = None

    @property
    def is_failure(self) -> bool:
        """Whether the server failed: by status, or in a stream whose status was already sent."""
        is_broken_off = self.generation is not None and self.generation.outcome == "error"
        return self.status >= 500 or is_broken_off


RequestObserver = Callable[[RequestRecord], None]
