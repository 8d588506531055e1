"""What a panel of the dashboard is, and how its queries are written. Knows no panel."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

Kind = Literal["timeseries", "stat", "heatmap", "table", "bargauge"]
QUANTILES = (0.5, 0.9, 0.95, 0.99)
RATE = "[$__rate_interval]"
INSTANCE = 'instance=~"$instance"'


@dataclass(frozen=True, slots=True)
class Query:
    """A PromQL expression and how its series are called."""

    expr: str
    legend: str = ""


@dataclass(frozen=True, slots=True)
class Panel:
    """One picture. `empty_until`: what has to happen before it shows anything."""

    title: str
    queries: tuple[Query, ...]
    unit: str = "short"
    kind: Kind = "timeseries"
    text: str = ""
    width: int = 8
    is_stacked: bool = False
    empty_until: str | None = None


@dataclass(frozen=True, slots=True)
class Row:
    """Panels under one heading."""

    title: str
    panels: tuple[Panel, ...]


def metric(name: str, *matchers: str) -> str:
    """Return a selector of a metric on the chosen servers."""
    return f"quickchange_{name}{{{', '.join([INSTANCE, *matchers])}}}"


def rate(name: str, by: str = "", *matchers: str) -> str:
    """Return a counter's rate, summed over what is not in `by`."""
    return f"sum{f' by ({by})' if by else ''} (rate({metric(name, *matchers)}{RATE}))"


def percentiles(
    name: str, quantiles: Sequence[float] = QUANTILES, by: str = "", *matchers: str
) -> tuple[Query, ...]:
    """Return queries for quantiles of a histogram; `by`: more labels to keep apart."""
    buckets = rate(f"{name}_bucket", f"le, {by}" if by else "le", *matchers)
    what = "".join(f" {{{{{label}}}}}" for label in by.split(", ") if label)
    return tuple(
        Query(f"histogram_quantile({q}, {buckets})", f"p{100 * q:g}{what}") for q in quantiles
    )


def over(window: str, queries: Iterable[Query]) -> tuple[Query, ...]:
    """Return the same queries over a window of their own."""
    return tuple(replace(query, expr=query.expr.replace(RATE, window)) for query in queries)


def ratio(part: str, whole: str) -> str:
    """Return part / whole, 0 where there is nothing yet."""
    return f"({part}) / clamp_min({whole}, 1e-9)"


def memory(part: str) -> str:
    """Return a part of memory, summed over servers."""
    matcher = f'part="{part}"'
    return f"sum({metric('memory_bytes', matcher)})"
