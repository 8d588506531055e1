"""Steps that fail while another one was launched behind them, or is launched behind another."""

from pathlib import Path

import pytest
from quickchange_server.engine import decode_launch
from quickchange_server.engine.decode_launch import DecodeLaunch

from tests.conftest import MakeAdapter
from tests.server.engine.conftest import peft_weights
from tests.server.engine.steps_ahead_bench import Bench, sampled
from tests.server.engine.test_engine import greedy, overflowing


def test_a_launch_that_fails_fails_its_own_step(tiny_base: Path) -> None:
    """What ran before it is handed out first."""
    bench = Bench.of(tiny_base)
    bench.runner.error = RuntimeError("no launch")
    bench.add(greedy("a", num=20), greedy("b", num=4))
    bench.run_to_end()
    bench.add(greedy("c"))
    bench.run_to_end()
    assert bench.ends() == {"a": "error", "b": "length", "c": "length"}
    failed = next(o for o in bench.outputs if o.failure)
    assert failed.failure is not None
    assert failed.failure.code == "step_failed"
    # the prompt's step, one in turn and two ahead are good; the third of them is not
    assert len(bench.tokens("a")) == 4
    assert bench.engine.blocks.num_used == 0


def test_a_launch_without_memory_is_tried_again_in_turn(tiny_base: Path) -> None:
    in_turn = Bench.of(tiny_base, is_ahead=False)
    bench = Bench.of(tiny_base)
    bench.runner.error = MemoryError()
    for each in (in_turn, bench):
        each.add(sampled("a", num=160), sampled("b", num=160, seed=6))
        each.run_to_end()
    assert bench.num_ahead > 80  # after as many steps of one row the budget has grown again
    assert bench.ends() == {"a": "length", "b": "length"}
    assert [bench.tokens(name) for name in "ab"] == [in_turn.tokens(name) for name in "ab"]


def fail_once(bench: Bench, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """Let the wait for the tokens of a step fail, behind which another one was launched."""

    def fail(self: DecodeLaunch) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(DecodeLaunch, "samples", fail)
        before = bench.num_ahead
        bench.step()
        assert bench.num_ahead == before + 1


def test_an_error_on_the_device_fails_that_step_and_the_one_behind_it(
    tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench.of(tiny_base)
    bench.add(greedy("a", num=20))
    for _ in range(5):
        bench.step()
    fail_once(bench, monkeypatch, RuntimeError("an illegal address"))
    assert bench.ends() == {"a": "error"}
    assert len(bench.tokens("a")) == 5
    bench.add(greedy("b"))
    bench.run_to_end()
    assert bench.ends()["b"] == "length"
    assert bench.engine.blocks.num_used == 0


def test_a_step_that_lacked_memory_is_computed_again_and_so_is_the_one_behind_it(
    tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_turn, bench = Bench.of(tiny_base, is_ahead=False), Bench.of(tiny_base)
    for each in (in_turn, bench):
        each.add(sampled("a", num=20), sampled("b", num=20, seed=6))
    for _ in range(5):
        bench.step()
    fail_once(bench, monkeypatch, MemoryError())
    for each in (in_turn, bench):
        each.run_to_end()
    assert bench.ends() == {"a": "length", "b": "length"}
    assert [bench.tokens(name) for name in "ab"] == [in_turn.tokens(name) for name in "ab"]


def test_a_row_that_is_not_finite_fails_alone_and_is_cleared(
    tiny_base: Path, make_adapter: MakeAdapter
) -> None:
    bench = Bench.of(tiny_base)
    bench.hold(overflowing(peft_weights(make_adapter(seed=1), "huge")))
    bench.add(greedy("bad", "huge", prompt_ids=(5,)), greedy("good", num=12, prompt_ids=(6,)))
    bench.run_to_end()
    assert bench.ends() == {"bad": "error", "good": "length"}
    failed = next(o.failure for o in bench.outputs if o.failure)
    assert failed.code == "non_finite"
    assert all(each[1:].isfinite().all() for each in bench.runner.storage.keys)


def test_a_draw_that_fails_ahead_is_made_in_turn(
    tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step behind is computed once more, with the same answers."""
    in_turn = Bench.of(tiny_base, is_ahead=False)
    bench = Bench.of(tiny_base)
    for each in (in_turn, bench):
        each.add(sampled("a", num=12), greedy("b", num=12))
    bench.step()
    bench.step()

    def fail(*values: object) -> None:
        raise RuntimeError("no memory to draw")

    with monkeypatch.context() as patch:
        patch.setattr(decode_launch, "choose_together", fail)
        before = bench.num_ahead
        bench.step()
        assert bench.num_ahead == before
    for each in (in_turn, bench):
        each.run_to_end()
    assert bench.num_ahead > before
    assert bench.ends() == {"a": "length", "b": "length"}
    assert [bench.tokens(name) for name in "ab"] == [in_turn.tokens(name) for name in "ab"]
