"""The frozen base that an adapter is trained on: read from its folder, rounded if asked for."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quickchange_adapters.errors import CannotTrain

GROUP = 64
"""Weights of one input group share a scale when they are rounded to 4 bits."""


def fast_number_format(wanted: str) -> torch.dtype:
    """Return what to compute in. `auto`: bfloat16 where the processor multiplies it natively."""
    if wanted != "auto":
        return torch.bfloat16 if wanted == "bfloat16" else torch.float32
    has_bfloat16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if has_bfloat16 else torch.float32


def load_base(folder: Path, dtype: torch.dtype, bits: int) -> Any:
    """Return the base with all its weights frozen, the blocks' linears rounded to `bits`.

    Raises: CannotTrain.
    """
    from transformers import AutoModelForCausalLM

    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CannotTrain(f"the base in {folder} cannot be read: {reason}") from error
    model.requires_grad_(False)
    if bits != 16:
        round_linears(model, bits)
    return model


def context_length(config: Any) -> int:
    """Return how many tokens a row may have: the context, or a shorter sliding window.

    Packed rows see all of their own tokens, which a window that is shorter would not allow.
    """
    longest = int(getattr(config, "max_position_embeddings", None) or 1 << 20)
    window = getattr(config, "sliding_window", None)
    is_used = getattr(config, "use_sliding_window", True)
    return min(longest, int(window)) if window and is_used else longest


@torch.no_grad()
def round_linears(model: Any, bits: int) -> None:
    """Replace the weights of the blocks' linears by what `bits` can hold, still stored dense.

    This shows what a base of fewer bits does to quality. It saves no memory and no time.
    """
    head = model.get_output_embeddings()
    for module in model.modules():
        if isinstance(module, nn.Linear) and module is not head:
            module.weight.copy_(rounded(module.weight.float(), bits))


def rounded(weight: Tensor, bits: int) -> Tensor:
    """Return a weight [out, in] at the nearest values that integers with scales can hold.

    8 bits: a scale for each output. 4 bits: a scale for each output and group of 64 inputs.
    """
    highest = (1 << (bits - 1)) - 1
    outputs, inputs = weight.shape
    size = GROUP if bits == 4 and inputs % GROUP == 0 else inputs
    groups = weight.reshape(outputs, -1, size)
    scale = (groups.abs().amax(-1, keepdim=True) / highest).clamp(min=1e-12)
    return ((groups / scale).round().clamp(-highest, highest) * scale).reshape(outputs, inputs)
