"""The comparison with PEFT: near equality in float32, and a difference is seen."""

from argparse import Namespace
from pathlib import Path

import pytest
import torch

from benchmarks.agreement import Comparison, Predictions, Row, compare, run


@pytest.fixture(scope="module", params=[False, True], ids=["mixed", "merged"])
def comparisons(
    request: pytest.FixtureRequest, tiny_base: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, str], Comparison]:
    options = Namespace(
        adapter=[],
        ranks=[4, 8],
        rows=2,
        dtype="float32",
        kernels="auto",
        quantize=None,
        merged=request.param,
        device="cpu",
        prompt_tokens=20,
        tokens=6,
    )
    found = run(options, tiny_base, tmp_path_factory.mktemp("made"))
    return {(each.name, each.part): each for each in found}


def test_a_float32_engine_agrees_with_float32_peft(
    comparisons: dict[tuple[str, str], Comparison],
) -> None:
    for part, num_positions in (("prompt", 6 * 19), ("answer", 6 * 6)):
        found = comparisons["engine – PEFT float32", part]
        assert found.num_positions == num_positions
        assert found.argmax_agreement == 1
        assert found.max_difference < 1e-3


def test_bfloat16_is_further_away(comparisons: dict[tuple[str, str], Comparison]) -> None:
    exact = comparisons["engine – PEFT float32", "prompt"]
    rounded = comparisons["engine – PEFT bfloat16", "prompt"]
    assert rounded.mean_difference > 10 * exact.mean_difference


def test_differences_are_counted_where_they_are() -> None:
    ours = Predictions(torch.tensor([1, 2, 3, 4]), torch.tensor([-1.0, -1.0, -1.0, -1.0]))
    theirs = Predictions(
        torch.tensor([1, 9, 9, 4]),
        torch.tensor([-1.0, -1.5, -1.0, -3.0]),
        torch.tensor([5.0, 0.1, 0.5, 5.0]),
    )
    row = Row(None, (7, 7, 7), (7, 7, 7, 7, 7), ours)
    prompt, answer = compare("a – b", [row], [ours], [theirs])
    assert (prompt.num_positions, prompt.argmax_agreement, prompt.num_clear) == (2, 0.5, 0)
    assert (answer.num_positions, answer.argmax_agreement, answer.num_clear) == (2, 0.5, 1)
    assert (prompt.mean_difference, answer.max_difference) == (0.25, 2.0)
