"""A merge on request beside the unmerged adapter, and whether the base stayed as it was."""

from itertools import takewhile
from statistics import fmean

from benchmarks.gpu_server_api import Answer, Api
from benchmarks.gpu_server_findings import Check, Outcome
from benchmarks.workload import adapter_name

MERGED = adapter_name(3)
PROMPT_IDS = tuple(range(10, 58))
NUM_TOKENS = 24
LEAST_SAME = 0.9
"""Of the likeliest tokens after a merge rounded the matrices anew."""
FARTHEST = 0.15
"""Mean distance of log probabilities, for the same reason."""
NOTHING = 1e-3
"""Between two runs of the same work alone."""


class MergeChecks:
    """One adapter is merged and unmerged; `remember_base` is to be called before."""

    def __init__(self, api: Api, base: str) -> None:
        self._api = api
        self._base = base
        self._baseline: Answer | None = None
        self._unmerged: Answer | None = None

    def remember_base(self) -> None:
        """Keep what the base says now."""
        self._baseline = self._alone(self._base)

    def checks(self) -> dict[str, Check]:
        """Return the checks, to be run in this order."""
        return {
            "merge on request": self.merge,
            "merged answers": self.merged_answers,
            "unmerge, and the adapter is as before": self.unmerge,
            "the base is as at the start": self.base_again,
        }

    def merge(self) -> Outcome:
        """A copy is made, and its bytes are counted."""
        self._unmerged = self._alone(MERGED)
        reply = self._api.good("POST", f"/v1/adapters/{MERGED}/merge", json={})
        held = self._api.memory()["merged"]
        return f"{held >> 20} MiB; took {reply.body['seconds']:.2f} s", held > 0

    def merged_answers(self) -> Outcome:
        """Steps run on the copy; what they say differs by a rounding."""
        before = self._merged_steps()
        assert self._unmerged is not None
        merged = self._alone(MERGED)
        share, distance = likeness(self._unmerged, merged)
        steps = self._merged_steps() - before
        is_good = share >= LEAST_SAME and distance <= FARTHEST and steps > 0
        return f"{100 * share:.1f} % alike, {distance:.4f} apart, {steps:.0f} merged steps", is_good

    def unmerge(self) -> Outcome:
        """The copy's bytes come back, and the adapter answers as it did unmerged."""
        self._api.good("POST", f"/v1/adapters/{MERGED}/unmerge", json={})
        held = self._api.memory()["merged"]
        assert self._unmerged is not None
        share, distance = likeness(self._unmerged, self._alone(MERGED))
        return f"{held} bytes held, {distance:.6f} apart", not held and distance < NOTHING

    def base_again(self) -> Outcome:
        """The base answers as it did before anything was loaded or merged."""
        assert self._baseline is not None
        share, distance = likeness(self._baseline, self._alone(self._base))
        return f"{distance:.6f} apart", share == 1 and distance < NOTHING

    def _alone(self, model: str) -> Answer:
        return self._api.answer(model, PROMPT_IDS, NUM_TOKENS)

    def _merged_steps(self) -> float:
        value = self._api.metrics().total("quickchange_steps_total", weights="merged")
        return 0.0 if value != value else value


def likeness(one: Answer, other: Answer) -> tuple[float, float]:
    """Return the share of equal likeliest tokens, and the mean distance of log probabilities.

    Only places behind equal texts count: from the first different token on, two greedy answers go
    their own ways.
    """
    pairs = zip(one.tokens, other.tokens, strict=True)
    num_equal = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    places = range(min(num_equal, len(one.likeliest)))
    same = [one.likeliest[place] == other.likeliest[place] for place in places]
    apart = [abs(one.logprobs[place] - other.logprobs[place]) for place in places[: num_equal - 1]]
    return fmean(same), fmean(apart)
