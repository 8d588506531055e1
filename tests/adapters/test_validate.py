"""Reports of uploads: what fits, and everything that is wrong with what does not."""

import hashlib
import json
import pickle
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from quickchange_adapters.base_spec import BaseSpec
from quickchange_adapters.limits import AdapterLimits
from quickchange_adapters.validate import Report, ValidationJob, validate_adapter

from tests.adapters.adapter_files import (
    Array,
    config_values,
    header_of,
    pair,
    q_pairs,
    safetensors_bytes,
    small_spec,
    weights_bytes,
    write_adapter,
)

SPEC = small_spec()
LIMITS = AdapterLimits()
Q0 = "model.layers.0.self_attn.q_proj"
PREFIX = f"base_model.model.{Q0}"


def check(
    folder: Path,
    tensors: dict[str, Array] | bytes | None = None,
    config: dict[str, Any] | bytes | None = None,
    allow_noop: bool = False,
    strict_base: bool = False,
    spec: BaseSpec = SPEC,
) -> Report:
    paths = write_adapter(
        folder,
        q_pairs(SPEC) if tensors is None else tensors,
        config_values() if config is None else config,
    )
    return validate_adapter(*paths, spec, LIMITS, allow_noop=allow_noop, strict_base=strict_base)


def codes(report: Report) -> set[str]:
    assert json.dumps(report.to_json(), allow_nan=False)
    return {problem.code for problem in report.problems}


def test_a_good_adapter_is_reported_in_full(tmp_path: Path) -> None:
    tensors = q_pairs(SPEC)
    report = check(tmp_path, tensors)
    assert report.ok
    assert [m.module for m in report.modules] == [m for m in SPEC.modules if m.endswith("q_proj")]
    assert report.ranks == (4,)
    assert report.target_modules == ("q_proj",)
    assert report.num_values == 2 * 4 * (64 + 64)
    assert {m.scaling for m in report.modules} == {2.0}
    for module in report.modules:
        name = f"base_model.model.{module.module}"
        update = 2.0 * tensors[f"{name}.lora_B.weight"] @ tensors[f"{name}.lora_A.weight"]
        assert module.update_norm == pytest.approx(np.linalg.norm(update), rel=1e-5)
    shown = report.to_json()
    assert shown["ok"] is True
    assert shown["no_effect"] is False
    assert shown["probe"] is None
    assert json.loads(json.dumps(shown)) == shown


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.uint16])
def test_all_three_dtypes_give_the_same_norm(tmp_path: Path, dtype: Any) -> None:
    whole = {name: np.round(array * 4) for name, array in q_pairs(SPEC).items()}
    expected = check(tmp_path / "float32", whole).modules

    def cast(array: Array) -> Array:
        # Small whole numbers are exact in every dtype; bfloat16 is the upper half of float32.
        bits = (array.view(np.uint32) >> 16).astype(np.uint16)
        return bits if dtype is np.uint16 else array.astype(dtype)

    found = check(tmp_path / "other", {name: cast(array) for name, array in whole.items()})
    assert found.ok
    assert found.modules == expected


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("half", ["lora_A", "lora_B"])
def test_values_that_are_not_finite(tmp_path: Path, bad: float, half: str) -> None:
    tensors = q_pairs(SPEC)
    tensors[f"{PREFIX}.{half}.weight"][1, 2] = bad
    report = check(tmp_path, tensors)
    assert codes(report) == {"not_finite"}
    assert report.problems[0].where == f"{PREFIX}.{half}.weight"
    assert not report.is_finite


def test_bfloat16_nan_is_found(tmp_path: Path) -> None:
    tensors = {n: (a.view(np.uint32) >> 16).astype(np.uint16) for n, a in q_pairs(SPEC).items()}
    tensors[f"{PREFIX}.lora_A.weight"][0, 0] = 0x7FC0
    assert codes(check(tmp_path, tensors)) == {"not_finite"}


def test_a_scaling_that_overflows_is_not_finite(tmp_path: Path) -> None:
    assert codes(check(tmp_path, config=config_values(lora_alpha=1e39))) == {"not_finite"}


