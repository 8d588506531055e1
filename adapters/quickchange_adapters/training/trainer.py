"""One optimizer step a batch, and the loss on held-out rows. Knows no files."""

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
from torch import Tensor

from quickchange_adapters.training.adalora_ranks import AdaloraRanks
from quickchange_adapters.training.master_weights import MasterWeights
from quickchange_adapters.training.packing import Pack, packs
from quickchange_adapters.training.prompt_form import TokenRow
from quickchange_adapters.training.recipe import LoopSettings

Batch = list[TokenRow]

Learned = dict[str, Any]
"""`masters`: the learned numbers by name; `rank_pattern`: the ranks that AdaLoRA keeps."""


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one step did. `loss`: nats a token of the answers; `num_tokens`: computed."""

    loss: float
    num_tokens: int
    learning_rate_share: float


class Trainer:
    """Owns the model and its master weights."""

    def __init__(self, model: Any, settings: LoopSettings, num_steps: int) -> None:
        self.model = model
        self.weights = MasterWeights(model, settings, num_steps)
        self._settings = settings
        self._ranks = AdaloraRanks(model)
        if settings.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()

    def step(self, number: int, batch: Batch) -> StepResult:
        """Learn from one batch, as step `number` from 1."""
        self.model.train()
        num_targets = sum(len(row.answer_ids) for row in batch)
        total, num_tokens = 0.0, 0
        for each in packs(batch, self._settings.pack_tokens):
            loss = loss_sum(self.model, each) / num_targets
            torch.autograd.backward(loss)
            total += loss.item()
            num_tokens += each.num_tokens
        if self._ranks.are_allocated:
            torch.autograd.backward(orthogonality_loss(self.model))
        share = self.weights.step(number)
        if self._ranks.are_allocated:
            self._ranks.allocate(number)
            self.weights.take_over_zeros()
        self.model.zero_grad()
        return StepResult(total, num_tokens, share)

    def learned(self) -> Learned:
        """Return what is learned, as it is now."""
        return {"masters": self.weights.copy(), "rank_pattern": self._ranks.pattern}

    def take_over(self, learned: Learned) -> None:
        """Go back to what was learned at an earlier time."""
        self._ranks.keep(learned["rank_pattern"])
        self.weights.take_over(learned["masters"])

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint needs."""
        optimizer = self.weights.optimizer_state()
        return {"learned": self.learned(), "optimizer": optimizer, "ranks": self._ranks.state()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from what `state` returned."""
        self.take_over(state["learned"])
        self.weights.load_optimizer_state(state["optimizer"])
        self._ranks.load_state(state["ranks"])

    def loss(self, rows: Sequence[TokenRow]) -> float:
        """Return the mean loss of the answers' tokens of held-out rows."""
        return held_out_loss(self.model, rows, self._settings.pack_tokens)


@torch.no_grad()
def held_out_loss(model: Any, rows: Sequence[TokenRow], pack_tokens: int) -> float:
    """Return the mean loss of the answers' tokens, in nats, without learning from them."""
    model.eval()
    ordered = sorted(rows, key=len)
    total = sum(loss_sum(model, each).item() for each in packs(ordered, pack_tokens))
    return total / sum(len(row.answer_ids) for row in rows)


def loss_sum(model: Any, each: Pack) -> Tensor:
    """Return the summed cross-entropy of a pack's answer tokens; logits only where they count."""
    logits = answer_logits(model, each)
    return torch.nn.functional.cross_entropy(logits.float(), each.targets, reduction="sum")


def answer_logits(model: Any, each: Pack) -> Tensor:
    """Return the logits [targets, vocabulary] that predict a pack's answer tokens."""
    hidden = torch.zeros(each.may_see.shape, dtype=model.dtype)
    hidden.masked_fill_(~each.may_see, torch.finfo(model.dtype).min)
    output = model(
        input_ids=each.input_ids,
        position_ids=each.position_ids,
        attention_mask=hidden,
        logits_to_keep=each.answer_places,
        use_cache=False,
    )
    logits: Tensor = output.logits[0]
    return logits


def orthogonality_loss(model: Any) -> Tensor:
    """Return AdaLoRA's pull of A's rows and B's columns towards orthogonality (2303.10512, 3.1)."""
    weight = model.peft_config["default"].orth_reg_weight
    terms = []
    for name, parameter in model.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            matrix = parameter.float() if "lora_A" in name else parameter.float().T
            unit = torch.eye(matrix.shape[0])
            terms.append(torch.linalg.matrix_norm(matrix @ matrix.T - unit))
    pull: Tensor = weight * torch.stack(terms).mean()
    return pull


def plan_batches(rows: Sequence[TokenRow], settings: LoopSettings, seed: int) -> list[Batch]:
    """Return every batch of the run: each epoch all rows, by length, in random order of batches."""
    num_steps = max(1, round(settings.epochs * len(rows) / settings.batch_rows))
    num_steps = min(num_steps, settings.max_steps or num_steps)
    rng = Random(seed)
    batches: list[Batch] = []
    while len(batches) < num_steps:
        batches += _batches_by_length(rng, rows, settings.batch_rows)
    return batches[:num_steps]


def _batches_by_length(rng: Random, rows: Sequence[TokenRow], batch_rows: int) -> list[Batch]:
    """Shuffle, sort stretches of eight batches by length, cut them, and shuffle the batches."""
    shuffled = list(rows)
    rng.shuffle(shuffled)
    stretch = 8 * batch_rows
    batches: list[Batch] = []
    for start in range(0, len(shuffled), stretch):
        part = sorted(shuffled[start : start + stretch], key=len)
        batches += [part[i : i + batch_rows] for i in range(0, len(part), batch_rows)]
    rng.shuffle(batches)
    return batches
