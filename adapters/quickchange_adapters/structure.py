"""Whether an adapter's config, its tensors' shapes and a base belong together; no numbers read.

The same check stands before every load, so that what is placed into the base's layers fits them,
whatever was once stored.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from io import BufferedReader
from pathlib import Path

from quickchange_adapters.base_spec import BaseSpec, ModuleSpec
from quickchange_adapters.config import LoraAdapterConfig, read_config
from quickchange_adapters.errors import Problem
from quickchange_adapters.header import HeaderRefused, TensorEntry, read_header
from quickchange_adapters.limits import AdapterLimits
from quickchange_adapters.patterns import PatternRefused, matched_modules
from quickchange_adapters.tensor_names import ModuleTensors, sort_tensors
from quickchange_adapters.tensor_values import values_sha256


@dataclass(frozen=True, slots=True)
class PairPlan:
    """Where one module's pair is in the file, and the factor between B·A and the update."""

    module: str
    rank: int
    scaling: float
    lora_a: TensorEntry
    lora_b: TensorEntry


@dataclass(frozen=True, slots=True)
class BiasPlan:
    """Where one module's bias is in the file: added with the pair's scaling, or replacing."""

    module: str
    entry: TensorEntry
    scaling: float | None


@dataclass(frozen=True, slots=True)
class FrozenCopy:
    """The base's own weight in the file, and the digest its values must have."""

    module: str
    entry: TensorEntry
    values_sha256: str


@dataclass(slots=True)
class Structure:
    """What fits and what does not. `pairs` holds the consistent ones, sorted by module.

    `biases` and `copies` are what comes along with them.
    `missed`: modules the config targets and the file lacks; `unexpected`: the other way round.
    """

    pairs: list[PairPlan] = field(default_factory=list)
    biases: list[BiasPlan] = field(default_factory=list)
    copies: list[FrozenCopy] = field(default_factory=list)
    missed: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    config: LoraAdapterConfig | None = None


def check_structure(
    config_path: Path, weights_path: Path, spec: BaseSpec, limits: AdapterLimits
) -> Structure:
    """Compare an adapter's two files with each other and with a base; collect all problems."""
    structure = Structure()
    _read_config(structure, config_path, limits)
    tensors = _read_tensors(structure, weights_path, limits)
    if tensors is not None:
        modules, problems = sort_tensors(tensors)
        structure.problems += problems
        _check_modules(structure, modules, spec, limits)
    return structure


def _read_config(structure: Structure, path: Path, limits: AdapterLimits) -> None:
    num_bytes = path.stat().st_size
    if num_bytes > limits.max_config_bytes:
        message = f"it has {num_bytes} bytes; at most {limits.max_config_bytes} are read"
        structure.problems.append(Problem("too_large", "adapter_config.json", message))
        return
    reading = read_config(path.read_bytes())
    structure.config = reading.config
    structure.problems += reading.problems
    structure.warnings += reading.warnings


def _read_tensors(
    structure: Structure, path: Path, limits: AdapterLimits
) -> dict[str, TensorEntry] | None:
    num_bytes = path.stat().st_size
    if num_bytes > limits.max_weights_bytes:
        message = f"it has {num_bytes} bytes; at most {limits.max_weights_bytes} are accepted"
        structure.problems.append(Problem("too_large", "adapter_model.safetensors", message))
        return None
    try:
        tensors = read_header(path, limits.max_header_bytes).tensors
    except HeaderRefused as error:
        where = error.where or "adapter_model.safetensors"
        structure.problems.append(Problem(error.code, where, error.message, error.hint))
        return None
    if not tensors:
        message = "the file holds no tensors"
        structure.problems.append(Problem("weights_invalid", "adapter_model.safetensors", message))
    return tensors


