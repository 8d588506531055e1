"""Read one version's files into the tensors that are served. Runs in a loader thread.

The scaling is folded into lora_b in float32 and rounded once, to the serving dtype.
"""

from io import BufferedReader
from pathlib import Path

import torch
from torch import Tensor

from quickchange_adapters.base_spec import BaseSpec
from quickchange_adapters.errors import AdapterRefused, Problem
from quickchange_adapters.header import HeaderRefused, TensorEntry, read_array
from quickchange_adapters.limits import AdapterLimits
from quickchange_adapters.structure import PairPlan, check_structure
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
            pairs = {plan.module: _load_pair(file, plan, dtype) for plan in structure.pairs}
    except HeaderRefused as error:
        raise AdapterRefused([Problem(error.code, error.where, error.message)]) from error
    return AdapterWeights(digest, pairs)


def _load_pair(file: BufferedReader, plan: PairPlan, dtype: torch.dtype) -> LoraPair:
    lora_a = _read_tensor(file, plan.lora_a).to(dtype)
    lora_b = (_read_tensor(file, plan.lora_b).float() * plan.scaling).to(dtype)
    for entry, tensor in ((plan.lora_a, lora_a), (plan.lora_b, lora_b)):
        if not torch.isfinite(tensor).all():
            message = f"tensor {entry.name!r} is not finite in {dtype}"
            raise AdapterRefused([Problem("not_finite", entry.name, message)])
    return LoraPair(lora_a, lora_b)


def _read_tensor(file: BufferedReader, entry: TensorEntry) -> Tensor:
    """Return the file's values in the file's dtype."""
    array = read_array(file, entry)
    if entry.dtype == "BF16":
        return torch.from_numpy(array.view("<i2")).view(torch.bfloat16)
    return torch.from_numpy(array)
