"""Sampling: greedy, filters, reproducible draws, penalties, log probabilities."""

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from quickchange_server.engine.batch_sampler import choose_together
from quickchange_server.engine.cuda_graphs import Decoded
from quickchange_server.engine.request import GenerationRequest, SamplingParams
from quickchange_server.engine.sampler import draw_of, sample, uniform
from quickchange_server.engine.sequence import Sequence


def sequence_of(seed: int = 0, generated: tuple[int, ...] = (), **params: Any) -> Sequence:
    fields = {k: params.pop(k) for k in ("min_tokens", "choice") if k in params}
    request = GenerationRequest("r", (1, 2, 3), (), SamplingParams(**params), **fields)
    sequence = Sequence.from_request(request, seed, frozenset({0}))
    sequence.token_ids.extend(generated)
    return sequence


def draws(logits: torch.Tensor, num: int = 4000, **params: Any) -> Counter[int]:
    rows = logits.expand(num, -1)
    results = sample(rows, [sequence_of(seed, **params) for seed in range(num)])
    return Counter(r.token_id for r in results if r.token_id is not None)


def test_temperature_zero_takes_the_largest() -> None:
    logits = torch.randn(3, 50)
    results = sample(logits, [sequence_of(temperature=0)] * 3)
    assert [r.token_id for r in results] == logits.argmax(-1).tolist()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_softmax(temperature: float) -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    counts = draws(logits, temperature=temperature)
    expected = torch.softmax(logits / temperature, -1)
    observed = torch.tensor([counts[i] / 4000 for i in range(4)])
    assert (observed - expected).abs().max() < 0.03


def test_filters_keep_only_what_they_allow() -> None:
    logits = torch.log(torch.tensor([0.4, 0.3, 0.2, 0.1]))
    assert set(draws(logits, top_k=2)) == {0, 1}
    assert set(draws(logits, top_p=0.5)) == {0, 1}
    assert set(draws(logits, top_p=0.35)) == {0}
    assert set(draws(logits, min_p=0.45)) == {0, 1, 2}
    assert set(draws(logits, top_k=3, top_p=0.4)) == {0}
    counts = draws(logits, top_k=2)
    assert abs(counts[0] / 4000 - 4 / 7) < 0.03


def test_top_p_reaches_beyond_the_first_candidates() -> None:
    logits = torch.zeros(5000)
    counts = draws(logits, num=300, top_p=0.9)
    assert len(counts) > 200


def test_a_draw_depends_on_seed_choice_and_position_alone() -> None:
    logits = torch.randn(1, 1000)
    again = [sample(logits, [sequence_of(7)])[0].token_id for _ in range(3)]
    assert len(set(again)) == 1
    others = torch.randn(5, 1000)
    batch = sample(torch.cat([others, logits]), [sequence_of(i) for i in (1, 2, 3, 4, 5, 7)])
    assert batch[-1].token_id == again[0]
    numbers = {uniform(s, c, p) for s in range(8) for c in range(8) for p in range(8)}
    assert len(numbers) == 512
    assert 0.4 < sum(numbers) / 512 < 0.6


def test_a_row_that_is_not_finite_has_no_token_and_leaves_its_neighbours() -> None:
    logits = torch.randn(3, 20)
    logits[1, 4] = float("nan")
    results = sample(logits, [sequence_of(temperature=0)] * 3)
    assert results[1].token_id is None
    assert results[0].token_id == int(logits[0].argmax())
    assert results[2].token_id == int(logits[2].argmax())


def test_penalties_and_bias() -> None:
    logits = torch.tensor([[1.0, 5.0, 4.9, 4.8]])

    def choose(**params: Any) -> int | None:
        generated = params.pop("generated", ())
        return sample(logits, [sequence_of(0, generated, temperature=0, **params)])[0].token_id

    assert choose() == 1
    assert choose(logit_bias=((3, 2.0),)) == 3
    assert choose(logit_bias=((1, -100.0),)) == 2
    assert choose(generated=(1,), presence_penalty=0.15) == 2
    assert choose(generated=(1, 1), frequency_penalty=0.06) == 2
    assert choose(generated=(1,), frequency_penalty=0.06) == 1
    assert choose(repetition_penalty=1.5) == 1  # every token but 0 is in the prompt
    assert logits[0, 1] == 5.0