def _check_modules(
    structure: Structure,
    modules: Mapping[str, ModuleTensors],
    spec: BaseSpec,
    limits: AdapterLimits,
) -> None:
    _check_targets(structure, [m for m, tensors in modules.items() if tensors.has_pair], spec)
    ranks, scalings = _ranks_and_scalings(structure, modules, limits)
    for module, tensors in sorted(modules.items()):
        target = spec.modules.get(module)
        if target is None:
            structure.problems.append(_unknown_module(module, tensors, spec))
            continue
        scaling = scalings.get(module, 1.0)
        problems = _check_copy(structure, module, tensors, target)
        problems += _check_biases(structure, module, tensors, target, scaling)
        if tensors.has_pair or tensors.replaced_bias is None:
            problems += _check_pair(module, tensors, target, limits, ranks.get(module))
        structure.problems += problems
        if not problems and tensors.lora_a and tensors.lora_b:
            rank = tensors.lora_a.shape[0]
            structure.pairs.append(PairPlan(module, rank, scaling, tensors.lora_a, tensors.lora_b))


def _unknown_module(module: str, tensors: ModuleTensors, spec: BaseSpec) -> Problem:
    if tensors.replaced_bias is not None and not tensors.has_pair:
        message = f"the bias of {module[:200]!r}, which is no linear of the base, is not served"
        return Problem("config_unsupported", module[:200], message, "train with bias='lora_only'")
    message = f"the base {spec.name!r} has no module {module[:200]!r}"
    return Problem("unknown_module", module[:200], message, "was it trained on this base?")


def _check_copy(
    structure: Structure, module: str, tensors: ModuleTensors, target: ModuleSpec
) -> list[Problem]:
    """The base's own weight: only where PEFT adds it; its values are compared later."""
    entry = tensors.frozen
    if entry is None:
        return []
    if target.values_sha256 is None:
        message = f"tensor {entry.name!r} is a weight of the base, which adapters cannot bring"
        return [Problem("config_unsupported", entry.name, message)]
    rows = (target.in_features, target.out_features)
    wanted = rows if target.kind == "embedding" else rows[::-1]
    if entry.shape != wanted:
        return [_wrong_shape(entry, wanted)]
    structure.copies.append(FrozenCopy(module, entry, target.values_sha256))
    return []


def _check_biases(
    structure: Structure, module: str, tensors: ModuleTensors, target: ModuleSpec, scaling: float
) -> list[Problem]:
    config = structure.config
    problems: list[Problem] = []
    if config is not None and tensors.has_pair and target.kind != "embedding":
        if config.has_lora_bias and tensors.added_bias is None:
            message = f"module {module!r} has no bias of lora_B, which lora_bias promises"
            problems.append(Problem("weights_invalid", module, message))
        if tensors.added_bias is not None and not config.has_lora_bias:
            message = f"module {module!r} has a bias of lora_B, and lora_bias is not set"
            problems.append(Problem("config_invalid", module, message))
    if config is not None and tensors.replaced_bias is not None and not config.has_trained_biases:
        message = f"module {module!r} has a bias of its own, and bias is 'none'"
        problems.append(Problem("config_invalid", module, message))
    for entry, factor in ((tensors.added_bias, scaling), (tensors.replaced_bias, None)):
        if entry is None:
            continue
        if target.kind not in ("linear", "conv1d"):
            message = f"a bias of {module!r}, as wide as the vocabulary, is not served"
            problems.append(Problem("config_unsupported", entry.name, message))
        elif entry.shape != (target.out_features,):
            problems.append(_wrong_shape(entry, (target.out_features,)))
        elif factor is None and not target.has_bias:
            message = f"module {module!r} has no bias in the base that could be replaced"
            problems.append(Problem("shape_mismatch", entry.name, message))
        else:
            structure.biases.append(BiasPlan(module, entry, factor))
    return problems


def _wrong_shape(entry: TensorEntry, wanted: tuple[int, ...]) -> Problem:
    message = f"tensor {entry.name!r} has shape {list(entry.shape)}, the base wants {list(wanted)}"
    return Problem("shape_mismatch", entry.name, message)


