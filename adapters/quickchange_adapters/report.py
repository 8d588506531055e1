"""What is known about an upload, as data: for its sender, for the catalog, between processes."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

from quickchange_adapters.base_spec import BaseSpec
from quickchange_adapters.errors import Problem


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

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> Self:
        """Return a module's report that went through JSON."""
        shapes = {key: tuple(plain[key]) for key in ("lora_a", "lora_b")}
        return cls(**{**plain, **shapes})

    def to_json(self) -> dict[str, Any]:
        """Return the module's part of the report."""
        return {**asdict(self), "lora_a": list(self.lora_a), "lora_b": list(self.lora_b)}


@dataclass(frozen=True, slots=True)
class Report:
    """What is known about an upload; `problems` empty means that it can be served.

    `modules` are those that fit, `biases` the modules whose bias it changes. `num_values` counts
    the numbers of all pairs and biases, so that bytes per tier follow from a dtype. `probe` is what
    was measured with a prompt, or None for the reason beside it.
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
    probe: Mapping[str, float] | None = None
    probe_reason: str | None = "only an upload that can be served is measured"

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

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> Self:
        """Return a report that went through JSON as `dataclasses.asdict` shows it.

        Raises: TypeError, KeyError, ValueError when the JSON is none of ours.
        """
        tuples = ("warnings", "missed", "unexpected", "biases")
        return cls(
            **{
                **plain,
                **{key: tuple(plain[key]) for key in tuples},
                "problems": tuple(Problem(**each) for each in plain["problems"]),
                "modules": tuple(ModuleReport.from_plain(each) for each in plain["modules"]),
            }
        )

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
            "probe": None if self.probe is None else dict(self.probe),
            "probe_reason": self.probe_reason,
        }


def refused(problems: Iterable[Problem], spec: BaseSpec) -> Report:
    """Return the report of an upload whose files could not even be looked at."""
    return Report(tuple(problems), (), (), (), (), True, False, 0, spec.name)
