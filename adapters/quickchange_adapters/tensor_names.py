"""What each tensor of a PEFT file is: names to modules and roles. Knows no shapes, no base."""

from collections.abc import Mapping
from dataclasses import dataclass

from quickchange_adapters.errors import Problem
from quickchange_adapters.header import TensorEntry

PREFIX = "base_model.model."

# Role in ModuleTensors -> how PEFT ends the name. The first that fits counts.
_SUFFIXES = (
    (".lora_A.weight", "lora_a"),
    (".lora_B.weight", "lora_b"),
    (".lora_embedding_A", "lora_a"),
    (".lora_embedding_B", "lora_b"),
    (".lora_B.bias", "added_bias"),
    (".base_layer.bias", "replaced_bias"),
    (".base_layer.weight", "frozen"),
    (".bias", "replaced_bias"),
)

# Tensors of PEFT that belong to other methods: part of the name -> what it belongs to.
_OTHER_METHODS = {
    ".lora_magnitude_vector": "DoRA",
    ".lora_E": "AdaLoRA",
    ".lora_diag": "KaSA",
    ".trainable_tokens_delta": "trained tokens",
}


@dataclass(slots=True)
class ModuleTensors:
    """The tensors found for one module.

    Attributes:
        lora_a: [rank, in].
        lora_b: [out, rank].
        added_bias: [out], of lora_B (`lora_bias`).
        replaced_bias: [out], stands for the base's (`bias`).
        frozen: the base's own weight, which PEFT adds for the embedding and the head.
        is_embedding: whether the pair is named as PEFT names an embedding's.
    """

    lora_a: TensorEntry | None = None
    lora_b: TensorEntry | None = None
    added_bias: TensorEntry | None = None
    replaced_bias: TensorEntry | None = None
    frozen: TensorEntry | None = None
    is_embedding: bool = False

    @property
    def has_pair(self) -> bool:
        """Whether at least one half of a low-rank pair is there."""
        return self.lora_a is not None or self.lora_b is not None


def sort_tensors(
    tensors: Mapping[str, TensorEntry],
) -> tuple[dict[str, ModuleTensors], list[Problem]]:
    """Return the tensors by module, and a problem for each that has no role."""
    modules: dict[str, ModuleTensors] = {}
    problems: list[Problem] = []
    for name, entry in sorted(tensors.items()):
        suffix, role = next((s for s in _SUFFIXES if name.endswith(s[0])), ("", ""))
        module = name[len(PREFIX) : -len(suffix)] if suffix else ""
        if not name.startswith(PREFIX) or not module:
            problems.append(_stray_tensor(name))
            continue
        found = modules.setdefault(module, ModuleTensors())
        if getattr(found, role) is not None:
            problems.append(_twice(name, module))
            continue
        setattr(found, role, entry)
        found.is_embedding |= suffix.startswith(".lora_embedding")
    return modules, problems


def _twice(name: str, module: str) -> Problem:
    message = f"tensor {name[:200]!r} is a second one of its kind for module {module[:200]!r}"
    return Problem("weights_invalid", name[:200], message)


def _stray_tensor(name: str) -> Problem:
    where = name[:200]
    for part, what in _OTHER_METHODS.items():
        if part in name:
            message = f"tensor {where!r} belongs to {what}, which is not served"
            return Problem("config_unsupported", where, message)
    return Problem(
        "weights_invalid",
        where,
        f"tensor {where!r} is not part of a LoRA adapter",
        f"names are {PREFIX}<module>.lora_A.weight and …lora_B.weight, as PEFT writes them",
    )
