"""Gaps of streams while something else is done."""

import time

import pytest

from benchmarks.failure import BenchmarkFailure
from benchmarks.swap_stall import Repeater, Stall, gaps_between, stall_of, stall_table
from benchmarks.timing import RequestTiming


def stream(*times_s: float) -> RequestTiming:
    return RequestTiming(0.0, times_s, times_s[-1], len(times_s))


def test_only_gaps_while_all_streams_run_count() -> None:
    first, second = stream(1, 5, 6, 7, 9, 10), stream(4, 6, 8, 9)
    stall = stall_of([first, second], [])
    assert stall.worst_gap_s == 2
    assert gaps_between(first.piece_times_s, 4, 9) == [(5, 6), (6, 7), (7, 9)]
    assert stall.itl_p50_s == 1.5


def test_only_what_was_done_wholly_meanwhile_counts() -> None:
    spans = [(3.0, 4.5), (4.5, 6.0), (7.0, 7.5), (8.5, 9.5)]
    stall = stall_of([stream(4, 6, 8, 9)], spans)
    assert stall.action_times_s == (1.5, 0.5)


def test_the_worst_gap_is_one_in_which_something_was_done() -> None:
    streams = [stream(0, 1, 2, 5, 6, 7.5, 8)]  # the longest gap is from 2 to 5
    assert stall_of(streams, []).worst_gap_s == 3
    assert stall_of(streams, [(6.2, 6.3), (7.6, 7.7)]).worst_gap_s == 1.5
    assert stall_of(streams, [(0.5, 0.6), (4.9, 5.1)]).worst_gap_s == 3
    with pytest.raises(BenchmarkFailure, match="nothing was done"):
        stall_of(streams, [(9.0, 9.5)])


def test_streams_that_never_ran_together_are_refused() -> None:
    with pytest.raises(BenchmarkFailure, match="raise --tokens"):
        stall_of([stream(1, 2), stream(3, 4)], [])


def test_the_table_has_medians_of_runs_and_the_worst_of_all() -> None:
    runs = [Stall((0.1, 0.3), 0.05, 0.06, worst) for worst in (0.1, 0.2, 0.4)]
    table = stall_table({"nothing": [Stall((), 0.05, 0.06, 0.07)], "swap": runs}).splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table[2:]]
    assert rows[0] == ["nothing", "–", "–", "50.0 / 60.0", "70 (70–70)", "1.4"]
    assert rows[1] == ["swap", "2", "200", "50.0 / 60.0", "200 (100–400)", "4.0"]


def test_an_action_repeats_until_the_block_ends() -> None:
    done: list[float] = []
    with Repeater(lambda: done.append(time.perf_counter()), pause_s=0.001) as repeater:
        deadline = time.monotonic() + 30
        while len(done) < 3 and time.monotonic() < deadline:
            time.sleep(0.001)
    num_done = len(done)
    assert num_done >= 3
    assert len(repeater.spans) == num_done
    for when, (begin, end) in zip(done, repeater.spans, strict=True):
        assert begin <= when <= end


def test_an_action_that_fails_fails_the_block() -> None:
    def fail() -> None:
        raise BenchmarkFailure("unload answered 409")

    repeater = Repeater(fail, pause_s=0)
    with pytest.raises(BenchmarkFailure, match="409"), repeater:
        repeater._thread.join(30)
