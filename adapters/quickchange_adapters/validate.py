"""Check an upload against a base and say everything about it, in one report.

Torch-free: numbers are read with numpy, one tensor at a time, so that this can run in a process
that never loads torch. Whether an update is worth anything is not judged; whether it is one is.
"""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from io import BufferedReader
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import numpy.typing as npt

from quickchange_adapters.base_spec import BaseSpec
from quickchange_adapters.errors import Problem
from quickchange_adapters.header import HeaderRefused, TensorEntry, read_array, to_float32
from quickchange_adapters.limits import AdapterLimits
from quickchange_adapters.structure import PairPlan, Structure, check_structure, copy_problem

PROBE_REASON = "not measured by this version"

FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class ModuleReport:
    """One module: shapes as in the file, and the Frobenius norm of its update, scaling * B·A.

    `update_norm` is None when a value is not finite.
    """

    module: str
    rank: int
    scaling: float
    lora_a: tuple[int, ...]
    lora_b: tuple[int, ...]
    update_norm: float | None

    def to_json(self) -> dict[str, Any]:
        """Return the module's part of the report."""
        return {**asdict(self), "lora_a": list(self.lora_a), "lora_b": list(self.lora_b)}


@dataclass(frozen=True, slots=True)
class Report:
    """What is known about an upload; `problems` empty means that it can be served.

    `modules` are those that fit, `biases` the modules whose bias it changes. `num_values` counts
    the numbers of all pairs and biases, so that bytes per tier follow from a dtype.
    """

    problems: tuple[Problem, ...]
    warnings: tuple[str, ...]
    modules: tuple[ModuleReport, ...]
    missed: tuple[str, ...]
    unexpected: tuple[str, ...]
    is_finite: bool
    has_effect: bool
    num_values: int
    base: str
    biases: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether the upload can be served."""
        return not self.problems

    @property
    def ranks(self) -> tuple[int, ...]:
        """The distinct ranks, smallest first."""
        return tuple(sorted({module.rank for module in self.modules}))

    @property
    def target_modules(self) -> tuple[str, ...]:
        """The distinct last parts of the modules' paths."""
        return tuple(sorted({module.module.rpartition(".")[2] for module in self.modules}))

    def to_json(self) -> dict[str, Any]:
        """Return the `adapter.report` object of the contract."""
        return {
            "object": "adapter.report",
            "ok": self.ok,
            "problems": [asdict(problem) for problem in self.problems],
            "warnings": list(self.warnings),
            "base": self.base,
            "modules": {
                "matched": [module.to_json() for module in self.modules],
                "missed": list(self.missed),
                "unexpected": list(self.unexpected),
            },
            "biases": list(self.biases),
            "ranks": list(self.ranks),
            "target_modules": list(self.target_modules),
            "finite": self.is_finite,
            "no_effect": bool(self.modules) and not self.has_effect,
            "num_values": self.num_values,
            "probe": None,
            "probe_reason": PROBE_REASON,
        }


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


def refused(problems: Iterable[Problem], spec: BaseSpec) -> Report:
    """Return the report of an upload whose files could not even be looked at."""
    return Report(tuple(problems), (), (), (), (), True, False, 0, spec.name)


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
    problems, warnings = list(structure.problems), list(structure.warnings)
    modules, number_problems = _check_numbers(structure, weights_path, limits)
    has_bias_effect = False
    if not number_problems:
        has_bias_effect, number_problems = _check_the_rest(structure, weights_path, limits)
    problems += number_problems
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


def update_norm(lora_a: FloatArray, lora_b: FloatArray, scaling: float) -> float:
    """Return the Frobenius norm of scaling * B·A without forming that product.

    lora_a [rank, in], lora_b [out, rank]: ||B·A||² = sum((BᵀB) ∘ (AAᵀ)), two rank x rank matrices.
    """
    a, b = lora_a.astype(np.float64), lora_b.astype(np.float64)
    squared = float(np.sum((b.T @ b) * (a @ a.T)))
    return abs(scaling) * math.sqrt(max(squared, 0.0))


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
                values = _values(file, bias.entry)
                scaling = 1.0 if bias.scaling is None else bias.scaling
                _check_size(bias.entry, values, scaling, problems, limits)
                has_effect |= bias.scaling is None or bool(np.any(values))
            problems += [p for c in structure.copies if (p := copy_problem(file, c)) is not None]
        except HeaderRefused as error:
            problems.append(Problem(error.code, error.where, error.message))
    return has_effect, problems


def _check_size(
    entry: TensorEntry,
    values: FloatArray,
    factor: float,
    problems: list[Problem],
    limits: AdapterLimits,
) -> bool:
    """Whether all values are finite and fit the dtype served; the reason joins the problems."""
    largest = float(np.max(np.abs(values), initial=0.0))
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
    """Return the norm of one update, or None, with the reason among the problems."""
    lora_a, lora_b = (_values(file, entry) for entry in (pair.lora_a, pair.lora_b))
    for entry, values, factor in ((pair.lora_a, lora_a, 1.0), (pair.lora_b, lora_b, pair.scaling)):
        if not _check_size(entry, values, factor, problems, limits):
            return None
    return update_norm(lora_a, lora_b, pair.scaling)


def _values(file: BufferedReader, entry: TensorEntry) -> FloatArray:
    return to_float32(read_array(file, entry), entry.dtype)


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
    if not named or PurePath(named).name.lower() == spec.name.lower():
        return None
    return Problem(
        "base_mismatch",
        "base_model_name_or_path",
        f"trained on {named[:200]!r}, served on {spec.name!r}",
        "leave strict_base out if this is the same model under another name",
    )
