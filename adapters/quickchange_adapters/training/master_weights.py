"""The learned parameters in float32 beside the model's own copies, and the optimizer on them.

With a model in bfloat16 the forward pass runs on rounded copies, which is what is served later;
small steps still add up in float32.
"""

import math
from typing import Any

import torch
from torch import Tensor

from quickchange_adapters.training.recipe import LoopSettings

_B_NAMES = ("lora_B", "lora_embedding_B", "vera_lambda_b")


class MasterWeights:
    """Owns the optimizer. `step` takes the model's gradients and refreshes the model."""

    def __init__(self, model: Any, settings: LoopSettings, num_steps: int) -> None:
        self._settings = settings
        self._num_steps = num_steps
        named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        self._parameters = [parameter for _, parameter in named]
        self.masters = {name: parameter.detach().float().clone() for name, parameter in named}
        groups = [self._group(is_b) for is_b in (False, True)]
        groups = [group for group in groups if group["params"]]
        self._optimizer = torch.optim.AdamW(groups, weight_decay=settings.weight_decay)

    def _group(self, is_b: bool) -> dict[str, Any]:
        rate = self._settings.learning_rate
        if is_b and self._settings.learning_rate_b is not None:
            rate = self._settings.learning_rate_b
        chosen = [t for n, t in self.masters.items() if any(b in n for b in _B_NAMES) == is_b]
        return {"params": chosen, "lr": rate, "peak": rate}

    def step(self, number: int) -> float:
        """Learn from the model's gradients as step `number` (from 1); return the rate's share.

        The model's gradients stay for whoever wants to see them.
        """
        for parameter, master in zip(self._parameters, self.masters.values(), strict=True):
            gradient = parameter.grad
            master.grad = torch.zeros_like(master) if gradient is None else gradient.float()
        torch.nn.utils.clip_grad_norm_(list(self.masters.values()), self._settings.max_grad_norm)
        share = learning_rate_share(number, self._num_steps, self._settings.warmup_share)
        for group in self._optimizer.param_groups:
            group["lr"] = share * group["peak"]
        self._optimizer.step()
        self._optimizer.zero_grad()
        self.refresh_model()
        return share

    @torch.no_grad()
    def refresh_model(self) -> None:
        """Copy the masters into the model."""
        for parameter, master in zip(self._parameters, self.masters.values(), strict=True):
            parameter.copy_(master)

    @torch.no_grad()
    def take_over_zeros(self) -> None:
        """Set to zero what was set to zero in the model (singular values that AdaLoRA dropped)."""
        for parameter, master in zip(self._parameters, self.masters.values(), strict=True):
            master.masked_fill_(parameter == 0, 0.0)

    @torch.no_grad()
    def take_over(self, values: dict[str, Tensor]) -> None:
        """Set the masters and the model to values of an earlier time."""
        for name, master in self.masters.items():
            master.copy_(values[name])
        self.refresh_model()

    def copy(self) -> dict[str, Tensor]:
        """Return the masters as they are now."""
        return {name: master.detach().clone() for name, master in self.masters.items()}

    def optimizer_state(self) -> dict[str, Any]:
        """Return what a checkpoint needs of the optimizer."""
        return self._optimizer.state_dict()

    def load_optimizer_state(self, state: dict[str, Any]) -> None:
        """Go on from what `optimizer_state` returned."""
        self._optimizer.load_state_dict(state)


def learning_rate_share(number: int, num_steps: int, warmup_share: float) -> float:
    """Return the share of the peak rate at step `number` from 1: a rise, then half a cosine."""
    warmup = math.ceil(num_steps * warmup_share)
    if number <= warmup:
        return number / warmup
    return 0.5 * (1 + math.cos(math.pi * (number - 1 - warmup) / max(1, num_steps - warmup)))
