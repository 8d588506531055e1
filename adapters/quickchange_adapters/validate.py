"""Check an upload against a base and say everything about it, in one report.

Torch-free: numbers are read with numpy, block by block, so that this can run in a small process
that never loads torch. Whether an update is worth anything is not judged; whether it is one is.
"""

import math
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path, PurePath

import numpy as np
import numpy.typing as npt

from quickchange_adapters.base_spec import BaseSpec
from quickchange_adapters.errors import Problem
from quickchange_adapters.header import HeaderRefused, TensorEntry
from quickchange_adapters.limits import AdapterLimits
from quickchange_adapters.report import ModuleReport, Report, refused
from quickchange_adapters.structure import (
    PairPlan,
    Structure,
    check_structure,
    copy_problem,
)
from quickchange_adapters.tensor_values import largest_magnitude, summarize_factor

__all__ = ["ModuleReport", "Report", "ValidationJob", "refused", "validate_adapter"]

MAX_PROBLEMS = 64

GramMatrix = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class ValidationJob:
    """All that `validate_adapter` needs, as picklable data for a worker process."""

    config_path: Path
    weights_path: Path
    spec: BaseSpec
    limits: AdapterLimits
    allow_noop: bool = False
    strict_base: bool = False

    def run(self) -> Report:
        """Do the job here and now."""
        return validate_adapter(
            self.config_path,
            self.weights_path,
            self.spec,
            self.limits,
            allow_noop=self.allow_noop,
            strict_base=self.strict_base,
        )


def validate_adapter(
    config_path: Path,
    weights_path: Path,
    spec: BaseSpec,
    limits: AdapterLimits,
    *,
    allow_noop: bool = False,
    strict_base: bool = False,
) -> Report:
    """Check an adapter's two files completely and return the report. Raises only OSError."""
    structure = check_structure(config_path, weights_path, spec, limits)
    warnings = list(structure.warnings)
    modules, pair_problems = _check_numbers(structure, weights_path, limits)
    has_bias_effect, other_problems = _check_the_rest(structure, weights_path, limits)
    problems = _shortened([*structure.problems, *pair_problems, *other_problems])
    has_effect = has_bias_effect or any(module.update_norm != 0.0 for module in modules)
    if not has_effect and not problems and not allow_noop:
        problems.append(_no_effect())
    mismatch = _base_mismatch(structure, spec)
    if mismatch is not None and strict_base:
        problems.append(mismatch)
    elif mismatch is not None:
        warnings.append(mismatch.message)
    return Report(
        problems=tuple(problems),
        warnings=tuple(warnings),
        modules=tuple(modules),
        missed=tuple(structure.missed),
        unexpected=tuple(structure.unexpected),
        is_finite=not any(problem.code == "not_finite" for problem in problems),
        has_effect=has_effect,
        num_values=sum(math.prod(m.lora_a) + math.prod(m.lora_b) for m in modules)
        + sum(math.prod(bias.entry.shape) for bias in structure.biases),
        biases=tuple(sorted({bias.module for bias in structure.biases})),
        base=spec.name,
    )


def update_norm(gram_a: GramMatrix, gram_b: GramMatrix, scaling: float) -> float:
    """Return the Frobenius norm of scaling * B·A without forming that product.

    gram_a = A·Aᵀ, gram_b = Bᵀ·B, both [rank, rank]: ||B·A||² = sum(gram_b ∘ gram_a).
    """
    return abs(scaling) * math.sqrt(max(float(np.sum(gram_b * gram_a)), 0.0))


def _check_numbers(
    structure: Structure, path: Path, limits: AdapterLimits
) -> tuple[list[ModuleReport], list[Problem]]:
    modules: list[ModuleReport] = []
    problems: list[Problem] = []
    with path.open("rb") as file:
        for pair in structure.pairs:
            try:
                norm = _pair_norm(file, pair, problems, limits)
            except HeaderRefused as error:
                return modules, [*problems, Problem(error.code, pair.module, error.message)]
            modules.append(
                ModuleReport(
                    pair.module, pair.rank, pair.scaling, pair.lora_a.shape, pair.lora_b.shape, norm
                )
            )
    return modules, problems


def _check_the_rest(
    structure: Structure, path: Path, limits: AdapterLimits
) -> tuple[bool, list[Problem]]:
    """Check biases and frozen copies; say whether a bias has an effect."""
    problems: list[Problem] = []
    has_effect = False
    with path.open("rb") as file:
        try:
            for bias in structure.biases:
                largest = largest_magnitude(file, bias.entry)
                scaling = 1.0 if bias.scaling is None else bias.scaling
                _check_size(bias.entry, largest, scaling, problems, limits)
                has_effect |= bias.scaling is None or largest != 0.0
            problems += [p for c in structure.copies if (p := copy_problem(file, c)) is not None]
        except HeaderRefused as error:
            problems.append(Problem(error.code, error.where, error.message))
    return has_effect, problems


def _check_size(
    entry: TensorEntry,
    largest: float,
    factor: float,
    problems: list[Problem],
    limits: AdapterLimits,
) -> bool:
    """Whether all values are finite and fit the dtype served; the reason joins the problems."""
    if not math.isfinite(largest):
        problems.append(_not_finite(entry, "holds NaN or an infinity"))
        return False
    if largest * abs(factor) > limits.max_value:
        problems.append(_not_finite(entry, "is too large for the dtype it is served in"))
        return False
    return True


def _pair_norm(
    file: BufferedReader, pair: PairPlan, problems: list[Problem], limits: AdapterLimits
) -> float | None:
    """Return the norm of one update, or None, with the reasons among the problems."""
    a = summarize_factor(file, pair.lora_a, rank_axis=0)
    b = summarize_factor(file, pair.lora_b, rank_axis=1)
    is_a_fine = _check_size(pair.lora_a, a.largest, 1.0, problems, limits)
    is_b_fine = _check_size(pair.lora_b, b.largest, pair.scaling, problems, limits)
    return update_norm(a.gram, b.gram, pair.scaling) if is_a_fine and is_b_fine else None


def _not_finite(entry: TensorEntry, what: str) -> Problem:
    return Problem("not_finite", entry.name, f"tensor {entry.name!r} {what}")


def _no_effect() -> Problem:
    return Problem(
        "no_effect",
        "adapter_model.safetensors",
        "every update is zero, so the answers would be the base's",
        "train it first, or send allow_noop=true",
    )


def _base_mismatch(structure: Structure, spec: BaseSpec) -> Problem | None:
    """Compare names only; PEFT writes whatever path the trainer had."""
    named = structure.config.base_model_name if structure.config else None
    known = {PurePath(name).name.lower() for name in (spec.name, *spec.known_as)}
    if not named or PurePath(named).name.lower() in known:
        return None
    return Problem(
        "base_mismatch",
        "base_model_name_or_path",
        f"trained on {named[:200]!r}, served on {spec.name!r}",
        "leave strict_base out if this is the same model under another name",
    )


def _shortened(problems: list[Problem]) -> list[Problem]:
    """Keep the first problems of a long list, and say how many there were."""
    if len(problems) <= MAX_PROBLEMS:
        return problems
    more = len(problems) - MAX_PROBLEMS
    last = problems[MAX_PROBLEMS]
    return [*problems[:MAX_PROBLEMS], Problem(last.code, "", f"and {more} more problems")]
