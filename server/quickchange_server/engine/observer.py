"""What the engine tells whoever measures it. Called on the engine thread."""

import logging
from dataclasses import dataclass
from typing import Literal, Protocol

StepKind = Literal["prefill", "decode", "mixed"]
StepWeights = Literal["base", "unmerged", "merged"]
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class StepStats:
    """One step: how long, how much, and on which weights.

    `num_rows` counts requests, `num_tokens` tokens through the model, `num_adapters` distinct
    adapters (the base is none), `num_preempted` requests sent back to wait;
    `prefix_queries`/`prefix_hits` count prompt tokens looked up and found when rows were admitted;
    `is_ahead`: launched before the last step's tokens were known, timed from that one's end.
    """

    kind: StepKind
    weights: StepWeights
    seconds: float
    num_rows: int
    num_tokens: int
    num_adapters: int
    num_preempted: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    is_ahead: bool = False


class EngineObserver(Protocol):
    """Sink of measurements; must not block and must not raise."""

    def on_step(self, stats: StepStats) -> None:
        """Take note of one finished step."""

    def on_activation(self, seconds: float) -> None:
        """Take note of one copy of an adapter from host memory to the device."""


class HarmlessObserver:
    """Passes on to an observer; what that raises is logged, and hurts no step."""

    def __init__(self, observer: EngineObserver) -> None:
        self._observer = observer

    def on_step(self, stats: StepStats) -> None:
        """Pass on."""
        try:
            self._observer.on_step(stats)
        except Exception:
            log.exception("an observer of steps failed")

    def on_activation(self, seconds: float) -> None:
        """Pass on."""
        try:
            self._observer.on_activation(seconds)
        except Exception:
            log.exception("an observer of copies failed")


class NoObserver:
    """Observer that forgets."""

    def on_step(self, stats: StepStats) -> None:
        """Do nothing."""

    def on_activation(self, seconds: float) -> None:
        """Do nothing."""
