"""Whether an adapter's config, its tensors' shapes and a base belong together; no numbers read.

The same check stands before every load, so that what is placed into the base's layers fits them,
whatever was once stored.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from quickchange_adapters.base_spec import BaseSpec, ModuleSpec
from quickchange_adapters.config import LoraAdapterConfig, read_config
from quickchange_adapters.errors import Problem
from quickchange_adapters.header import HeaderRefused, TensorEntry, read_header
from quickchange_adapters.limits import AdapterLimits
from quickchange_adapters.patterns import PatternRefused, matched_modules

PREFIX = "base_model.model."
LORA_A = ".lora_A.weight"
LORA_B = ".lora_B.weight"
MAX_PROBLEMS = 64

# Tensors of PEFT that are no plain LoRA pair: part of the name -> what it belongs to.
_OTHER_TENSORS = {
    ".lora_magnitude_vector": "DoRA",
    ".lora_embedding_A": "LoRA on the embedding",
    ".lora_embedding_B": "LoRA on the embedding",
    ".lora_B.bias": "a bias in lora_B",
    ".lora_E": "AdaLoRA",
    ".lora_diag": "KaSA",
    ".trainable_tokens_delta": "trained tokens",
}


@dataclass(frozen=True, slots=True)
class PairPlan:
    """Where one module's pair is in the file, and the factor between B·A and the update."""

    module: str
    rank: int
    scaling: float
    lora_a: TensorEntry
    lora_b: TensorEntry


@dataclass(slots=True)
class Structure:
    """What fits and what does not. `pairs` holds the consistent ones, sorted by module.

    `missed`: modules the config targets and the file lacks; `unexpected`: the other way round.
    """

    pairs: list[PairPlan] = field(default_factory=list)
    missed: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    config: LoraAdapterConfig | None = None


@dataclass(slots=True)
class _Halves:
    """The tensors found for one module."""

    lora_a: TensorEntry | None = None
    lora_b: TensorEntry | None = None


def check_structure(
    config_path: Path, weights_path: Path, spec: BaseSpec, limits: AdapterLimits
) -> Structure:
    """Compare an adapter's two files with each other and with a base; collect all problems."""
    structure = Structure()
    _read_config(structure, config_path, limits)
    tensors = _read_tensors(structure, weights_path, limits)
    if tensors is not None:
        halves = _sort_tensors(structure, tensors)
        _check_modules(structure, halves, spec, limits)
    structure.problems = _shortened(structure.problems)
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


def _sort_tensors(structure: Structure, tensors: Mapping[str, TensorEntry]) -> dict[str, _Halves]:
    """Return the halves by module; anything that is no half of a LoRA pair is a problem."""
    halves: dict[str, _Halves] = {}
    for name, entry in sorted(tensors.items()):
        if name.startswith(PREFIX) and name.endswith(LORA_A):
            halves.setdefault(name[len(PREFIX) : -len(LORA_A)], _Halves()).lora_a = entry
        elif name.startswith(PREFIX) and name.endswith(LORA_B):
            halves.setdefault(name[len(PREFIX) : -len(LORA_B)], _Halves()).lora_b = entry
        else:
            structure.problems.append(_stray_tensor(name))
    return halves


def _stray_tensor(name: str) -> Problem:
    where = name[:200]
    for part, what in _OTHER_TENSORS.items():
        if part in name:
            message = f"tensor {where!r} belongs to {what}, which is not served"
            return Problem("config_unsupported", where, message)
    return Problem(
        "weights_invalid",
        where,
        f"tensor {where!r} is not a half of a LoRA pair",
        f"names are {PREFIX}<module>{LORA_A} and …{LORA_B}, as PEFT's save_pretrained writes them",
    )


def _check_modules(
    structure: Structure, halves: Mapping[str, _Halves], spec: BaseSpec, limits: AdapterLimits
) -> None:
    _check_targets(structure, halves, spec)
    ranks, scalings = _ranks_and_scalings(structure, halves, limits)
    for module in sorted(halves):
        half = halves[module]
        problems = _check_module(module, half, spec, limits, ranks.get(module))
        structure.problems += problems
        if not problems and half.lora_a and half.lora_b:
            rank = half.lora_a.shape[0]
            scaling = scalings.get(module, 1.0)
            structure.pairs.append(PairPlan(module, rank, scaling, half.lora_a, half.lora_b))


def _check_targets(structure: Structure, modules: Iterable[str], spec: BaseSpec) -> None:
    """Compare what the config's patterns match with what the file holds."""
    if structure.config is None:
        return
    try:
        matched = matched_modules(structure.config.targets, spec)
    except PatternRefused as error:
        structure.problems.append(Problem(error.code, "target_modules", str(error)))
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
    try:
        ranks = config.ranks(modules)
        return ranks, config.scalings(ranks)
    except PatternRefused as error:
        structure.problems.append(Problem(error.code, "rank_pattern", str(error)))
        return {}, {}


def _check_module(
    module: str, half: _Halves, spec: BaseSpec, limits: AdapterLimits, config_rank: int | None
) -> list[Problem]:
    target = spec.modules.get(module)
    if target is None:
        message = f"the base {spec.name!r} has no module {module[:200]!r}"
        return [Problem("unknown_module", module[:200], message, "was it trained on this base?")]
    if target.kind not in ("linear", "conv1d"):
        what = "the output head" if target.kind == "lm_head" else "the embedding"
        return [Problem("config_unsupported", module, f"LoRA on {what} is not served")]
    if half.lora_a is None or half.lora_b is None:
        missing = "lora_A" if half.lora_a is None else "lora_B"
        return [Problem("weights_invalid", module, f"module {module!r} has no {missing}")]
    return _check_shapes(module, half.lora_a, half.lora_b, target, limits, config_rank)


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


def _some(modules: list[str]) -> str:
    shown = ", ".join(modules[:3])
    return shown if len(modules) <= 3 else f"{shown} and {len(modules) - 3} more"


def _shortened(problems: list[Problem]) -> list[Problem]:
    """Keep the first problems of a long list, and say how many there were."""
    if len(problems) <= MAX_PROBLEMS:
        return problems
    more = len(problems) - MAX_PROBLEMS
    last = problems[MAX_PROBLEMS]
    return [*problems[:MAX_PROBLEMS], Problem(last.code, "", f"and {more} more problems")]
