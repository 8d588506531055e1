"""Perplexity by the engine: Hugging Face's in float32, another in int8."""

import asyncio
from pathlib import Path

import pytest
import torch

from benchmarks.perplexity import TextScore, score_plain, score_served, score_table

WINDOWS = [tuple(range(3, 35)), tuple(range(60, 28, -1))]


def test_float32_is_what_hugging_face_says(tiny_base: Path) -> None:
    plain = score_plain(tiny_base, WINDOWS)
    served = asyncio.run(score_served(tiny_base, "float32", WINDOWS))
    assert served.logprobs.shape == (2 * 31,)
    assert torch.allclose(served.logprobs, plain.logprobs, atol=1e-4)
    assert served.perplexity == pytest.approx(plain.perplexity, rel=1e-4)


def test_the_table_compares_with_the_first() -> None:
    even = TextScore("even", torch.full((4,), -1.0, dtype=torch.float64))
    worse = TextScore("worse", torch.full((4,), -1.5, dtype=torch.float64))
    table = score_table([even, worse])
    assert "2.718" in table
    assert "+64.87 %" in table
