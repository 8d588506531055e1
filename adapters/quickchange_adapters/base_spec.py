"""What an adapter must fit: the names and shapes of a base's linears, as plain data.

Torch-free and picklable, so that a check can run in a process that never loads torch.
"""

from dataclasses import dataclass
from typing import Literal

ModuleKind = Literal["linear", "conv1d", "embedding", "lm_head"]


@dataclass(frozen=True, slots=True)
class ModuleSpec:
    """One module an adapter may target.

    `linear`, `conv1d`, `lm_head`: lora_a [rank, in_features], lora_b [out_features, rank].
    `embedding`: in_features is the vocabulary, out_features the width. `values_sha256`: of the
    weight's values as little-endian float32, set for the head and the embedding, whose frozen copy
    PEFT puts into an adapter that targets them.
    """

    kind: ModuleKind
    in_features: int
    out_features: int
    has_bias: bool = False
    values_sha256: str | None = None


@dataclass(frozen=True, slots=True)
class BaseSpec:
    """The base as the checks see it.

    Attributes:
        name: served name of the base.
        digest: sha256 over its resident weights (hex).
        model_type: Hugging Face `model_type`.
        num_layers: number of blocks.
        modules: module path as in Hugging Face (`model.layers.0.self_attn.q_proj`) -> spec.
        known_as: what others call the same model, such as its id on the Hub.
    """

    name: str
    digest: str
    model_type: str
    num_layers: int
    modules: dict[str, ModuleSpec]
    known_as: tuple[str, ...] = ()