def _check_targets(structure: Structure, modules: Iterable[str], spec: BaseSpec) -> None:
    """Compare what the config's patterns match with what the file holds."""
    if structure.config is None:
        return
    try:
        matched = matched_modules(structure.config.targets, spec)
    except PatternRefused as error:
        structure.problems.append(
            Problem(error.code, "target_modules", str(error), _as_list(modules))
        )
        return
    found = {module for module in modules if module in spec.modules}
    structure.missed = sorted(matched - found)
    structure.unexpected = sorted(found - matched)
    if structure.missed:
        message = (
            f"target_modules means {_some(structure.missed)}, and the file has no such tensors"
        )
        structure.problems.append(Problem("config_invalid", "target_modules", message))
    if structure.unexpected:
        message = f"the file has tensors for {_some(structure.unexpected)}, not in target_modules"
        structure.problems.append(Problem("config_invalid", "target_modules", message))


def _as_list(modules: Iterable[str]) -> str:
    """Say how the modules of a file can be named without a pattern."""
    names = sorted({module.rpartition(".")[2][:80] for module in modules})
    if not 0 < len(names) <= 16:
        return "write target_modules as a list of names"
    return f"write target_modules as a list of names, for this file: {json.dumps(names)}"


def _ranks_and_scalings(
    structure: Structure, modules: Iterable[str], limits: AdapterLimits
) -> tuple[dict[str, int], dict[str, float]]:
    config = structure.config
    if config is None:
        return {}, {}
    largest = max(config.rank, *config.rank_pattern.values(), 0)
    if largest > limits.max_rank:
        message = f"the config asks for rank {largest}; at most {limits.max_rank} is served"
        structure.problems.append(Problem("rank_too_large", "r", message))
    where = "rank_pattern"
    try:
        ranks = config.ranks(modules)
        where = "alpha_pattern"
        return ranks, config.scalings(ranks)
    except PatternRefused as error:
        structure.problems.append(Problem(error.code, where, str(error)))
        return {}, {}


def _check_pair(
    module: str,
    tensors: ModuleTensors,
    target: ModuleSpec,
    limits: AdapterLimits,
    config_rank: int | None,
) -> list[Problem]:
    if tensors.lora_a is None or tensors.lora_b is None:
        missing = "lora_A" if tensors.lora_a is None else "lora_B"
        return [Problem("weights_invalid", module, f"module {module!r} has no {missing}")]
    if tensors.is_embedding != (target.kind == "embedding"):
        message = f"module {module!r} is {target.kind} in the base, and not so in the file"
        return [Problem("weights_invalid", module, message)]
    return _check_shapes(module, tensors.lora_a, tensors.lora_b, target, limits, config_rank)


def _check_shapes(
    module: str,
    lora_a: TensorEntry,
    lora_b: TensorEntry,
    target: ModuleSpec,
    limits: AdapterLimits,
    config_rank: int | None,
) -> list[Problem]:
    rank = lora_a.shape[0] if lora_a.shape else 0
    if rank > limits.max_rank:
        message = f"module {module!r} has rank {rank}; at most {limits.max_rank} is served"
        return [Problem("rank_too_large", module, message)]
    wanted = {lora_a.name: (rank, target.in_features), lora_b.name: (target.out_features, rank)}
    problems = [
        Problem(
            "shape_mismatch",
            entry.name,
            f"tensor {entry.name!r} has shape {list(entry.shape)}, "
            f"the base and its other half want {list(wanted[entry.name])}",
        )
        for entry in (lora_a, lora_b)
        if entry.shape != wanted[entry.name] or rank < 1
    ]
    if config_rank is not None and rank != config_rank:
        message = f"module {module!r} has rank {rank}, the config says {config_rank}"
        problems.append(Problem("shape_mismatch", module, message, "check r and rank_pattern"))
    return problems


def copy_problem(file: BufferedReader, copy: FrozenCopy) -> Problem | None:
    """Compare a frozen copy with the base, value by value.

    Raises: HeaderRefused when the file is shorter than its header said.
    """
    if values_sha256(file, copy.entry) == copy.values_sha256:
        return None
    return Problem(
        "base_mismatch",
        copy.entry.name,
        f"tensor {copy.entry.name!r} differs from the base's own weight",
        "train on this base, or save with save_embedding_layers=False if it was not trained",
    )


def _some(modules: list[str]) -> str:
    shown = ", ".join(modules[:3])
    return shown if len(modules) <= 3 else f"{shown} and {len(modules) - 3} more"
