"""What came of the systems: figures of every round, or the reason why there are none; the tables.

Ratios are medians of the ratios of single rounds, as a machine's speed drifts between rounds.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import isnan
from statistics import median
from typing import Any

from benchmarks.report import Row, markdown_table
from benchmarks.timing import Figures, median_figures
from benchmarks.workload import Scenario

DETAIL_HEADER = (
    "scenario",
    "system",
    "tokens/s out (lowest–highest)",
    "TTFT p50 / p99 ms",
    "ITL p50 / p99 ms",
    "TPOT p50 ms",
    "server cores",
)


@dataclass(slots=True)
class Outcome:
    """One system's rounds, per scenario and in order, and what stopped it."""

    runs: dict[Scenario, list[Figures]] = field(default_factory=dict)
    failures: dict[Scenario, str] = field(default_factory=dict)

    def add(self, scenario: Scenario, figures: Figures) -> None:
        """Take note of one round of a scenario."""
        self.runs.setdefault(scenario, []).append(figures)

    def fail(self, scenarios: Sequence[Scenario], reason: str) -> None:
        """Take note of why these scenarios are not measured any more; the first reason stays."""
        for scenario in scenarios:
            self.failures.setdefault(scenario, " ".join(reason.split()))

    def unfailed(self, scenarios: Sequence[Scenario]) -> list[Scenario]:
        """Return the scenarios that are still worth running."""
        return [scenario for scenario in scenarios if scenario not in self.failures]

    def tokens_per_s(self, scenario: Scenario) -> list[float]:
        """Return the throughput of each round."""
        return [figures.tokens_per_s for figures in self.runs.get(scenario, ())]


Outcomes = Mapping[str, Outcome]


def ratio(ours: Outcome, theirs: Outcome, scenario: Scenario) -> float | None:
    """Return how many times as many tokens per second we gave; None where a side has none."""
    pairs = zip(ours.tokens_per_s(scenario), theirs.tokens_per_s(scenario), strict=False)
    ratios = [own / other for own, other in pairs]
    return median(ratios) if ratios else None


def ratio_table(outcomes: Outcomes, own: str, scenarios: Sequence[Scenario]) -> str:
    """Return a row per scenario: tokens per second of all, and ours against each and the best."""
    peers = [name for name in outcomes if name != own]
    header = ["tokens/s out", own]
    for peer in peers:
        header += [peer, f"{own} / {peer}"]
    rows = [_ratio_row(outcomes, own, peers, scenario) for scenario in scenarios]
    return markdown_table([*header, f"{own} / best peer"], rows)


def _ratio_row(outcomes: Outcomes, own: str, peers: Sequence[str], scenario: Scenario) -> Row:
    cells = [scenario.title, _rate(outcomes[own], scenario)]
    ratios: dict[str, float] = {}
    for peer in peers:
        found = ratio(outcomes[own], outcomes[peer], scenario)
        if found is not None:
            ratios[peer] = found
        cells += [_rate(outcomes[peer], scenario), "–" if found is None else f"{found:.2f}×"]
    best = min(ratios, key=lambda peer: ratios[peer], default=None)
    return [*cells, "–" if best is None else f"{ratios[best]:.2f}× ({best})"]


def _rate(outcome: Outcome, scenario: Scenario) -> str:
    rates = outcome.tokens_per_s(scenario)
    return f"{median(rates):.1f}" if rates else "not measured"


def detail_table(outcomes: Outcomes, scenarios: Sequence[Scenario]) -> str:
    """Return a row per scenario and system, with the reason where it was not measured."""
    rows = [
        _detail_row(scenario, name, outcome)
        for scenario in scenarios
        for name, outcome in outcomes.items()
    ]
    return markdown_table(DETAIL_HEADER, rows)


def _detail_row(scenario: Scenario, name: str, outcome: Outcome) -> Row:
    runs = outcome.runs.get(scenario)
    reason = outcome.failures.get(scenario, "it was not run").replace("|", "\\|")
    if not runs:
        return (scenario.title, name, f"not measured: {reason}", *["–"] * 4)
    middle, rates = median_figures(runs), outcome.tokens_per_s(scenario)
    rate = f"{middle.tokens_per_s:.1f} ({min(rates):.1f}–{max(rates):.1f})"
    if scenario in outcome.failures:
        rate += f"; {len(runs)} rounds, then: {reason}"
    return (
        scenario.title,
        name,
        rate,
        f"{_number(1e3 * middle.ttft_p50_s, 0)} / {_number(1e3 * middle.ttft_p99_s, 0)}",
        f"{_number(1e3 * middle.itl_p50_s, 1)} / {_number(1e3 * middle.itl_p99_s, 1)}",
        _number(1e3 * middle.tpot_p50_s, 1),
        _number(middle.server_cores, 2),
    )


def _number(value: float, num_digits: int) -> str:
    return "–" if isnan(value) else f"{value:.{num_digits}f}"


def outcome_results(
    outcomes: Outcomes, own: str, scenarios: Sequence[Scenario]
) -> list[dict[str, Any]]:
    """Return the same for JSON, with every round."""
    return [
        {
            "scenario": scenario.label,
            "system": name,
            "runs": [asdict(run) for run in outcome.runs.get(scenario, ())],
            "failure": outcome.failures.get(scenario),
            "ratio": ratio(outcomes[own], outcome, scenario),
        }
        for scenario in scenarios
        for name, outcome in outcomes.items()
    ]
