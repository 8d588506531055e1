"""Rows of a batch side by side in one sequence, so that no padding is computed.

What all rows begin with (a system message, say) stands there once, and every row sees it. Logits
are taken only where an answer's token is predicted.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quickchange_adapters.training.prompt_form import TokenRow


@dataclass(frozen=True, slots=True)
class Pack:
    """Some rows as one sequence.

    input_ids, position_ids [1, tokens]; may_see [1, 1, tokens, tokens], query before key;
    answer_places [targets]: tokens whose logits predict `targets` [targets].
    """

    input_ids: Tensor
    position_ids: Tensor
    may_see: Tensor
    answer_places: Tensor
    targets: Tensor

    @property
    def num_tokens(self) -> int:
        """How many tokens the model computes."""
        return self.input_ids.shape[1]


def shared_prefix_length(rows: Sequence[TokenRow]) -> int:
    """Return how many tokens all prompts begin with; the last of a prompt is never counted."""
    longest = min(len(row.prompt_ids) for row in rows) - 1
    return next((i for i in range(longest) if len({r.prompt_ids[i] for r in rows}) > 1), longest)


def packs(rows: Sequence[TokenRow], max_tokens: int) -> Iterator[Pack]:
    """Yield rows in packs of at most `max_tokens` tokens; a longer row is a pack of its own."""
    prefix = shared_prefix_length(rows) if len(rows) > 1 else 0
    waiting: list[TokenRow] = []
    num_tokens = prefix
    for row in rows:
        own = len(row) - 1 - prefix
        if waiting and num_tokens + own > max_tokens:
            yield pack(waiting, prefix)
            waiting, num_tokens = [], prefix
        waiting.append(row)
        num_tokens += own
    yield pack(waiting, prefix)


def pack(rows: Sequence[TokenRow], prefix: int) -> Pack:
    """Return rows whose prompts have the first `prefix` tokens in common as one sequence."""
    ids = list(rows[0].prompt_ids[:prefix])
    positions = list(range(prefix))
    owners = [0] * prefix
    places: list[int] = []
    for number, row in enumerate(rows, start=1):
        own = [*row.prompt_ids[prefix:], *row.answer_ids[:-1]]
        end = len(ids) + len(own)
        places += range(end - len(row.answer_ids), end)
        ids += own
        positions += range(prefix, prefix + len(own))
        owners += [number] * len(own)
    return Pack(
        torch.tensor([ids]),
        torch.tensor([positions]),
        _may_see(torch.tensor(owners)),
        torch.tensor(places),
        torch.tensor([token for row in rows for token in row.answer_ids]),
    )


def _may_see(owners: Tensor) -> Tensor:
    """Return who sees whom: itself and before, in its own row or in what all rows share."""
    is_same = (owners[:, None] == owners[None]) | (owners[None] == 0)
    return (is_same & torch.ones_like(is_same).tril())[None, None]
