"""Choose the next tokens from logits. Draws depend on (seed, choice, position) and nothing else.

A draw is the inverse of the cumulated distribution at one uniform number, which a counter-based
hash makes from the key: no state, so a preempted or re-batched request goes on as if untouched.
Source of the hash: SplitMix64 (Steele et al. 2014, doi 10.1145/2660193.2660195).
"""

import logging
import math
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import torch
from torch import Tensor

from quickchange_server.engine.batch_sampler import Draw, draw_together
from quickchange_server.engine.logits import adjust_logits, needs_adjusting
from quickchange_server.engine.request import SamplingParams, TokenLogprobs
from quickchange_server.engine.sequence import Sequence

log = logging.getLogger(__name__)
_MASK = (1 << 64) - 1
_NUM_CANDIDATES = 256

FindHighest = Callable[[Tensor], tuple[list[float], list[int]]]
"""Finds the highest number of each row [rows, vocabulary], NaN if one is, and its place."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One row's result; token_id is None when its logits are not finite, or `error` says why."""

    token_id: int | None
    logprobs: TokenLogprobs | None = None
    error: str | None = None


def highest_of_rows(logits: Tensor) -> tuple[list[float], list[int]]:
    """Return each row's highest number, NaN if one is NaN, and where it is."""
    highest, places = logits.max(dim=-1)
    return highest.tolist(), places.tolist()


def sample(
    logits: Tensor,
    sequences: SequenceOf[Sequence],
    find_highest: FindHighest = highest_of_rows,
    *,
    is_together: bool | None = None,
) -> list[Sample]:
    """Choose one token per row; logits [rows, vocabulary] float32 are not changed.

    `is_together`: draw for all rows at once, which is faster on a GPU alone; None: there.
    """
    highest, greedy = find_highest(logits)
    tokens: dict[int, int] = {}
    if logits.device.type != "cpu" if is_together is None else is_together:
        finite = [row for row, each in enumerate(highest) if math.isfinite(each)]
        tokens = _draw_together(logits, finite, sequences)
    results = []
    for row, sequence in enumerate(sequences):
        if not math.isfinite(highest[row]):
            results.append(Sample(None))
            continue
        try:
            token_id = tokens.get(row)
            if token_id is None:
                token_id = _token(logits, row, greedy[row], sequence)
            num_top = sequence.request.sampling.logprobs
            entry = None if num_top is None else token_logprobs(logits[row], token_id, num_top)
            results.append(Sample(token_id, entry))
        except Exception as error:
            log.exception("sampling failed for request %s", sequence.request_id)
            results.append(Sample(None, error=type(error).__name__))
    return results


def _draw_together(
    logits: Tensor, rows: SequenceOf[int], sequences: SequenceOf[Sequence]
) -> dict[int, int]:
    """Draw for those of the rows that are not greedy; none, if that fails for any of them."""
    draws = {row: draw for row in rows if (draw := _draw(sequences[row])) is not None}
    tokens: dict[int, int] = {}
    try:
        for has_filter in (False, True):  # those with filters are drawn from sorted weights
            own = [row for row in draws if draws[row].has_filter is has_filter]
            if own:
                wanted = [adjust_logits(logits[row], sequences[row]) for row in own]
                found = draw_together(torch.stack(wanted), [draws[row] for row in own])
                tokens |= zip(own, found, strict=True)
    except Exception:
        log.exception("rows cannot be drawn together; each is tried by itself")
        return {}
    return tokens


def _is_drawn(sequence: Sequence) -> bool:
    return sequence.request.sampling.temperature > 0


def draw_of(sequence: Sequence, position: int) -> Draw | None:
    """Return how a request's token at a position is drawn; None: it is the highest."""
    if not _is_drawn(sequence):
        return None
    params = sequence.request.sampling
    number = uniform(sequence.seed, sequence.request.choice, position)
    return Draw(number, params.temperature, params.top_k, params.top_p, params.min_p)


def _draw(sequence: Sequence) -> Draw | None:
    return draw_of(sequence, len(sequence.token_ids))


def _token(logits: Tensor, row: int, greedy: int, sequence: Sequence) -> int:
    if _is_drawn(sequence) or needs_adjusting(sequence):
        return _choose(adjust_logits(logits[row], sequence), sequence)
    return greedy


def token_logprobs(logits: Tensor, token_id: int, num_top: int | None) -> TokenLogprobs | None:
    """Report one token of a row [vocabulary] under the model's own distribution."""
    if num_top is None:
        return None
    (entry,) = rows_logprobs(logits[None], [token_id], num_top)
    return entry


def rows_logprobs(logits: Tensor, token_ids: list[int], num_top: int) -> list[TokenLogprobs]:
    """Report one token for each row [rows, vocabulary]."""
    logprobs = torch.log_softmax(logits.float(), dim=-1)
    wanted = torch.tensor(token_ids, device=logits.device)[:, None]
    chosen = logprobs.gather(1, wanted)[:, 0].tolist()
    if num_top == 0:
        return [TokenLogprobs(*pair) for pair in zip(token_ids, chosen, strict=True)]
    values, ids = logprobs.topk(min(num_top, logprobs.shape[1]))
    tops = [
        tuple(zip(*row, strict=True)) for row in zip(ids.tolist(), values.tolist(), strict=True)
    ]
    return [TokenLogprobs(*entry) for entry in zip(token_ids, chosen, tops, strict=True)]


def uniform(seed: int, choice: int, position: int) -> float:
    """Return a number in [0, 1) that depends on its arguments alone."""
    state = _mix(seed & _MASK)
    state = _mix((state + choice) & _MASK)
    state = _mix((state + position) & _MASK)
    return (state >> 11) * 2.0**-53


def _mix(value: int) -> int:
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def _choose(logits: Tensor, sequence: Sequence) -> int:
    params = sequence.request.sampling
    if params.temperature <= 0:
        return int(logits.argmax())
    draw = uniform(sequence.seed, sequence.request.choice, len(sequence.token_ids))
    scaled = logits.double() / params.temperature
    if params.top_k == 0 and params.top_p >= 1 and params.min_p <= 0:
        return _inverse(torch.softmax(scaled, dim=-1).cumsum(-1), draw)
    probabilities, ids = _filtered(torch.softmax(scaled, dim=-1), params)
    return int(ids[_inverse(probabilities.cumsum(-1), draw)])


def _filtered(probabilities: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor]:
    """Keep the likeliest tokens that top_k, then top_p, then min_p allow: (values, ids)."""
    total = probabilities.shape[0]
    count = min(params.top_k or _NUM_CANDIDATES, total)
    values, ids = probabilities.topk(count)
    if not params.top_k and float(values.sum()) < params.top_p:
        values, ids = probabilities.sort(descending=True, stable=True)
    if params.top_p < 1:
        base = float(values.sum()) if params.top_k else 1.0
        before = values.cumsum(-1) - values
        values = values[before < params.top_p * base]
    if params.min_p > 0:
        values = values[values >= params.min_p * values[0]]
    return values, ids[: values.shape[0]]


def _inverse(cumulated: Tensor, draw: float) -> int:
    """Return the first index whose cumulated weight passes draw · total."""
    target = torch.tensor([draw * float(cumulated[-1])], dtype=cumulated.dtype)
    index = int(torch.searchsorted(cumulated, target.to(cumulated.device), right=True))
    return min(index, cumulated.shape[0] - 1)
