"""What counting words alone reaches on labels: logistic regression over words and word pairs."""

import re
from collections.abc import Sequence

import torch
from torch import Tensor

from quickchange_adapters.training.answers import Answer
from quickchange_adapters.training.examples import Example

NAME = "logistic regression on words and word pairs"
_STEPS = 200
_DECAY = 1e-3


def word_answers(train: Sequence[Example], test: Sequence[Example]) -> list[Answer]:
    """Return the label of each test row that the words of the training rows speak for."""
    labels = sorted({example.answer for example in train})
    terms = sorted({term for example in train for term in _terms(example.input)})
    places = {term: place for place, term in enumerate(terms)}
    targets = torch.tensor([labels.index(example.answer) for example in train])
    weight, bias = _fit(_counts(train, places), targets, len(labels))
    chosen = (torch.sparse.mm(_counts(test, places), weight) + bias).argmax(1)
    return [Answer(labels[i], True) for i in chosen.tolist()]


def _fit(inputs: Tensor, targets: Tensor, num_labels: int) -> tuple[Tensor, Tensor]:
    weight = torch.zeros(inputs.shape[1], num_labels, requires_grad=True)
    bias = torch.zeros(num_labels, requires_grad=True)
    optimizer = torch.optim.Adam([weight, bias], lr=0.05)
    for _ in range(_STEPS):
        optimizer.zero_grad()
        scores = torch.sparse.mm(inputs, weight) + bias
        loss = torch.nn.functional.cross_entropy(scores, targets)
        torch.autograd.backward(loss + _DECAY * weight.square().sum())
        optimizer.step()
    return weight.detach(), bias.detach()


def _counts(examples: Sequence[Example], places: dict[str, int]) -> Tensor:
    """Return which known terms each row has: sparse [rows, terms]."""
    pairs = {
        (row, places[term])
        for row, example in enumerate(examples)
        for term in _terms(example.input)
        if term in places
    }
    index = torch.tensor(sorted(pairs), dtype=torch.long).reshape(-1, 2).T
    shape = (len(examples), len(places))
    return torch.sparse_coo_tensor(index, torch.ones(index.shape[1]), shape).coalesce()


def _terms(text: str) -> list[str]:
    words = re.findall(r"[^\W_]+(?:'\w+)?", text.lower())
    return words + [f"{a} {b}" for a, b in zip(words, words[1:], strict=False)]
