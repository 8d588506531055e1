"""The start says that a GPU is of a kind that nothing was run on, and is silent on the others."""

import pytest
from quickchange_server.tried_gpus import untried_text


@pytest.mark.parametrize("name", ["NVIDIA H100 80GB HBM3", "NVIDIA H200"])
def test_nothing_is_said_of_gpus_that_it_was_run_on(name: str) -> None:
    assert untried_text(name, (9, 0)) is None


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (10, 0), (12, 0)])
def test_another_generation_is_named_with_what_to_do(capability: tuple[int, int]) -> None:
    text = untried_text("NVIDIA Other", capability) or ""
    major, minor = capability
    assert f"NVIDIA Other (compute capability {major}.{minor})" in text
    assert "H100 and H200" in text
    assert "--kernels plain" in text


def test_equal_numbers_of_another_maker_mean_nothing() -> None:
    text = untried_text("AMD Instinct", (9, 0), is_nvidia=False) or ""
    assert text.startswith("GPU: AMD Instinct: ")
