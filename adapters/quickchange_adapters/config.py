"""PEFT's adapter_config.json, read strictly: an allow-list of fields, LoRA only.

A field at a value that would change the answer and that is not served is refused by its name; null
and default values of any field are accepted. Nothing named in the file is ever fetched or imported.
Source: PEFT 0.21, `LoraConfig`.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from quickchange_adapters.errors import Problem
from quickchange_adapters.patterns import MAX_PATTERN_BYTES, TargetRule, pattern_values
from quickchange_adapters.strict_json import JsonRefused, parse_object

MAX_NAMES = 4096
MAX_INT = (1 << 31) - 1

T = TypeVar("T")

# What starts training from another place than zero, and leaves the base as it was.
_HARMLESS_INITS = ("gaussian", "eva", "orthogonal", "mica")
# What takes something out of the base first: such an adapter fits only the changed base.
_CONVERTIBLE_INITS = ("pissa", "olora", "corda", "lora_ga")
_BASE_CHANGING_INITS = (*_CONVERTIBLE_INITS, "loftq")
_CONVERT = (
    "convert it with PEFT: save the adapter once before training, with init_lora_weights=True, and "
    "the trained one with save_pretrained(folder, path_initial_model_for_weight_conversion=that); "
    "what it writes is a plain LoRA of twice the rank"
)
_RETRAIN = "train it from init_lora_weights=True on the base as it is"

# Bookkeeping, and what only training reads.
_WITHOUT_EFFECT = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "corda_config",
        "ensure_weight_tying",
        "eva_config",
        "fan_in_fan_out",  # concerns merging by PEFT; the base knows how it stores its weights
        "inference_mode",
        "loftq_config",
        "lora_dropout",
        "lora_ga_config",
        "megatron_core",
        "peft_version",
        "qalora_group_size",
        "revision",
        "task_type",
    }
)
_READ = frozenset(
    {
        "peft_type",
        "r",
        "lora_alpha",
        "use_rslora",
        "rank_pattern",
        "alpha_pattern",
        "target_modules",
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
        "bias",
        "lora_bias",
        "init_lora_weights",
    }
)
_NOT_SERVED = {
    "alora_invocation_tokens": "activated LoRA",
    "arrow_config": "Arrow routing",
    "kasa_config": "KaSA, which changes the base,",
    "layer_replication": "replicated layers",
    "megatron_config": "Megatron's parallel layers",
    "modules_to_save": "fully trained modules",
    "monteclora_config": "MonteCLoRA",
    "target_parameters": "LoRA on bare parameters",
    "trainable_token_indices": "trained tokens",
    "use_bdlora": "block-diagonal LoRA",
    "use_dora": "DoRA",
    "use_qalora": "QALoRA",
    "velora_config": "VeLoRA",
}


@dataclass(frozen=True, slots=True)
class LoraAdapterConfig:
    """What a LoRA config says about answers; everything else in the file has no effect on them.

    `has_lora_bias`: lora_B has a bias; `has_trained_biases`: biases of the base were trained along.
    Patterns keep the file's order: PEFT takes the first that matches.
    """

    rank: int
    alpha: float
    targets: TargetRule
    use_rslora: bool = False
    has_lora_bias: bool = False
    has_trained_biases: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    base_model_name: str | None = None

    def ranks(self, modules: Iterable[str]) -> dict[str, int]:
        """Return the rank of each module.

        Raises: PatternRefused.
        """
        return pattern_values(self.rank_pattern, modules, self.rank)

    def scalings(self, ranks: Mapping[str, int]) -> dict[str, float]:
        """Return alpha / rank for modules of these ranks; with rsLoRA alpha / sqrt(rank).

        Raises: PatternRefused.
        Source: Hu et al. 2021, section 4.1; Kalajdzievski 2023 (arXiv 2312.03732).
        """
        alphas = pattern_values(self.alpha_pattern, ranks, self.alpha)
        return {m: alphas[m] / (math.sqrt(r) if self.use_rslora else r) for m, r in ranks.items()}


@dataclass(frozen=True, slots=True)
class ConfigReading:
    """The outcome of reading a config: `config` is None exactly when there are problems."""

    config: LoraAdapterConfig | None
    problems: tuple[Problem, ...]
    warnings: tuple[str, ...] = ()


def read_config(data: bytes) -> ConfigReading:
    """Read the bytes of an adapter_config.json and say everything that is wrong with them."""
    try:
        raw = parse_object(data)
    except JsonRefused as error:
        return ConfigReading(None, (Problem("config_invalid", "adapter_config.json", str(error)),))
    reader = _Reader(raw)
    config = reader.read()
    problems = tuple(reader.problems)
    return ConfigReading(None if problems else config, problems, tuple(reader.warnings))


class _Reader:
    """Reads fields one by one; a wrong one leaves a problem and a harmless value."""

    def __init__(self, raw: Mapping[str, Any]) -> None:
        self.raw = raw
        self.problems: list[Problem] = []
        self.warnings: list[str] = []

    def read(self) -> LoraAdapterConfig:
        self._check_type()
        self._check_unread_fields()
        self._check_init()
        self._check_bias()
        base = self.raw.get("base_model_name_or_path")
        return LoraAdapterConfig(
            rank=self._value("r", 8, _as_rank, f"a whole number from 1 to {MAX_INT}"),
            alpha=self._value("lora_alpha", 8.0, _as_number, "a number"),
            targets=self._targets(),
            use_rslora=self._value("use_rslora", False, _as_flag, "true or false"),
            has_lora_bias=self._value("lora_bias", False, _as_flag, "true or false"),
            has_trained_biases=self.raw.get("bias") in ("all", "lora_only"),
            rank_pattern=self._patterns("rank_pattern", _as_rank, "ranks from 1"),
            alpha_pattern=self._patterns("alpha_pattern", _as_number, "numbers"),
            base_model_name=base if isinstance(base, str) else None,
        )

    def _invalid(self, key: str, message: str, hint: str = "") -> None:
        self.problems.append(Problem("config_invalid", key, message, hint))

    def _unsupported(self, key: str, message: str, hint: str = "") -> None:
        self.problems.append(Problem("config_unsupported", key, message, hint))

    def _check_type(self) -> None:
        peft_type = self.raw.get("peft_type")
        if peft_type is None:
            self._invalid("peft_type", "peft_type is missing", "save the adapter with PEFT")
        elif peft_type != "LORA":
            self._unsupported("peft_type", f"peft_type {_show(peft_type)} is not served; LORA is")
        task_type = self.raw.get("task_type")
        if task_type not in (None, "CAUSAL_LM"):
            self.warnings.append(f"task_type is {_show(task_type)}; served as CAUSAL_LM")

    def _check_unread_fields(self) -> None:
        for key, value in self.raw.items():
            if key in _READ or key in _WITHOUT_EFFECT or _is_unset(value):
                continue
            if key in _NOT_SERVED:
                message = f"{key} is set to {_show(value)}: {_NOT_SERVED[key]} is not served"
                hint = f"PEFT has no conversion for it: {_RETRAIN}" if key == "kasa_config" else ""
                self._unsupported(key, message, hint)
            else:
                message = f"the field {key[:80]!r} is not known and is set to {_show(value)}"
                self._unsupported(key[:80], message, "remove it if it only concerned training")

    def _check_init(self) -> None:
        init = self.raw.get("init_lora_weights")
        if init is None or isinstance(init, bool) or init in _HARMLESS_INITS:
            return
        if isinstance(init, str) and init.lower().startswith(_BASE_CHANGING_INITS):
            self._unsupported(
                "init_lora_weights",
                f"init_lora_weights {init[:40]!r} changes the base, which is shared here",
                self._way_out(init.lower()),
            )
        else:
            self._unsupported("init_lora_weights", f"init_lora_weights {_show(init)} is not known")

    def _way_out(self, init: str) -> str:
        """Say how an adapter that fits only a changed base becomes one for the base as it is."""
        if not init.startswith(_CONVERTIBLE_INITS):
            return f"PEFT has no conversion for it: {_RETRAIN}"
        patterns = self.raw.get("rank_pattern") or self.raw.get("alpha_pattern")
        if self.raw.get("use_rslora") and patterns:
            return f"PEFT cannot convert use_rslora together with patterns: {_RETRAIN}"
        return _CONVERT

    def _check_bias(self) -> None:
        bias = self.raw.get("bias", "none")
        if bias not in (None, "none", "all", "lora_only"):
            self._invalid("bias", f"bias is {_show(bias)}, not none, all or lora_only")

    def _targets(self) -> TargetRule:
        target = self._names("target_modules")
        layers = self._layers()
        layer_patterns = self._names("layers_pattern")
        if not target:
            self._invalid("target_modules", "target_modules is missing or empty")
        if isinstance(target, str) and (layers is not None or layer_patterns):
            self._invalid(
                "layers_to_transform", "layers_to_transform needs target_modules to be a list"
            )
        if layer_patterns and layers is None:
            self._invalid("layers_pattern", "layers_pattern needs layers_to_transform")
        return TargetRule(
            target=target,
            exclude=self._names("exclude_modules"),
            layers=layers,
            layer_patterns=(layer_patterns,) if isinstance(layer_patterns, str) else layer_patterns,
        )

    def _names(self, key: str) -> str | tuple[str, ...]:
        """Read a string or a list of strings; null and the empty string are the empty tuple."""
        value = self.raw.get(key)
        if value is None or value == "":
            return ()
        names = [value] if isinstance(value, str) else value
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            self._invalid(key, f"{key} is {_show(value)}, not a string or a list of strings")
            return ()
        if len(names) > MAX_NAMES or any(len(n.encode()) > MAX_PATTERN_BYTES for n in names):
            self._invalid(
                key,
                f"{key} is too large: at most {MAX_NAMES} names of {MAX_PATTERN_BYTES} bytes",
            )
            return ()
        return value if isinstance(value, str) else tuple(names)

    def _layers(self) -> frozenset[int] | None:
        value = self.raw.get("layers_to_transform")
        if value is None:
            return None
        layers = value if isinstance(value, list) else [value]
        if not all(_is_int(layer) and layer >= 0 for layer in layers):
            self._invalid(
                "layers_to_transform",
                f"layers_to_transform is {_show(value)}, not a layer's number or a list of them",
            )
            return None
        return frozenset(layers)

    def _value(self, key: str, default: T, read: Callable[[Any], T | None], wanted: str) -> T:
        raw = self.raw.get(key)
        value = default if raw is None else read(raw)
        if value is None:
            self._invalid(key, f"{key} is {_show(raw)}, not {wanted}")
            return default
        return value

    def _patterns(self, key: str, read: Callable[[Any], T | None], wanted: str) -> dict[str, T]:
        raw = self.raw.get(key)
        if raw is None:
            return {}
        items = raw if isinstance(raw, dict) else {"": None}
        values = {k: value for k, v in items.items() if (value := read(v)) is not None}
        if len(values) < len(items):
            self._invalid(key, f"{key} is {_show(raw)}, not an object with {wanted}")
        return values


def _is_unset(value: Any) -> bool:
    return value is None or value is False or value in ("", [], {})


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _as_rank(value: Any) -> int | None:
    return value if _is_int(value) and 1 <= value <= MAX_INT else None


def _as_number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value)
    except OverflowError:
        return None


def _as_flag(value: Any) -> bool | None:
    return value if isinstance(value, bool) else None


def _show(value: Any) -> str:
    """Return a stranger's value short enough for a message."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
