"""Packed rows: the same losses as each row by itself, for every family that is packed."""

from pathlib import Path
from typing import Any

import pytest
import torch
from quickchange_adapters.training.packing import packs, shared_prefix_length
from quickchange_adapters.training.prompt_form import TokenRow
from quickchange_adapters.training.trainer import held_out_loss, loss_sum
from transformers import AutoModelForCausalLM

from tests.conftest import save_tiny_base

BEGIN = (1, 7, 8, 9)
ROWS = [
    TokenRow((*BEGIN, 20, 21), (30, 2)),
    TokenRow((*BEGIN, 22, 23, 24, 25, 26), (31, 32, 33, 2)),
    TokenRow((*BEGIN, 20, 27), (2,)),
    TokenRow((*BEGIN, 40), (41, 42, 2)),
]


def loss_of_one(model: Any, row: TokenRow) -> float:
    """Return a row's summed loss as Hugging Face computes it."""
    ids = [*row.prompt_ids, *row.answer_ids]
    labels = [-100] * len(row.prompt_ids) + list(row.answer_ids)
    output = model(input_ids=torch.tensor([ids]), labels=torch.tensor([labels]))
    return float(output.loss) * len(row.answer_ids)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3_text", "gpt2"])
@pytest.mark.parametrize("max_tokens", [16, 1000])
@torch.no_grad()
def test_packed_rows_have_the_losses_of_rows_alone(
    family: str, max_tokens: int, tmp_path: Path
) -> None:
    base = save_tiny_base(tmp_path / family, family)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    expected = sum(loss_of_one(model, row) for row in ROWS)
    found = sum(loss_sum(model, each).item() for each in packs(ROWS, max_tokens))
    assert found == pytest.approx(expected, rel=1e-4)
    num_targets = sum(len(row.answer_ids) for row in ROWS)
    assert held_out_loss(model, ROWS, max_tokens) == pytest.approx(expected / num_targets, rel=1e-4)


def test_gradients_are_those_of_rows_alone(tiny_base: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    sum(loss_sum(model, each) for each in packs(ROWS, 1000)).backward()  # type: ignore[union-attr]
    weight = model.model.layers[0].self_attn.k_proj.weight
    packed = weight.grad.clone()
    model.zero_grad()
    for row in ROWS:
        ids = [*row.prompt_ids, *row.answer_ids]
        labels = [-100] * len(row.prompt_ids) + list(row.answer_ids)
        loss = model(input_ids=torch.tensor([ids]), labels=torch.tensor([labels])).loss
        (loss * len(row.answer_ids)).backward()
    assert torch.allclose(packed, weight.grad, rtol=1e-3, atol=1e-6)


def test_what_all_rows_begin_with_is_computed_once() -> None:
    assert shared_prefix_length(ROWS) == len(BEGIN)
    (one,) = packs(ROWS, 1000)
    assert one.num_tokens == len(BEGIN) + sum(len(row) - 1 - len(BEGIN) for row in ROWS)


def test_packs_hold_all_rows_in_order_under_the_ceiling() -> None:
    found = list(packs(ROWS, 16))
    assert len(found) > 1
    assert all(each.num_tokens <= 16 for each in found)
    targets = [token for each in found for token in each.targets.tolist()]
    assert targets == [token for row in ROWS for token in row.answer_ids]


def test_a_prompt_that_is_the_beginning_of_another_keeps_a_token_of_its_own() -> None:
    rows = [TokenRow((1, 2, 3), (4, 5)), TokenRow((1, 2, 3), (6, 5))]
    assert shared_prefix_length(rows) == 2
