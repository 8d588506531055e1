"""Patterns against PEFT's own functions as the oracle, and against time."""

import json
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from quickchange_adapters.base_spec import BaseSpec, ModuleSpec
from quickchange_adapters.config import read_config
from quickchange_adapters.patterns import (
    MAX_PATTERNS,
    PatternRefused,
    TargetRule,
    matched_modules,
    pattern_values,
)

from tests.adapters.adapter_files import small_spec

SPEC = small_spec(12)
NAMES = ["q_proj", "v_proj", "proj", "self_attn.q_proj", "layers", "embed_tokens", "lm_head"]
FULL = ["model.layers.0.self_attn.q_proj", "model.layers.11.mlp.down_proj"]
PATTERNS = [
    r".*\.q_proj",
    r"model\.layers\.(1|11)\..*",
    r".*(self_attn|mlp)\.(q|k|down)_proj$",
    r"(?i).*Q_PROJ",
    r"lm_head",
    r".*\.[0-9]+\.[a-z_]+\.[qv]_proj",
]
KEYS = ["q_proj", "self_attn.q_proj", "q", r".*_proj", r"layers.1.self_attn.q_proj", "[qk]_proj"]
KEYS += [r"^model.layers.0.self_attn.q_proj", r"layers\.\d+\.mlp.*", "k_proj|down_proj", "1.*"]


def peft_matches(config: LoraConfig) -> frozenset[str]:
    return frozenset(
        module
        for module in SPEC.modules
        if type(found := check_target_module_exists(config, module)).__name__ != "_ExcludedModule"
        and found
    )


def ours(**fields: Any) -> frozenset[str]:
    reading = read_config(json.dumps({"peft_type": "LORA", **fields}).encode())
    assert reading.config is not None, reading.problems
    return matched_modules(reading.config.targets, SPEC)


@settings(max_examples=150, deadline=None)
@given(
    target=st.lists(st.sampled_from(NAMES + FULL), min_size=1, max_size=4),
    exclude=st.none() | st.lists(st.sampled_from(NAMES + FULL), max_size=2),
    layers=st.none() | st.integers(0, 12) | st.lists(st.integers(0, 12), max_size=3),
    layers_pattern=st.none() | st.sampled_from(["layers", ["layers"], ["h", "layers"], "h", ""]),
)
def test_lists_mean_what_peft_says(
    target: list[str], exclude: list[str] | None, layers: Any, layers_pattern: Any
) -> None:
    fields = {"target_modules": target, "exclude_modules": exclude, "layers_to_transform": layers}
    if layers is not None:
        fields["layers_pattern"] = layers_pattern
    assert ours(**fields) == peft_matches(LoraConfig(**fields))


@pytest.mark.parametrize("target", PATTERNS)
@pytest.mark.parametrize("exclude", [None, ["v_proj"], r".*\.1\..*", r".*\.0\.mlp.*"])
def test_regular_expressions_mean_what_peft_says(target: str, exclude: Any) -> None:
    expected = peft_matches(LoraConfig(target_modules=target, exclude_modules=exclude))
    assert ours(target_modules=target, exclude_modules=exclude) == expected
    assert expected


@pytest.mark.parametrize("target", ["all-linear", "ALL-LINEAR"])
def test_all_linear_means_every_linear_but_the_head(target: str) -> None:
    linears = {m for m, spec in SPEC.modules.items() if spec.kind == "linear"}
    assert ours(target_modules=target) == linears
    assert ours(target_modules=target, exclude_modules=["q_proj"]) == {
        m for m in linears if not m.endswith("q_proj")
    }


@settings(max_examples=150, deadline=None)
@given(keys=st.lists(st.sampled_from(KEYS), max_size=4, unique=True))
def test_the_first_pattern_of_the_file_wins(keys: list[str]) -> None:
    patterns = {key: place for place, key in enumerate(keys)}
    expected = {m: patterns.get(get_pattern_key(list(patterns), m), -1) for m in SPEC.modules}
    assert pattern_values(patterns, SPEC.modules, -1) == expected


def test_a_layer_number_is_the_first_of_the_path() -> None:
    module = "model.layers.3.experts.5.q_proj"
    spec = BaseSpec("moe", "0" * 64, "moe", 1, {module: ModuleSpec("linear", 8, 8)})
    rule = TargetRule(("q_proj",), layers=frozenset({3}))
    assert matched_modules(rule, spec) == {module}
    assert not matched_modules(TargetRule(("q_proj",), layers=frozenset({5})), spec)


@pytest.mark.parametrize(
    ("pattern", "code"),
    [
        (r"(?=.*q_proj).*", "config_unsupported"),
        (r"(q)\1_proj", "config_unsupported"),
        (r"q{,3}_proj", "config_unsupported"),
        (r"[[:alpha:]]_proj", "config_unsupported"),
        (r"(q_proj", "config_invalid"),
        ("q" * 1025, "config_invalid"),
        (r"((a{100}){100}){100}", "config_invalid"),
    ],
)
def test_patterns_that_re2_reads_otherwise_are_refused(pattern: str, code: str) -> None:
    with pytest.raises(PatternRefused) as caught:
        matched_modules(TargetRule(pattern), SPEC)
    assert caught.value.code == code


@pytest.mark.parametrize(
    "pattern", [r"([a-z_.0-9]+)+X", r"(a|aa)+$", r"(.*.*){40}x.{15}", r"(.*[a-z].{20}){9}x"]
)
def test_no_pattern_takes_long(pattern: str) -> None:
    # The first of these keeps Python's re busy for minutes on one module of this length.
    spec = small_spec(64)
    started = time.perf_counter()
    matched_modules(TargetRule(pattern), spec)
    pattern_values({pattern + str(n): n for n in range(4)}, spec.modules, 0)
    assert time.perf_counter() - started < 20


def test_the_number_and_the_size_of_patterns_are_limited() -> None:
    many = {f"name{n}": n for n in range(MAX_PATTERNS)}
    assert set(pattern_values(many, SPEC.modules, -1).values()) == {-1}
    with pytest.raises(PatternRefused):
        pattern_values(many | {"one_more": 0}, SPEC.modules, 0)
    large = r"([a-z]*[a-m_.]*.{0,12}){12}Q"
    pattern_values({large: 0}, SPEC.modules, 0)
    with pytest.raises(PatternRefused):
        pattern_values({f"{large}{n}": n for n in range(32)}, SPEC.modules, 0)
