"""A Hugging Face model with one adapter merged into it: what PEFT's `merge_and_unload` gives.

Sums are computed in float32 and rounded once, where PEFT rounds the update first. Changes the model
that it is given; a server's base is never given to it.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from quickchange_adapters.base_spec import BaseSpec, ModuleSpec
from quickchange_adapters.errors import AdapterRefused
from quickchange_adapters.finite import all_finite
from quickchange_adapters.limits import AdapterLimits
from quickchange_adapters.loading import load_weights
from quickchange_adapters.weights import AdapterWeights, LoraPair
from torch import Tensor, nn

from quickchange_server.adapter_source import AdapterFiles
from quickchange_server.engine.base_model import (
    block_linears,
    check_config,
    path_of,
    values_sha256,
)
from quickchange_server.errors import CannotExport

OnModule = Callable[[int, int], None]
"""Called with how many modules are done, and how many there are."""


def load_model(folder: Path, dtype: str) -> Any:
    """Load a base's folder, unchanged. Raises: UnsupportedBase, CannotExport."""
    from transformers import AutoModelForCausalLM

    check_config(folder)
    wanted: Any = dtype if dtype == "auto" else getattr(torch, dtype)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            str(folder), dtype=wanted, local_files_only=True
        )
    except Exception as error:  # any of the families' own ways of saying no
        raise CannotExport(f"cannot load {str(folder)!r}: {error}") from error
    return model.eval().requires_grad_(False)


def read_adapter(files: AdapterFiles, model: Any) -> AdapterWeights:
    """Read an adapter's tensors in float32, checked against the model. Raises: CannotExport."""
    config = model.config.get_text_config()
    specs = module_specs(model)
    spec = BaseSpec("base", "", config.model_type, int(config.num_hidden_layers), specs)
    limits = AdapterLimits(max_rank=1 << 16)  # it was trained; nobody else shares this process
    try:
        return load_weights(files.config, files.weights, spec, "", torch.float32, limits)
    except AdapterRefused as error:
        problems = "; ".join(f"{each.where}: {each.message}" for each in error.problems[:5])
        raise CannotExport(f"{files.name} does not fit this base: {problems}") from error
    except OSError as error:
        raise CannotExport(f"{files.name} cannot be read: {error.strerror or error}") from error


def module_specs(model: Any) -> dict[str, ModuleSpec]:
    """Return what adapters may target in an unchanged Hugging Face model."""
    specs = {linear.path: linear.spec for linear in block_linears(model)}
    for kind, module in (
        ("lm_head", model.get_output_embeddings()),
        ("embedding", model.get_input_embeddings()),
    ):
        if type(module) in (nn.Linear, nn.Embedding):
            rows, width = module.weight.shape
            sizes = (width, rows) if kind == "lm_head" else (rows, width)
            has_bias = getattr(module, "bias", None) is not None
            sha256 = values_sha256(module.weight.data)
            path = path_of(model, module)
            specs[path] = ModuleSpec(kind, *sizes, has_bias, sha256)  # type: ignore[arg-type]
    return specs


@torch.no_grad()
def merge_into(model: Any, weights: AdapterWeights, on_module: OnModule) -> None:
    """Add an adapter's updates to a model's own weights, in place.

    Raises: CannotExport when a sum is not finite, or no such model can hold it.
    """
    _untie(model, weights)
    changes = list(_changes(model, weights))
    for index, change in enumerate(changes, start=1):
        changed = change.value().to(change.parameter.dtype)
        if not all_finite(changed):
            raise CannotExport(f"merged, {change.path} is not finite in {changed.dtype}")
        change.parameter.data = changed.contiguous()
        on_module(index, len(changes))


@dataclass(frozen=True, slots=True)
class Change:
    """A parameter that changes, and what computes its new value in float32."""

    path: str
    parameter: nn.Parameter
    value: Callable[[], Tensor]


def _changes(model: Any, weights: AdapterWeights) -> Iterator[Change]:
    for path, pair in weights.pairs.items():
        module = model.get_submodule(path)
        yield Change(path, module.weight, partial(_merged_weight, module, pair))
    for path, bias in weights.added_biases.items():
        own = _bias_of(model, path)
        yield Change(path, own, partial(_sum, own, bias))
    for path, bias in weights.replaced_biases.items():
        yield Change(path, _bias_of(model, path), bias.float)


def _merged_weight(module: Any, pair: LoraPair) -> Tensor:
    """Return W + B·A as the module stores it: Conv1D and embeddings, the other way round."""
    from transformers.pytorch_utils import Conv1D

    delta = pair.lora_b.float() @ pair.lora_a.float()
    weight: Tensor = module.weight.float()
    return weight + (delta.t() if isinstance(module, Conv1D | nn.Embedding) else delta)


def _sum(own: Tensor, bias: Tensor) -> Tensor:
    return own.float() + bias.float()


def _bias_of(model: Any, path: str) -> nn.Parameter:
    bias: nn.Parameter | None = getattr(model.get_submodule(path), "bias", None)
    if bias is None:
        raise CannotExport(
            f"the adapter gives {path} a bias, and models of this family have none there: "
            "keep it as an adapter"
        )
    return bias


def _untie(model: Any, weights: AdapterWeights) -> None:
    """Part head and embedding where only one of them changes, or each by its own."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or head.weight is not embedding.weight:
        return
    if {path_of(model, head), path_of(model, embedding)} & weights.pairs.keys():
        head.weight = nn.Parameter(embedding.weight.data.clone(), requires_grad=False)
        model.config.get_text_config().tie_word_embeddings = False
        model.config.tie_word_embeddings = False
