"""What every answer of a soak must be: Hugging Face and PEFT in float32, asked ahead, alone."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

NUM_TOKENS = 10
NEAR_TIE = 1e-3
"""Of the two best logits: below it merged and unmerged steps may differ."""
MIX_WEIGHT = 0.5
Ids = tuple[int, ...]
Mix = frozenset[int]
"""Indexes of adapters: none is the base, one is that adapter, two are a mix at half weight each."""


@dataclass(frozen=True, slots=True)
class Oracle:
    """The greedy tokens of each mix and prompt, up to the first near-tie; `texts` by token id."""

    prompts: tuple[Ids, ...]
    answers: dict[tuple[Mix, int], Ids]
    texts: Sequence[str]

    def check(self, mix: Iterable[int], prompt: int, answer: Sequence[str]) -> None:
        """Assert that an answer is how the oracle's begins."""
        expected = [self.texts[token] for token in self.answers[frozenset(mix), prompt]]
        same = min(len(expected), len(answer))
        assert list(answer[:same]) == expected[:same], (sorted(mix), prompt, answer, expected)


def ask_ahead(
    base: Path, folders: Sequence[Path], prompts: tuple[Ids, ...], texts: Sequence[str]
) -> Oracle:
    """Compute all answers: of the base, of each adapter, and of each mix of two."""
    model: Any = AutoModelForCausalLM.from_pretrained(str(base), dtype=torch.float32)
    answers = {(frozenset[int](), index): _greedy(model, ids) for index, ids in enumerate(prompts)}
    peft: Any = PeftModel.from_pretrained(model, str(folders[0]), adapter_name="0")
    for index, folder in enumerate(folders[1:], start=1):
        peft.load_adapter(str(folder), adapter_name=str(index))
    singles = [(index,) for index in range(len(folders))]
    for mix in (*singles, *combinations(range(len(folders)), 2)):
        _activate(peft, mix)
        for index, ids in enumerate(prompts[: 1 if len(mix) > 1 else None]):
            answers[frozenset(mix), index] = _greedy(peft, ids)
    return Oracle(prompts, answers, texts)


def _activate(peft: Any, mix: tuple[int, ...]) -> None:
    name = "-".join(map(str, mix))
    if len(mix) > 1:
        names, weights = list(map(str, mix)), [MIX_WEIGHT] * len(mix)
        peft.add_weighted_adapter(names, weights, name, combination_type="cat")
    peft.set_adapter(name)


@torch.inference_mode()
def _greedy(model: Any, ids: Ids) -> Ids:
    tokens = list(ids)
    for _ in range(NUM_TOKENS):
        logits = model(torch.tensor([tokens])).logits[0, -1]
        best = torch.topk(logits, 2)
        if float(best.values[0] - best.values[1]) < NEAR_TIE:
            break
        tokens.append(int(best.indices[0]))
    return tuple(tokens[len(ids) :])