def test_end_tokens_are_barred_before_min_tokens() -> None:
    logits = torch.tensor([[9.0, 1.0, 2.0, 3.0]])
    early, late = (sequence_of(0, ids, temperature=0, min_tokens=2) for ids in ((), (1, 1)))
    assert sample(logits, [early])[0].token_id == 3
    assert sample(logits, [late])[0].token_id == 0


def test_logprobs_are_the_models_own() -> None:
    logits = torch.randn(1, 30)
    expected = torch.log_softmax(logits[0], -1)
    result = sample(logits, [sequence_of(3, logprobs=5, temperature=3.0)])[0]
    assert result.logprobs is not None
    assert result.logprobs.token_id == result.token_id
    assert result.logprobs.logprob == pytest.approx(float(expected[result.token_id or 0]))
    values, ids = expected.topk(5)
    assert [token for token, _ in result.logprobs.top] == ids.tolist()
    assert [value for _, value in result.logprobs.top] == pytest.approx(values.tolist())


@pytest.mark.parametrize("num", [1, 40])
def test_rows_drawn_together_get_the_tokens_that_each_gets_alone(num: int) -> None:
    filters: list[dict[str, Any]] = [
        {},
        {"top_k": 7},
        {"top_p": 0.6},
        {"min_p": 0.2},
        {"top_k": 30, "top_p": 0.5, "min_p": 0.1},
        {"temperature": 0},
        {"repetition_penalty": 1.5, "logit_bias": ((3, 2.0),)},
    ]
    generator = torch.Generator().manual_seed(num)
    logits = 3 * torch.randn(num, 400, generator=generator)
    if num > 2:
        logits[2, 5] = float("nan")
    for shift in range(len(filters)):
        sequences = [
            sequence_of(seed, (3, 4), **{"temperature": 0.8, **filters[(seed + shift) % 7]})
            for seed in range(num)
        ]
        alone = sample(logits, sequences, is_together=False)
        assert sample(logits, sequences, is_together=True) == alone


def test_a_row_that_cannot_be_drawn_hurts_only_itself() -> None:
    sequences = [sequence_of(seed, temperature=1.0) for seed in range(3)]
    sequences[1].request = replace(
        sequences[1].request, sampling=SamplingParams(logit_bias=((999, 1.0),))
    )
    results = sample(torch.randn(3, 20), sequences, is_together=True)
    assert [result.error is None for result in results] == [True, False, True]
    assert results[0].token_id is not None


def test_tokens_chosen_together_are_those_of_each_alone() -> None:
    torch.manual_seed(0)
    logits = torch.randn(7, 50)
    logits[2, 3], logits[5, 1], logits[6] = float("nan"), float("inf"), float("-inf")
    params: list[dict[str, Any]] = [
        {"temperature": 0},
        {"temperature": 0.7},
        {"temperature": 0},
        {"temperature": 1.3, "top_k": 4},
        {"temperature": 1.0, "top_p": 0.6, "min_p": 0.01},
        {"temperature": 1.0},
        {"temperature": 0.1},
    ]
    sequences = [sequence_of(index, (4, 5), **each) for index, each in enumerate(params)]
    draws = [draw_of(sequence, len(sequence.token_ids)) for sequence in sequences]
    decoded = Decoded.of(logits)
    chosen = choose_together(logits, decoded.highest, draws).tolist()
    alone = [result.token_id for result in sample(logits, sequences)]
    is_finite = decoded.is_finite.tolist()
    pairs = zip(chosen, is_finite, strict=True)
    assert [token if is_good else None for token, is_good in pairs] == alone
    assert alone.count(None) == 3
    assert all(0 <= token < 50 for token in chosen)
