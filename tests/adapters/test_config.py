"""What of an adapter_config.json is read, ignored, and refused by name."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from quickchange_adapters.config import ConfigReading, read_config

from tests.adapters.adapter_files import config_values

MODULE = "model.layers.1.self_attn.q_proj"


def read(**changes: Any) -> ConfigReading:
    return read_config(json.dumps(config_values(**changes)).encode())


def refusals(**changes: Any) -> list[tuple[str, str]]:
    reading = read(**changes)
    assert (reading.config is None) == bool(reading.problems)
    return [(problem.code, problem.where) for problem in reading.problems]


def test_a_config_that_peft_writes_is_accepted(tmp_path: Path) -> None:
    saved = LoraConfig(r=16, lora_alpha=32, target_modules=["q_proj"], task_type="CAUSAL_LM")
    saved.save_pretrained(str(tmp_path))
    reading = read_config((tmp_path / "adapter_config.json").read_bytes())
    assert reading.problems == ()
    assert reading.config is not None
    assert reading.config.rank == 16
    assert reading.config.alpha == 32
    assert reading.config.targets.target == ("q_proj",)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, 2.0),
        ({"use_rslora": True}, 4.0),
        ({"rank_pattern": {"q_proj": 16}}, 0.5),
        ({"rank_pattern": {"q_proj": 16}, "use_rslora": True}, 2.0),
        ({"alpha_pattern": {"layers.1.self_attn.q_proj": 1}}, 0.25),
        ({"alpha_pattern": {"layers.2.self_attn.q_proj": 1}}, 2.0),
        ({"rank_pattern": {".*_proj": 2}, "alpha_pattern": {"q_proj": 3.0}}, 1.5),
        ({"lora_alpha": -0.5}, -0.125),
    ],
)
def test_scaling(changes: dict[str, Any], expected: float) -> None:
    config = read(**changes).config
    assert config is not None
    assert config.scalings(config.ranks([MODULE])) == {MODULE: pytest.approx(expected)}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("use_dora", True),
        ("use_qalora", True),
        ("use_bdlora", {"nblocks": 2}),
        ("layer_replication", [[0, 2]]),
        ("modules_to_save", ["lm_head"]),
        ("trainable_token_indices", [1, 2]),
        ("target_parameters", ["mlp.experts"]),
        ("alora_invocation_tokens", [1]),
        ("megatron_config", {"tensor_model_parallel_size": 2}),
        ("arrow_config", {"top_k": 3}),
        ("kasa_config", {"beta": 0.1}),
        ("velora_config", {"num_groups": 4}),
        ("monteclora_config", {"num_samples": 4}),
        ("peft_type", "LOHA"),
        ("peft_type", ["LORA"]),
        ("a_field_of_the_future", 1),
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", "pissa_niter_16"),
        ("init_lora_weights", "PiSSA"),
        ("init_lora_weights", "olora"),
        ("init_lora_weights", "corda"),
        ("init_lora_weights", "lora_ga"),
        ("init_lora_weights", "loftq"),
        ("init_lora_weights", "of_the_future"),
        ("init_lora_weights", 1),
        ("init_lora_weights", {}),
    ],
)
def test_what_would_change_the_answer_is_refused_by_name(key: str, value: Any) -> None:
    assert refusals(**{key: value}) == [("config_unsupported", key)]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"init_lora_weights": "pissa"}, "path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": "lora_ga"}, "twice the rank"),
        ({"init_lora_weights": "olora", "use_rslora": True}, "twice the rank"),
        (
            {"init_lora_weights": "pissa", "use_rslora": True, "rank_pattern": {"q_proj": 2}},
            "cannot convert use_rslora",
        ),
        ({"init_lora_weights": "loftq"}, "no conversion"),
        ({"kasa_config": {"beta": 0.1}}, "no conversion"),
    ],
)
def test_the_refusal_of_what_changes_the_base_says_what_to_do(
    changes: dict[str, Any], words: str
) -> None:
    (problem,) = read(**changes).problems
    assert words in problem.hint


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("use_dora", False),
        ("use_dora", None),
        ("modules_to_save", []),
        ("layer_replication", None),
        ("bias", None),
        ("a_field_of_the_future", None),
        ("a_field_of_the_future", False),
        ("init_lora_weights", False),
        ("init_lora_weights", None),
        ("init_lora_weights", "gaussian"),
        ("init_lora_weights", "eva"),
        ("init_lora_weights", "orthogonal"),
        ("init_lora_weights", "mica"),
        ("eva_config", {"rho": 2.0}),
        ("corda_config", {"cache_file": "/etc/passwd"}),
        ("loftq_config", {"loftq_bits": 4}),
        ("auto_mapping", {"parent_library": "os"}),
        ("megatron_core", "megatron.core"),
        ("lora_dropout", 0.5),
        ("fan_in_fan_out", True),
        ("revision", "main"),
        ("inference_mode", True),
        ("r", None),
        ("lora_alpha", 8.5),
    ],
)
def test_what_does_not_change_the_answer_is_accepted(key: str, value: Any) -> None:
    assert refusals(**{key: value}) == []


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("r", 0),
        ("r", -1),
        ("r", 10**400),
        ("r", 1.5),
        ("r", True),
        ("r", "8"),
        ("lora_alpha", "8"),
        ("lora_alpha", True),
        ("use_rslora", 1),
        ("rank_pattern", {"q_proj": 0}),
        ("rank_pattern", ["q_proj"]),
        ("alpha_pattern", {"q_proj": None}),
        ("target_modules", None),
        ("target_modules", []),
        ("target_modules", 5),
        ("target_modules", ["q_proj", 5]),
        ("target_modules", ["q" * 1025]),
        ("target_modules", ["q_proj"] * 5000),
        ("exclude_modules", {"q": 1}),
        ("layers_to_transform", "1"),
        ("layers_to_transform", [-1]),
        ("layers_to_transform", [True]),
        ("layers_pattern", "layers"),
        ("peft_type", None),
        ("bias", "some"),
    ],
)
def test_wrong_values_are_invalid(key: str, value: Any) -> None:
    found = refusals(**{key: value})
    assert found
    assert all(each == ("config_invalid", key) for each in found)


def test_a_pattern_and_layers_exclude_each_other_as_in_peft() -> None:
    found = refusals(target_modules=".*q_proj", layers_to_transform=[1])
    assert found == [("config_invalid", "layers_to_transform")]


def test_all_problems_are_named_at_once() -> None:
    found = refusals(r=0, use_dora=True, bias="some", init_lora_weights="olora")
    assert {where for _, where in found} == {"r", "use_dora", "bias", "init_lora_weights"}


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"null",
        b"[]",
        b"{",
        b'{"r": 8, "r": 4}',
        b'{"rank_pattern": {"q": 1, "q": 2}}',
        b'{"lora_alpha": NaN}',
        b'{"lora_alpha": Infinity}',
        b'{"lora_alpha": 1e999}',
        b'{"r": ' + b"9" * 5000 + b"}",
        b'{"target_modules": "\\ud800"}',
        b"\xff\xfe{}",
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b"\x80\x04\x95",
    ],
)
def test_what_is_no_plain_json_object_is_invalid(data: bytes) -> None:
    reading = read_config(data)
    assert reading.config is None
    assert [problem.code for problem in reading.problems] == ["config_invalid"]


@settings(max_examples=200, deadline=None)
@given(data=st.binary(max_size=200))
def test_no_bytes_raise(data: bytes) -> None:
    assert read_config(data).problems


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=6,
)


@settings(max_examples=300, deadline=None)
@given(key=st.sampled_from(sorted({*config_values(), "layers_pattern", "exclude_modules"})), v=JSON)
def test_no_value_of_a_field_raises(key: str, v: Any) -> None:
    reading = read_config(json.dumps(config_values(**{key: v})).encode())
    assert (reading.config is None) == bool(reading.problems)


def test_another_task_type_is_a_warning() -> None:
    assert len(read(task_type="SEQ_CLS").warnings) == 1
    assert read().warnings == ()