def test_a_zero_update_is_refused_unless_it_is_wanted(tmp_path: Path) -> None:
    tensors = q_pairs(SPEC)
    for name in tensors:
        if "lora_B" in name:
            tensors[name] = np.zeros_like(tensors[name])
    report = check(tmp_path, tensors)
    assert codes(report) == {"no_effect"}
    assert report.to_json()["no_effect"] is True
    assert check(tmp_path, tensors, allow_noop=True).ok


def test_one_zero_module_among_others_is_fine(tmp_path: Path) -> None:
    tensors = q_pairs(SPEC)
    tensors[f"{PREFIX}.lora_B.weight"] *= 0
    report = check(tmp_path, tensors)
    assert report.ok
    assert report.modules[0].update_norm == 0.0


def test_another_base_name_is_a_warning_unless_strict(tmp_path: Path) -> None:
    config = config_values(base_model_name_or_path="/home/me/other-model")
    report = check(tmp_path, config=config)
    assert report.ok
    assert "other-model" in report.warnings[0]
    assert codes(check(tmp_path, config=config, strict_base=True)) == {"base_mismatch"}
    assert check(tmp_path, strict_base=True).ok


def test_a_base_that_others_know_by_another_name_is_the_same(tmp_path: Path) -> None:
    config = config_values(base_model_name_or_path="some-org/Other-Model")
    known = replace(SPEC, known_as=("some-org/other-model",))
    report = check(tmp_path, config=config, strict_base=True, spec=known)
    assert report.ok
    assert not report.warnings


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
def test_a_pattern_that_is_none_is_named_by_its_field(tmp_path: Path, field: str) -> None:
    report = check(tmp_path, config=config_values() | {field: {"(": 4}})
    assert [(p.code, p.where) for p in report.problems] == [("config_invalid", field)]


@pytest.mark.parametrize(
    ("changes", "code", "where"),
    [
        ({f"{PREFIX}.lora_A.weight": (4, 63)}, "shape_mismatch", f"{PREFIX}.lora_A.weight"),
        ({f"{PREFIX}.lora_A.weight": (4,)}, "shape_mismatch", f"{PREFIX}.lora_A.weight"),
        ({f"{PREFIX}.lora_B.weight": (64, 5)}, "shape_mismatch", f"{PREFIX}.lora_B.weight"),
        ({f"{PREFIX}.lora_B.weight": (4, 64)}, "shape_mismatch", f"{PREFIX}.lora_B.weight"),
        ({f"{PREFIX}.lora_B.weight": None}, "weights_invalid", Q0),
        ({f"{PREFIX}.lora_A.weight": None}, "weights_invalid", Q0),
        (
            {
                "base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight": (4, 64),
                "base_model.model.model.layers.9.self_attn.q_proj.lora_B.weight": (64, 4),
            },
            "unknown_module",
            "model.layers.9.self_attn.q_proj",
        ),
        ({f"{PREFIX}.lora_magnitude_vector": (64,)}, "config_unsupported", None),
        ({f"{PREFIX}.lora_B.bias": (64,)}, "config_invalid", Q0),
        ({f"{PREFIX}.base_layer.bias": (64,)}, "config_invalid", Q0),
        ({f"{PREFIX}.base_layer.weight": (64, 64)}, "config_unsupported", None),
        ({"base_model.model.model.norm.bias": (64,)}, "config_unsupported", "model.norm"),
        ({"base_model.model.lm_head.weight": (384, 64)}, "weights_invalid", None),
        ({"model.layers.0.self_attn.q_proj.lora_A.weight": (4, 64)}, "weights_invalid", None),
        ({f"{PREFIX}.lora_A.default.weight": (4, 64)}, "weights_invalid", None),
    ],
)
def test_tensors_that_do_not_fit(
    tmp_path: Path, changes: dict[str, Any], code: str, where: str | None
) -> None:
    tensors = q_pairs(SPEC)
    for name, shape in changes.items():
        tensors.pop(name, None)
        if shape is not None:
            tensors[name] = np.ones(shape, np.float32)
    report = check(tmp_path, tensors)
    expected = next(iter(changes)) if where is None else where
    assert (code, expected) in {(p.code, p.where) for p in report.problems}
    assert codes(report) <= {code, "shape_mismatch"}


EMBEDDING, HEAD = "model.embed_tokens", "lm_head"


