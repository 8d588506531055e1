"""Percentiles, and the figures of a run."""

import math
from statistics import quantiles

import pytest

from benchmarks.timing import RequestTiming, median_figures, percentile, summarise


def test_a_percentile_lies_between_its_neighbours() -> None:
    values = [4.0, 1.0, 3.0, 2.0]
    assert percentile(values, 0) == 1
    assert percentile(values, 1) == 4
    assert percentile(values, 0.5) == 2.5
    assert percentile(values, 0.9) == pytest.approx(3.7)


def test_percentiles_agree_with_the_standard_library() -> None:
    values = [float((7 * i) % 101) for i in range(101)]
    expected = quantiles(values, n=100, method="inclusive")
    assert [percentile(values, i / 100) for i in range(1, 100)] == pytest.approx(expected)


def test_no_values_have_no_percentile_and_a_wrong_share_is_refused() -> None:
    assert math.isnan(percentile([], 0.5))
    with pytest.raises(ValueError, match="from 0 to 1"):
        percentile([1.0], 50)


def test_a_request_is_timed_from_its_sending() -> None:
    timing = RequestTiming(10.0, (10.5, 10.7, 11.0), 11.25, num_tokens=4)
    assert timing.ttft_s == pytest.approx(0.5)
    assert timing.gaps_s == pytest.approx([0.2, 0.3])
    assert timing.e2e_s == pytest.approx(1.25)
    assert timing.tpot_s == pytest.approx(0.75 / 3)


def test_a_request_without_text_waits_to_its_end() -> None:
    timing = RequestTiming(1.0, (), 3.0, num_tokens=1)
    assert timing.ttft_s == timing.e2e_s == 2.0
    assert timing.tpot_s == 0


def test_a_run_lasts_from_the_first_sending_to_the_last_end() -> None:
    timings = [
        RequestTiming(0.0, (1.0, 2.0), 2.0, num_tokens=2),
        RequestTiming(1.0, (3.0, 4.0), 4.0, num_tokens=6),
    ]
    figures = summarise(timings, client_cpu_s=0.4, server_cpu_s=6.0)
    assert figures.tokens_per_s == 2.0
    assert figures.ttft_p50_s == 1.5
    assert figures.itl_p50_s == 1.0
    assert figures.e2e_p99_s == pytest.approx(2.99)
    assert figures.tokens_per_piece == 2.0
    assert figures.client_cores == pytest.approx(0.1)
    assert figures.server_cores == 1.5


def test_the_median_is_taken_figure_by_figure() -> None:
    runs = [
        summarise([RequestTiming(0.0, (first,), 2.0 * first, num_tokens=4)])
        for first in (1.0, 5.0, 2.0)
    ]
    middle = median_figures(runs)
    assert middle.ttft_p50_s == 2.0
    assert middle.tokens_per_s == 1.0
