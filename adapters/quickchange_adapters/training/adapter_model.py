"""The adapter around the base, as PEFT makes it, and its two files.

Everything is PEFT's own; what is ours is which of its settings a recipe means.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quickchange_adapters.config import read_config
from quickchange_adapters.errors import CannotTrain, Problem
from quickchange_adapters.training.recipe import ALL_LINEAR, ATTENTION, AdapterSettings
from quickchange_adapters.training.run_folder import replace_file

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
SEED_OF_SHARED_MATRICES = 0
MIN_ADALORA_STEPS = 2
_NEVER_LEARNED = ("ranknum",)
"""AdaLoRA's rank as a tensor: PEFT does not write it, yet has it learned on a base in bfloat16."""
_ATTENTION_NAMES = ("q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj", "c_attn", "query_key_value")


@dataclass(frozen=True, slots=True)
class ParameterCount:
    """How many numbers are learned, of how many."""

    trainable: int
    total: int

    def __str__(self) -> str:
        """Say it as people read it."""
        share = 100 * self.trainable / self.total
        return f"{self.trainable:,} of {self.total:,} parameters are trained ({share:.2f} %)"


def with_adapter(base: Any, settings: AdapterSettings, num_steps: int) -> Any:
    """Return the base with a fresh adapter, in the base's number format.

    Raises: CannotTrain.
    """
    from peft import get_peft_model

    if settings.method == "adalora" and num_steps < MIN_ADALORA_STEPS:
        raise CannotTrain(
            f"adalora chooses its ranks as it goes, and needs {MIN_ADALORA_STEPS} steps at least"
        )
    config = peft_config(settings, target_names(base, settings.targets), num_steps)
    try:
        model = get_peft_model(base, config, autocast_adapter_dtype=False)
    except ValueError as error:
        raise CannotTrain(f"PEFT cannot make this adapter: {error}") from error
    frozen = (*_NEVER_LEARNED, *(("lora_A",) if settings.frozen_a else ()))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(base.dtype)
            parameter.requires_grad_(not any(part in name for part in frozen))
    return model


def peft_config(settings: AdapterSettings, targets: list[str], num_steps: int) -> Any:
    """Return PEFT's config of what a recipe asks for."""
    from peft import AdaLoraConfig, LoraConfig, VeraConfig

    common: dict[str, Any] = {"target_modules": targets, "task_type": "CAUSAL_LM"}
    if settings.method == "vera":
        return VeraConfig(
            r=settings.rank,
            vera_dropout=settings.dropout,
            projection_prng_key=SEED_OF_SHARED_MATRICES,
            **common,
        )
    common |= {"lora_alpha": settings.alpha, "lora_dropout": settings.dropout}
    if settings.method == "adalora":
        return AdaLoraConfig(
            init_r=settings.rank + (settings.rank + 1) // 2,
            target_r=settings.rank,
            tinit=num_steps // 10,
            tfinal=num_steps // 3,
            total_step=num_steps,
            **common,
        )
    is_dora = settings.method == "dora"
    return LoraConfig(r=settings.rank, use_dora=is_dora, use_rslora=settings.rslora, **common)


def target_names(base: Any, targets: str | tuple[str, ...]) -> list[str]:
    """Return the last parts of the names of the blocks' linears that are meant, sorted.

    Raises: CannotTrain when a name is not there.
    """
    head = base.get_output_embeddings()
    found: dict[str, None] = {}
    for name, module in base.named_modules():
        if _is_linear(module) and module is not head:
            found[name.rpartition(".")[2]] = None
    names = list(found)
    if targets == ALL_LINEAR:
        return names
    if targets == ATTENTION:
        targets = tuple(name for name in names if name in _ATTENTION_NAMES)
        if not targets:
            raise CannotTrain(f"no linear of this base is known as attention; it has: {names}")
        return list(targets)
    missing = [name for name in targets if name.rpartition(".")[2] not in names]
    if missing:
        raise CannotTrain(f"adapter.targets: the base has no linear {missing[0]!r}; it has {names}")
    return list(targets)


def _is_linear(module: Any) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def count_parameters(model: Any) -> ParameterCount:
    """Return how many parameters are trained, of how many."""
    return ParameterCount(*model.get_nb_trainable_parameters())


def unserved(settings: AdapterSettings) -> tuple[Problem, ...]:
    """Return why an upload would be refused for its config, by the check of uploads itself."""
    config = config_values(peft_config(settings, ["any"], num_steps=100), None)
    return read_config(json.dumps(config).encode()).problems


def config_values(config: Any, base_name: str | None) -> dict[str, Any]:
    """Return adapter_config.json, with sorted targets and without this machine's paths."""
    values: dict[str, Any] = json.loads(json.dumps(config.to_dict(), default=_plain))
    targets = values["target_modules"]
    return values | {
        "base_model_name_or_path": base_name,
        "inference_mode": True,
        "target_modules": sorted(targets) if isinstance(targets, list) else targets,
    }


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, set) else getattr(value, "value", str(value))


def adapter_tensors(model: Any, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the tensors of adapter_model.safetensors."""
    from peft import get_peft_model_state_dict

    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    return {name: tensor.detach().to(dtype).contiguous().clone() for name, tensor in state.items()}


def write_adapter(
    folder: Path, config: Mapping[str, Any], tensors: dict[str, Tensor], task: Mapping[str, Any]
) -> None:
    """Write the three files of an adapter, each complete before it takes its name.

    Raises: CannotTrain when the disk does not take them.
    """
    from safetensors.torch import save

    folder.mkdir(parents=True, exist_ok=True)
    replace_file(folder / WEIGHTS, save(tensors, metadata={"format": "pt"}))
    _write_json(folder / CONFIG, config)
    write_task(folder, task)


def write_task(folder: Path, task: Mapping[str, Any]) -> None:
    """Write the task of an adapter.

    Raises: CannotTrain when the disk does not take it.
    """
    _write_json(folder / "task.json", task)


def _write_json(file: Path, values: Mapping[str, Any]) -> None:
    text = json.dumps(values, indent=2, ensure_ascii=False) + "\n"
    replace_file(file, text.encode())