def ends(module: str, weight: Array | None = None) -> dict[str, Array]:
    """A pair for the head or the embedding as PEFT names it, with a copy of the base's weight."""
    tensors = pair(module, SPEC)
    prefix = f"base_model.model.{module}"
    if module == EMBEDDING:
        for half in "AB":
            tensors[f"{prefix}.lora_embedding_{half}"] = tensors.pop(f"{prefix}.lora_{half}.weight")
    if weight is not None:
        tensors[f"{prefix}.base_layer.weight"] = weight
    return tensors


def spec_with_weight(module: str, weight: Array) -> BaseSpec:
    digest = hashlib.sha256(weight.astype("<f4").tobytes()).hexdigest()
    modules = SPEC.modules | {module: replace(SPEC.modules[module], values_sha256=digest)}
    return replace(SPEC, modules=modules)


@pytest.mark.parametrize("module", [HEAD, EMBEDDING])
def test_head_and_embedding_fit_with_a_true_copy_of_the_base(tmp_path: Path, module: str) -> None:
    weight = np.random.default_rng(3).standard_normal((384, 64)).astype(np.float32)
    spec = spec_with_weight(module, weight)
    config = config_values(target_modules=["q_proj", module])
    for copy in (None, weight):
        report = check(tmp_path, q_pairs(SPEC) | ends(module, copy), config, spec=spec)
        assert report.ok
        assert module in {each.module for each in report.modules}
    changed = weight.copy()
    changed[7, 7] += 1
    report = check(tmp_path, q_pairs(SPEC) | ends(module, changed), config, spec=spec)
    assert codes(report) == {"base_mismatch"}


def test_an_embedding_under_a_linears_names_is_refused(tmp_path: Path) -> None:
    config = config_values(target_modules=["q_proj", EMBEDDING])
    report = check(tmp_path, q_pairs(SPEC) | pair(EMBEDDING, SPEC), config)
    assert {(p.code, p.where) for p in report.problems} == {("weights_invalid", EMBEDDING)}


def biased(suffix: str, value: float = 1.0, width: int = 64) -> dict[str, Array]:
    """The q pairs with a bias for each of them."""
    tensors = q_pairs(SPEC)
    for name in list(tensors):
        if name.endswith(".lora_A.weight"):
            module = name.removesuffix(".lora_A.weight")
            tensors[module + suffix] = np.full(width, value, np.float32)
    return tensors


def test_lora_bias_needs_a_bias_of_the_right_width_for_every_pair(tmp_path: Path) -> None:
    config = config_values(lora_bias=True)
    report = check(tmp_path, biased(".lora_B.bias"), config)
    assert report.ok
    assert len(report.biases) == 2
    assert codes(check(tmp_path, q_pairs(SPEC), config)) == {"weights_invalid"}
    assert codes(check(tmp_path, biased(".lora_B.bias", width=63), config)) == {"shape_mismatch"}
    assert codes(check(tmp_path, biased(".lora_B.bias", np.nan), config)) == {"not_finite"}


def test_a_trained_bias_needs_one_in_the_base(tmp_path: Path) -> None:
    config, tensors = config_values(bias="lora_only"), biased(".base_layer.bias")
    assert codes(check(tmp_path, tensors, config)) == {"shape_mismatch"}
    modules = {
        name: replace(module, has_bias=name.endswith("q_proj"))
        for name, module in SPEC.modules.items()
    }
    assert check(tmp_path, tensors, config, spec=replace(SPEC, modules=modules)).ok


def test_ranks_of_config_and_tensors_must_agree(tmp_path: Path) -> None:
    assert codes(check(tmp_path, config=config_values(r=8))) == {"shape_mismatch"}
    patterned = config_values(r=8, rank_pattern={"q_proj": 4})
    assert check(tmp_path, config=patterned).ok


def test_the_largest_rank_is_a_limit(tmp_path: Path) -> None:
    assert check(tmp_path, q_pairs(SPEC, 256), config_values(r=256)).ok
    assert codes(check(tmp_path, q_pairs(SPEC, 257), config_values(r=257))) == {"rank_too_large"}
    # The config alone may ask for it as well; nothing is allocated for it.
    assert "rank_too_large" in codes(check(tmp_path, config=config_values(r=10**9)))


