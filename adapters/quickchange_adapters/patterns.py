"""Which modules a config means, exactly as PEFT reads it, in linear time.

PEFT gives these strings to Python's `re`, where one of them can hold the process for ever. Here
they go to RE2, which has no back-references and no look-around and therefore no such strings.
Source: PEFT 0.21, `check_target_module_exists` and `get_pattern_key`.
"""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import re2

from quickchange_adapters.base_spec import BaseSpec
from quickchange_adapters.errors import AdapterError

MAX_PATTERN_BYTES = 1024
MAX_PATTERNS = 1024
MAX_PROGRAM_SIZE = 8192
ALL_LINEAR = "all-linear"

T = TypeVar("T")

_PLAIN = re2.compile(r"\^?(?:[A-Za-z0-9_.-]|\\\.)+\$?")
_MATCHER_BYTES = 1 << 20


class PatternRefused(AdapterError):
    """A pattern is too long, or not one that RE2 reads as Python's `re` does."""

    def __init__(self, message: str, code: str = "config_invalid") -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True, slots=True)
class TargetRule:
    """The fields of a config that choose modules. A string is a pattern, a tuple holds names.

    `layers` None: every layer. `layer_patterns` empty: any name before the layer's number.
    """

    target: str | tuple[str, ...]
    exclude: str | tuple[str, ...] = ()
    layers: frozenset[int] | None = None
    layer_patterns: tuple[str, ...] = ()


def compile_pattern(pattern: str, template: str = "{}", *, can_capture: bool = False) -> Any:
    """Compile a stranger's pattern, set into a template of ours.

    Without captures RE2 runs its automaton alone, which is many times faster.
    Raises: PatternRefused.
    """
    if len(pattern.encode()) > MAX_PATTERN_BYTES:
        raise PatternRefused(f"a pattern is longer than {MAX_PATTERN_BYTES} bytes")
    if "{," in pattern or "[[:" in pattern:
        # Both engines accept these and mean different things.
        raise PatternRefused(
            f"the pattern {pattern[:80]!r} uses '{{,' or '[[:'; write it out", "config_unsupported"
        )
    try:
        return re2.compile(template.format(pattern), _options(can_capture))
    except re2.error as error:
        reason = error.args[0].decode(errors="replace") if error.args else "not readable"
        # Look-around and back-references are Python's, and no linear-time engine has them.
        is_python_only = reason.startswith(("invalid perl operator", "invalid escape sequence"))
        raise PatternRefused(
            f"the pattern {pattern[:80]!r} is not accepted: {reason}",
            "config_unsupported" if is_python_only else "config_invalid",
        ) from error


def matched_modules(rule: TargetRule, spec: BaseSpec) -> frozenset[str]:
    """Return the base's modules that a config targets.

    Raises: PatternRefused.
    """
    is_excluded = _name_matcher(rule.exclude)
    is_targeted = _target_matcher(rule, spec)
    return frozenset(m for m in spec.modules if not is_excluded(m) and is_targeted(m))


def pattern_values(patterns: Mapping[str, T], modules: Iterable[str], default: T) -> dict[str, T]:
    """Return each module's value: that of the first pattern it matches, else the default.

    A pattern must match a whole tail of dotted parts of the module's path.
    Raises: PatternRefused.
    """
    regexes = _compile_all(patterns, r"(.*\.)?({})$")
    compiled = list(zip(regexes, patterns.values(), strict=True))
    return {
        module: next((value for regex, value in compiled if regex.match(module)), default)
        for module in modules
    }


def _compile_all(
    patterns: Collection[str], template: str, *, can_capture: bool = False
) -> list[Any]:
    """Compile one field's patterns, unless even linear time would be long for so many.

    Time grows with the sum of their programs' sizes; plain paths fail fast and count only by
    number.
    """
    if len(patterns) > MAX_PATTERNS:
        raise PatternRefused(f"{len(patterns)} patterns; at most {MAX_PATTERNS} are read")
    regexes = []
    program_size = 0
    for pattern in patterns:
        regex = compile_pattern(pattern, template, can_capture=can_capture)
        regexes.append(regex)
        program_size += 0 if _PLAIN.fullmatch(pattern) else regex.programsize
        if program_size > MAX_PROGRAM_SIZE:
            raise PatternRefused("the patterns are too large together; write plain paths")
    return regexes


def _options(can_capture: bool) -> Any:
    options = re2.Options()
    options.log_errors = False
    options.max_mem = _MATCHER_BYTES
    options.never_capture = not can_capture
    return options


def _name_matcher(names: str | tuple[str, ...]) -> Callable[[str], bool]:
    if isinstance(names, str):
        (regex,) = _compile_all((names,), "{}")
        return lambda module: regex.fullmatch(module) is not None
    exact = frozenset(names)
    tails = tuple(f".{name}" for name in names)
    return lambda module: module in exact or module.endswith(tails)


def _target_matcher(rule: TargetRule, spec: BaseSpec) -> Callable[[str], bool]:
    if isinstance(rule.target, str):
        if rule.target.lower() == ALL_LINEAR:
            return lambda module: spec.modules[module].kind in ("linear", "conv1d")
        return _name_matcher(rule.target)
    exact = frozenset(rule.target)
    is_named = _name_matcher(rule.target)
    is_in_layers = _layer_matcher(rule)
    # PEFT lets a full path through whatever its layer is.
    return lambda module: module in exact or (is_named(module) and is_in_layers(module))


def _layer_matcher(rule: TargetRule) -> Callable[[str], bool]:
    layers = rule.layers
    if not layers:
        return lambda module: True
    regexes = (
        _compile_all(rule.layer_patterns, r"(?:^|.*?\.){}\.(?P<idx>\d+)\.", can_capture=True)
        if rule.layer_patterns
        else [compile_pattern(r".*?\.[^.]*\.(?P<idx>\d+)\.", can_capture=True)]
    )

    def is_in_layers(module: str) -> bool:
        match = next((m for regex in regexes if (m := regex.match(module))), None)
        return match is not None and int(match.group("idx")) in layers

    return is_in_layers
