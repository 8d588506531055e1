"""One set of rotary frequencies for the engine, where a model would choose by sequence length.

`longrope` and `dynamic` embeddings look at the longest sequence of a call. In a mixed batch that
would let one request change another's answer, so the choice is made once, for the context length
that is served, and stays.
"""

import logging
from typing import Any

import torch
from torch import nn

log = logging.getLogger(__name__)
LENGTH_DEPENDENT = ("longrope", "dynamic")


def freeze_rope(model: nn.Module, max_model_len: int) -> None:
    """Fix every length-dependent rotary embedding for contexts of `max_model_len`, in place."""
    for module in model.modules():
        rope_type = getattr(module, "rope_type", None)
        if isinstance(rope_type, str) and rope_type in LENGTH_DEPENDENT:
            module.rope_type = _freeze(module, rope_type, None, max_model_len)  # type: ignore[assignment]
        elif isinstance(rope_type, dict):
            for layer_type, kind in rope_type.items():
                if kind in LENGTH_DEPENDENT:
                    rope_type[layer_type] = _freeze(module, kind, layer_type, max_model_len)


def _freeze(module: Any, rope_type: str, layer_type: str | None, max_model_len: int) -> str:
    """Compute the frequencies once; the returned type is one that no call recomputes."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    prefix = "" if layer_type is None else f"{layer_type}_"
    buffer = getattr(module, f"{prefix}inv_freq")
    keywords = {} if layer_type is None else {"layer_type": layer_type}
    inv_freq, scaling = ROPE_INIT_FUNCTIONS[rope_type](
        module.config, buffer.device, seq_len=max_model_len, **keywords
    )
    with torch.no_grad():
        buffer.copy_(inv_freq)
    setattr(module, f"{prefix}attention_scaling", scaling)
    log.info("rotary embedding %s fixed for contexts of %d tokens", rope_type, max_model_len)
    return "fixed"
