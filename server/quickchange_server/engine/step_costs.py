"""What a step costs on this machine, learned from the steps that ran.

    seconds ≈ fixed + decode·d + prompt·p + adapted decode·a + adapted prompt·b

`decode` and `prompt` are tokens through the model, `adapted` those of them that get deltas. The
fixed part is mostly the reading of the weights, which a second step pays again. The coefficients
fit the relative error of recent steps (older ones fade) and stay where they are in directions that
recent steps say nothing about. Knows no queues and no adapters.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

FADE = 0.998
"""What a step counts for after the next one: some five hundred steps are remembered."""
INERTIA = 0.02
"""How strongly a coefficient stays where it was, beside one step's evidence."""
FIT_EVERY = 16
NEEDED_STEPS = 24
SCALES = np.array([1.0, 16.0, 128.0, 16.0, 128.0])
"""Typical sizes, so that no coefficient is nearer to nothing than another."""


@dataclass(frozen=True, slots=True)
class StepLoad:
    """The work of one step, in tokens: all of them, and those of them that get deltas."""

    num_decode: int = 0
    num_prompt: int = 0
    num_adapted_decode: int = 0
    num_adapted_prompt: int = 0

    @property
    def has_deltas(self) -> bool:
        """Whether any token gets deltas."""
        return bool(self.num_adapted_decode or self.num_adapted_prompt)

    def __add__(self, other: "StepLoad") -> "StepLoad":
        return StepLoad(
            self.num_decode + other.num_decode,
            self.num_prompt + other.num_prompt,
            self.num_adapted_decode + other.num_adapted_decode,
            self.num_adapted_prompt + other.num_adapted_prompt,
        )

    def __sub__(self, other: "StepLoad") -> "StepLoad":
        return StepLoad(
            self.num_decode - other.num_decode,
            self.num_prompt - other.num_prompt,
            self.num_adapted_decode - other.num_adapted_decode,
            self.num_adapted_prompt - other.num_adapted_prompt,
        )

    @property
    def num_tokens(self) -> int:
        """All tokens."""
        return self.num_decode + self.num_prompt

    def without_deltas(self) -> "StepLoad":
        """Return the same tokens on a merged copy."""
        return StepLoad(self.num_decode, self.num_prompt)

    def features(self) -> NDArray[np.float64]:
        """Return what the coefficients are multiplied with, in units of `SCALES`."""
        sizes = (self.num_decode, self.num_prompt, self.num_adapted_decode, self.num_adapted_prompt)
        features: NDArray[np.float64] = np.array((1.0, *sizes)) / SCALES
        return features


class StepCosts:
    """Coefficients of the formula above. Lives on the engine thread."""

    def __init__(self) -> None:
        self._products = np.zeros((5, 5))
        self._targets = np.zeros(5)
        self._coefficients: NDArray[np.float64] = np.zeros(5)
        self._is_fitted = False
        self._typical_s = 0.0
        self._num_unfitted = 0
        self._num_seen = [0, 0]

    @property
    def is_known(self) -> bool:
        """Whether enough steps with deltas and without were seen to tell them apart."""
        return self._is_fitted and min(self._num_seen) >= NEEDED_STEPS

    @property
    def coefficients(self) -> dict[str, float]:
        """Seconds of the fixed part, and of a token of each kind."""
        names = ("fixed", "decode", "prompt", "adapted decode", "adapted prompt")
        return dict(zip(names, (self._coefficients / SCALES).tolist(), strict=True))

    def observe(self, load: StepLoad, seconds: float) -> None:
        """Learn from one finished step."""
        if seconds <= 0:
            return
        self._typical_s = FADE * (self._typical_s or seconds) + (1 - FADE) * seconds
        relative = load.features() / seconds
        self._products = FADE * self._products + np.outer(relative, relative)
        self._targets = FADE * self._targets + relative
        self._num_seen[load.has_deltas] += 1
        self._num_unfitted += 1
        if not self._is_fitted:
            # before anything is known a step's time is all fixed: then none is ever split
            least = min(seconds, float(self._coefficients[0]) or seconds)
            self._coefficients = np.array([least, 0.0, 0.0, 0.0, 0.0])
        if self._num_unfitted >= FIT_EVERY:
            self._fit()

    def predict(self, load: StepLoad) -> float:
        """Return a step's seconds; 0 before the first step."""
        return float(load.features() @ self._coefficients)

    def _fit(self) -> None:
        """Solve for coefficients that are not negative: those that would be are held at zero."""
        self._num_unfitted, self._is_fitted = 0, True
        inertia = INERTIA / self._typical_s**2
        products = self._products + inertia * np.eye(5)
        targets = self._targets + inertia * self._coefficients
        free = np.arange(5)
        solved = np.zeros(5)
        while len(free):
            found = np.linalg.solve(products[np.ix_(free, free)], targets[free])
            if (found >= 0).all():
                solved[free] = found
                break
            free = np.delete(free, found.argmin())
        self._coefficients = solved
