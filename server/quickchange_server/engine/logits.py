"""Change a row's logits as its request asks, before temperature and filters.

Order: end ids barred before min_tokens, logit_bias, repetition penalty (over prompt and answer,
Keskar et al. 2019, arXiv 1909.05858), frequency and presence penalties (over the answer, OpenAI).
"""

from collections import Counter

import torch
from torch import Tensor

from quickchange_server.engine.sequence import Sequence


def needs_adjusting(sequence: Sequence) -> bool:
    """Whether any field of the request changes this step's logits."""
    params = sequence.request.sampling
    return bool(
        params.logit_bias
        or params.repetition_penalty != 1
        or params.presence_penalty
        or params.frequency_penalty
        or sequence.num_generated < sequence.request.min_tokens
    )


def adjust_logits(logits: Tensor, sequence: Sequence) -> Tensor:
    """Return one row's adjusted logits [vocabulary]; the row itself is not changed."""
    if not needs_adjusting(sequence):
        return logits
    logits = logits.clone()
    params = sequence.request.sampling
    if sequence.num_generated < sequence.request.min_tokens:
        barred = [token_id for token_id in sequence.end_ids if 0 <= token_id < logits.shape[0]]
        logits[barred] = float("-inf")
    for token_id, bias in params.logit_bias:
        logits[token_id] += bias
    if params.repetition_penalty != 1:
        _penalise_repetition(logits, sequence.token_ids, params.repetition_penalty)
    if params.presence_penalty or params.frequency_penalty:
        counts = Counter(sequence.generated_ids)
        if counts:
            index = torch.tensor(list(counts), device=logits.device)
            times = torch.tensor(list(counts.values()), dtype=logits.dtype, device=logits.device)
            logits[index] -= times * params.frequency_penalty + params.presence_penalty
    return logits


def _penalise_repetition(logits: Tensor, token_ids: list[int], penalty: float) -> None:
    index = torch.tensor(sorted(set(token_ids)), device=logits.device)
    chosen = logits[index]
    logits[index] = torch.where(chosen > 0, chosen / penalty, chosen * penalty)
