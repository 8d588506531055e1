"""Read one version's files into the tensors that are served. Runs in a loader thread.

The scaling is folded into lora_b in float32 and rounded once, to the serving dtype.
"""

from io import BufferedReader
from pathlib import Path

import torch
from torch import Tensor

from quickchange_adapters.base_spec import BaseSpec
from quickchange_adapters.errors import AdapterRefused, Problem
from quickchange_adapters.finite import all_finite
from quickchange_adapters.header import HeaderRefused, TensorEntry, read_array
from quickchange_adapters.limits import AdapterLimits
from quickchange_adapters.structure import (
    BiasPlan,
    PairPlan,
    Structure,
    check_structure,
    copy_problem,
)
from quickchange_adapters.weights import AdapterWeights, LoraPair


def load_weights(
    config_path: Path,
    weights_path: Path,
    spec: BaseSpec,
    digest: str,
    dtype: torch.dtype,
    limits: AdapterLimits | None = None,
) -> AdapterWeights:
    """Return a version's tensors on the CPU in `dtype`.

    Everything but the numbers' worth is checked again: files may be older than this base.

    Raises: AdapterRefused, OSError.
    """
    structure = check_structure(config_path, weights_path, spec, limits or AdapterLimits())
    if structure.problems:
        raise AdapterRefused(structure.problems)
    try:
        with weights_path.open("rb") as file:
            _check_copies(file, structure)
            pairs = {plan.module: _load_pair(file, plan, dtype) for plan in structure.pairs}
            biases = {plan: _load_bias(file, plan) for plan in structure.biases}
    except HeaderRefused as error:
        raise AdapterRefused([Problem(error.code, error.where, error.message)]) from error
    added = {p.module: bias for p, bias in biases.items() if p.scaling is not None}
    replaced = {p.module: bias for p, bias in biases.items() if p.scaling is None}
    return AdapterWeights(digest, pairs, added, replaced)


def _check_copies(file: BufferedReader, structure: Structure) -> None:
    problems = [p for copy in structure.copies if (p := copy_problem(file, copy)) is not None]
    if problems:
        raise AdapterRefused(problems)


def _load_bias(file: BufferedReader, plan: BiasPlan) -> Tensor:
    """Return a bias in float32: what it is compared with or added to decides how it is rounded."""
    bias = _read_tensor(file, plan.entry).float()
    return bias if plan.scaling is None else bias * plan.scaling


def _load_pair(file: BufferedReader, plan: PairPlan, dtype: torch.dtype) -> LoraPair:
    lora_a = _read_tensor(file, plan.lora_a).to(dtype)
    lora_b = (_read_tensor(file, plan.lora_b).float() * plan.scaling).to(dtype)
    for entry, tensor in ((plan.lora_a, lora_a), (plan.lora_b, lora_b)):
        if not all_finite(tensor):
            message = f"tensor {entry.name!r} is not finite in {dtype}"
            raise AdapterRefused([Problem("not_finite", entry.name, message)])
    return LoraPair(lora_a, lora_b)


def _read_tensor(file: BufferedReader, entry: TensorEntry) -> Tensor:
    """Return the file's values in the file's dtype."""
    array = read_array(file, entry)
    if entry.dtype == "BF16":
        return torch.from_numpy(array.view("<i2")).view(torch.bfloat16)
    return torch.from_numpy(array)
