"""What AdaLoRA knows beside its weights: which ranks it keeps, and what it thinks of each weight.

Everything is PEFT's own; here it is handed out and put back, so that a run can go on.
Source: Zhang et al. 2023 (arXiv 2303.10512), section 3.2.
"""

from typing import Any

_AVERAGES = ("ipt", "exp_avg_ipt", "exp_avg_unc")

RankPattern = dict[str, list[bool]]
"""Which singular values of each module are kept."""


class AdaloraRanks:
    """The ranks of a PEFT model; of a model that is no AdaLoRA, nothing."""

    def __init__(self, model: Any) -> None:
        self._tuner = model.base_model
        self._config = model.peft_config["default"]
        self.are_allocated = hasattr(self._tuner, "update_and_allocate")

    def allocate(self, step: int) -> None:
        """Decide on the ranks from the gradients of a step, numbered from 1."""
        self._tuner.update_and_allocate(step)

    @property
    def pattern(self) -> RankPattern | None:
        """The ranks that are kept; None before any was dropped."""
        found: RankPattern | None = self._config.rank_pattern if self.are_allocated else None
        return None if found is None else {name: list(kept) for name, kept in found.items()}

    def keep(self, pattern: RankPattern | None) -> None:
        """Go back to the ranks of an earlier time."""
        if self.are_allocated:
            self._config.rank_pattern = pattern

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint needs."""
        if not self.are_allocated:
            return {}
        allocator = self._tuner.rankallocator
        return {name: dict(getattr(allocator, name)) for name in _AVERAGES}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from what `state` returned."""
        for name, averages in state.items():
            setattr(self._tuner.rankallocator, name, averages)