def test_config_and_tensors_must_mean_the_same_modules(tmp_path: Path) -> None:
    missed = check(tmp_path, config=config_values(target_modules=["q_proj", "k_proj"]))
    assert codes(missed) == {"config_invalid"}
    assert missed.missed == tuple(m for m in SPEC.modules if m.endswith("k_proj"))
    unexpected = check(tmp_path, config=config_values(target_modules=[Q0]))
    assert codes(unexpected) == {"config_invalid"}
    assert unexpected.unexpected == ("model.layers.1.self_attn.q_proj",)


def test_an_evil_pattern_is_answered_at_once(tmp_path: Path) -> None:
    started = time.perf_counter()
    report = check(tmp_path, config=config_values(target_modules=r"([a-z_.0-9]+)+X"))
    assert time.perf_counter() - started < 10
    assert codes(report) == {"config_invalid"}


def test_look_around_is_refused_by_name(tmp_path: Path) -> None:
    report = check(tmp_path, config=config_values(target_modules=r"(?!x).*q_proj"))
    assert [(p.code, p.where) for p in report.problems] == [
        ("config_unsupported", "target_modules")
    ]


def test_a_pickle_is_not_safetensors(tmp_path: Path) -> None:
    report = check(tmp_path, pickle.dumps({"weights": [1, 2, 3]}))
    assert codes(report) == {"weights_not_safetensors"}
    assert report.to_json()["no_effect"] is False


def test_both_files_are_checked_whatever_is_wrong_with_one(tmp_path: Path) -> None:
    report = check(tmp_path, b"not weights", b"not a config")
    assert codes(report) == {"config_invalid", "weights_not_safetensors"}
    report = check(tmp_path, {f"{PREFIX}.lora_A.weight": np.ones((4, 9), np.float32)}, b"{")
    assert codes(report) == {"config_invalid", "weights_invalid"}


def test_sizes_are_limited(tmp_path: Path) -> None:
    paths = write_adapter(tmp_path, q_pairs(SPEC), config_values())
    limits = AdapterLimits(max_config_bytes=10, max_weights_bytes=10)
    report = validate_adapter(*paths, SPEC, limits)
    assert codes(report) == {"too_large"}
    assert {p.where for p in report.problems} == {path.name for path in paths}


def test_an_empty_file_of_tensors_is_invalid(tmp_path: Path) -> None:
    assert "weights_invalid" in codes(check(tmp_path, weights_bytes({})))


def test_a_long_list_of_problems_is_cut(tmp_path: Path) -> None:
    names = {f"base_model.model.nowhere.{n}.x": np.ones(1, np.float32) for n in range(3000)}
    report = check(tmp_path, names)
    assert len(report.problems) < 100
    assert any("more problems" in problem.message for problem in report.problems)


def test_a_header_bomb_is_answered_at_once(tmp_path: Path) -> None:
    header = {
        f"t{n}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for n in range(200_000)
    }
    data = safetensors_bytes(header)
    started = time.perf_counter()
    assert "weights_invalid" in codes(check(tmp_path, data))
    assert time.perf_counter() - started < 10


def test_a_job_is_plain_data_that_another_process_can_do(tmp_path: Path) -> None:
    paths = write_adapter(tmp_path, q_pairs(SPEC), config_values())
    job = pickle.loads(pickle.dumps(ValidationJob(*paths, SPEC, LIMITS)))
    report = job.run()
    assert pickle.loads(pickle.dumps(report)) == report == validate_adapter(*paths, SPEC, LIMITS)


def test_header_helper_is_sane() -> None:
    assert header_of({"a": np.ones((2, 3), np.float32)})["a"]["data_offsets"] == [0, 24]


def test_checking_needs_no_torch() -> None:
    script = (
        "import sys, quickchange_adapters.validate, quickchange_adapters.catalog, "
        "quickchange_adapters.store; print(sorted({'torch', 'peft'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize(
    "pattern", [r"^(?!.*patch_embed).*(?:q_proj).*", r"^(model)(?=\.).*\.(q_proj)$", r"(q)_proj\1"]
)
def test_a_pattern_that_only_python_reads_is_refused_with_the_list_that_says_the_same(
    tmp_path: Path, pattern: str
) -> None:
    (problem,) = check(tmp_path, config=config_values(target_modules=pattern)).problems
    assert (problem.code, problem.where) == ("config_unsupported", "target_modules")
    names = json.loads(problem.hint.rpartition(": ")[2])
    assert names == ["q_proj"]
    assert check(tmp_path, config=config_values(target_modules=names)).ok
