"""What whoever loads adapters tells whoever measures it. Called on the event loop."""

from typing import Protocol

from quickchange_server.adapter_views import Tier


class LoadObserver(Protocol):
    """Sink of measurements; must not block and must not raise."""

    def on_hit(self, tier: Tier) -> None:
        """Take note of a request, and of where it found its adapter's bytes."""

    def on_load(self, from_tier: Tier, to_tier: Tier, seconds: float) -> None:
        """Take note of one adapter that was brought from one tier to another."""

    def on_load_failure(self, code: str) -> None:
        """Take note of one that could not be brought; `code` is the error's."""


class NoLoadObserver:
    """Observer that forgets."""

    def on_hit(self, tier: Tier) -> None:
        """Do nothing."""

    def on_load(self, from_tier: Tier, to_tier: Tier, seconds: float) -> None:
        """Do nothing."""

    def on_load_failure(self, code: str) -> None:
        """Do nothing."""
