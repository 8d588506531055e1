"""Choose the next tokens of many rows with a few operations for all, and one read by the host.

For GPUs, where each row by itself would launch a dozen kernels and wait three times. Filters mean
what they mean in `sampler`. Knows no requests.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Draw:
    """What one row asks: filters as in `SamplingParams`, and its uniform number."""

    uniform: float
    temperature: float
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    @property
    def has_filter(self) -> bool:
        """Whether some tokens cannot be drawn."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0


def choose_together(logits: Tensor, highest: Tensor, draws: Sequence[Draw | None]) -> Tensor:
    """Return a token id for each row [rows, vocabulary]; None: its highest. Waits for nothing.

    A row that is not finite has any.
    """
    chosen = highest
    for has_filter in (False, True):  # those with filters are drawn from sorted weights
        found = [(i, draw) for i, draw in enumerate(draws) if draw is not None]
        own = [(i, draw) for i, draw in found if draw.has_filter is has_filter]
        if own:
            index = index_on([i for i, _ in own], logits.device)
            drawn = draw_on_device(logits[index], [draw for _, draw in own])
            chosen = chosen.index_copy(0, index, drawn)
    return chosen


def draw_together(logits: Tensor, draws: Sequence[Draw]) -> list[int]:
    """Return a token id for each row, as `draw_on_device` draws it."""
    tokens: list[int] = draw_on_device(logits, draws).tolist()
    return tokens


def draw_on_device(logits: Tensor, draws: Sequence[Draw]) -> Tensor:
    """Return a token id for each row [rows, vocabulary], each temperature above zero.

    Either all of them have filters, or none has: else company would change a row's draw.
    """
    assert len({draw.has_filter for draw in draws}) == 1
    num_rows = len(draws)
    if num_rows == 1:  # sums of a single row are not the same every time on a GPU
        logits, draws = logits.expand(2, -1), [*draws, *draws]
    temperatures = _column([draw.temperature for draw in draws], logits)
    weights = torch.softmax(logits.double() / temperatures, dim=-1)
    ids = None
    if draws[0].has_filter:
        weights, ids = weights.sort(descending=True, stable=True)
        weights = _filtered(weights, draws)
    cumulated = weights.cumsum(-1)
    targets = _column([draw.uniform for draw in draws], logits) * cumulated[:, -1:]
    found = torch.searchsorted(cumulated, targets, right=True)
    found = torch.minimum(found, _last_weighty(weights))
    chosen = found if ids is None else ids.gather(1, found)
    return chosen[:num_rows, 0]


def index_on(places: Sequence[int], device: torch.device) -> Tensor:
    """Bring indices to a device; nothing waits for what is queued there."""
    index = torch.tensor(places, dtype=torch.long, pin_memory=device.type == "cuda")
    return index.to(device, non_blocking=True)


def _filtered(weights: Tensor, draws: Sequence[Draw]) -> Tensor:
    """Zero what top_k, then top_p, then min_p leave out of sorted weights [rows, vocabulary]."""
    vocabulary = weights.shape[1]
    top_k = _column([draw.top_k or vocabulary for draw in draws], weights)
    ranks = torch.arange(vocabulary, device=weights.device)
    weights = weights.masked_fill(ranks >= top_k, 0)
    before = weights.cumsum(-1) - weights
    top_p = _column([draw.top_p for draw in draws], weights)
    is_out = (before >= top_p * weights.sum(-1, keepdim=True)) & (top_p < 1)
    is_out |= weights < _column([draw.min_p for draw in draws], weights) * weights[:, :1]
    return weights.masked_fill(is_out, 0)


def _last_weighty(weights: Tensor) -> Tensor:
    """Return the last index [rows, 1] of a weight above zero: rounding must not pass it."""
    ranks = torch.arange(weights.shape[1], device=weights.device)
    return torch.where(weights > 0, ranks, 0).amax(-1, keepdim=True)


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    # out of pageable memory a transfer would wait for all that is queued before it
    column = torch.tensor(values, dtype=torch.float64, pin_memory=like.is_cuda)
    return column.to(like.device, non_blocking=True)[:, None]
