"""The frozen base that an adapter is trained on: read from its folder, rounded if asked for."""

import hashlib
import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quickchange_adapters.errors import CannotTrain

_SAMPLES = 64
_SAMPLE_BYTES = 4096
GROUP = 64
"""Weights of one input group share a scale when they are rounded to 4 bits."""


def fast_number_format(wanted: str) -> torch.dtype:
    """Return what to compute in. `auto`: bfloat16 where the processor multiplies it natively."""
    if wanted != "auto":
        return torch.bfloat16 if wanted == "bfloat16" else torch.float32
    has_bfloat16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if has_bfloat16 else torch.float32


def load_base(folder: Path, dtype: torch.dtype, bits: int = 16, storage: str = "dense") -> Any:
    """Return the base with all its weights frozen, the blocks' linears in `bits`.

    Raises: CannotTrain.
    """
    from transformers import AutoModelForCausalLM

    is_packed = bits != 16 and storage == "bitsandbytes"
    options = _bitsandbytes_options(dtype, bits) if is_packed else {}
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, local_files_only=True, **options
        )
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CannotTrain(f"the base in {folder} cannot be read: {reason}") from error
    model.requires_grad_(False)
    if bits != 16 and not is_packed:
        round_linears(model, bits)
    return model


def _bitsandbytes_options(dtype: torch.dtype, bits: int) -> dict[str, Any]:
    """Return how transformers is asked for a base that bitsandbytes holds: NF4, or int8."""
    from transformers import BitsAndBytesConfig

    if importlib.util.find_spec("bitsandbytes") is None:
        raise CannotTrain(
            'base_storage = "bitsandbytes" needs it: pip install "quickchange-server[bits]"; or '
            "leave it out: the base is then rounded, and held dense"
        )
    if bits == 8:
        config = BitsAndBytesConfig(load_in_8bit=True)
    else:
        config = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
        )
    return {"quantization_config": config, "device_map": "cpu"}


def weights_sample(folder: Path) -> bytes:
    """Return a digest of the weights' files: their sizes, and blocks spread over each.

    Reading all of a large base at each start would take minutes; training moves all of it.
    """
    digest = hashlib.sha256()
    for file in sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")]):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}\n".encode())
        with file.open("rb") as stream:
            for number in range(_SAMPLES):
                stream.seek(size * number // _SAMPLES)
                digest.update(stream.read(_SAMPLE_BYTES))
    return digest.digest()


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
