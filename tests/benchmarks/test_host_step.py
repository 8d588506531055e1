"""The host's part of a step: both ways are timed, over steps that take their own way."""

import pytest

pytest.importorskip("triton", reason="the tables are those of kernels that need Triton")

from benchmarks.host_step import Batch, idle_engine, measure


def test_both_ways_are_timed() -> None:
    (result,) = measure([Batch(2, 2, 16)], num_tokens=8, repeats=1)
    assert float(str(result["in turn"])) > 0
    assert float(str(result["ahead"])) > 0
    assert result["rows"] == 2


@pytest.mark.parametrize("is_ahead", [True, False])
def test_each_way_is_the_one_it_is_named_for(*, is_ahead: bool) -> None:
    engine = idle_engine(is_ahead=is_ahead)
    engine.run(Batch(2, 2, 16).rows(), 6, None)
    assert engine.num_ahead == (4 if is_ahead else 0)
