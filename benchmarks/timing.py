"""Times of requests, and the figures made from them. Pure arithmetic; knows no clock.

All times are seconds. TTFT counts from the sending of a request; ITL is the gap between two pieces
of a stream; TPOT is the mean time per token after the first; E2E is the whole request.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from statistics import median


@dataclass(frozen=True, slots=True)
class RequestTiming:
    """One request as its client saw it: `piece_times_s` holds the arrivals of text."""

    started_s: float
    piece_times_s: tuple[float, ...]
    ended_s: float
    num_tokens: int

    @property
    def ttft_s(self) -> float:
        """Time to the first text; the whole request where none was shown."""
        return (self.piece_times_s[0] if self.piece_times_s else self.ended_s) - self.started_s

    @property
    def gaps_s(self) -> list[float]:
        """Gaps between neighbouring pieces."""
        times = self.piece_times_s
        return [after - before for before, after in zip(times, times[1:], strict=False)]

    @property
    def e2e_s(self) -> float:
        """Time from sending to the end of the answer."""
        return self.ended_s - self.started_s

    @property
    def tpot_s(self) -> float:
        """Mean time per token after the first."""
        return (self.e2e_s - self.ttft_s) / max(self.num_tokens - 1, 1)


@dataclass(frozen=True, slots=True)
class Figures:
    """What one run of one scenario showed. `*_cores` are CPU seconds per second of the run."""

    tokens_per_s: float
    ttft_p50_s: float
    ttft_p99_s: float
    itl_p50_s: float
    itl_p99_s: float
    tpot_p50_s: float
    e2e_p50_s: float
    e2e_p99_s: float
    tokens_per_piece: float
    client_cores: float = math.nan
    server_cores: float = math.nan


def percentile(values: Sequence[float], share: float) -> float:
    """Return the value below which `share` (0 to 1) of the values lie, by linear interpolation.

    NaN where there are no values.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"a percentile's share is from 0 to 1, not {share}")
    if not values:
        return math.nan
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    below, above = ordered[math.floor(place)], ordered[math.ceil(place)]
    return below + (above - below) * (place - math.floor(place))


def summarise(
    timings: Sequence[RequestTiming], client_cpu_s: float = math.nan, server_cpu_s: float = math.nan
) -> Figures:
    """Turn the requests of one run into figures; the run lasts from first sending to last end."""
    seconds = max(t.ended_s for t in timings) - min(t.started_s for t in timings)
    gaps = [gap for timing in timings for gap in timing.gaps_s]
    ttfts, e2es = [t.ttft_s for t in timings], [t.e2e_s for t in timings]
    num_tokens = sum(t.num_tokens for t in timings)
    num_pieces = sum(len(t.piece_times_s) for t in timings)
    return Figures(
        tokens_per_s=num_tokens / seconds,
        ttft_p50_s=percentile(ttfts, 0.5),
        ttft_p99_s=percentile(ttfts, 0.99),
        itl_p50_s=percentile(gaps, 0.5),
        itl_p99_s=percentile(gaps, 0.99),
        tpot_p50_s=percentile([t.tpot_s for t in timings], 0.5),
        e2e_p50_s=percentile(e2es, 0.5),
        e2e_p99_s=percentile(e2es, 0.99),
        tokens_per_piece=num_tokens / max(num_pieces, 1),
        client_cores=client_cpu_s / seconds,
        server_cores=server_cpu_s / seconds,
    )


def median_figures(runs: Sequence[Figures]) -> Figures:
    """Return the median of each figure over repeated runs."""
    return Figures(
        **{f.name: median(getattr(run, f.name) for run in runs) for f in fields(Figures)}
    )
