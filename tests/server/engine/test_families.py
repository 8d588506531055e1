"""Every family of bases against the unmodified Hugging Face model, with and without an adapter."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from quickchange_server.engine.base_model import load_base
from quickchange_server.engine.self_check import check_architecture
from quickchange_server.engine.settings import EngineSettings
from quickchange_server.engine.unsupported import UnsupportedBase
from safetensors.torch import load_file, save_file

from tests.conftest import save_peft_adapter, save_tiny_base
from tests.server.engine.conftest import collect, make_engine, run_all
from tests.server.engine.test_engine_peft import (
    Oracle,
    full_logprobs,
    load_all,
    prompt_of,
    request,
)

VOCAB = 381
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Family:
    """A tiny base of one family: config overrides, and which linears its adapters target."""

    model_type: str
    overrides: dict[str, Any] = field(default_factory=dict)
    targets: list[str] = field(default_factory=lambda: LINEARS)


GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512, "n_inner": 128}
SLIDING = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}
FAMILIES = {
    "llama": Family("llama"),
    "llama-untied": Family("llama", {"tie_word_embeddings": False}),
    "llama-no-gqa": Family("llama", {"num_key_value_heads": 4}),
    "llama-biases": Family("llama", {"attention_bias": True, "mlp_bias": True}),
    "qwen2": Family("qwen2"),
    "qwen2-sliding": Family("qwen2", {"use_sliding_window": True, **SLIDING}),
    "qwen3": Family("qwen3", {"head_dim": 32}),
    "mistral": Family("mistral", {"sliding_window": 16}),
    "gemma2": Family(
        "gemma2",
        {
            "head_dim": 16,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
            "query_pre_attn_scalar": 4,
            **SLIDING,
        },
    ),
    "gemma3": Family("gemma3_text", {"head_dim": 16, "query_pre_attn_scalar": 16, **SLIDING}),
    "phi3": Family(
        "phi3",
        {"sliding_window": 24, "original_max_position_embeddings": 512},
        ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
    ),
    "gpt2": Family("gpt2", GPT2, ["c_attn", "c_fc", "attn.c_proj", "mlp.c_proj"]),
}


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Family:
    chosen: Family = FAMILIES[request.param]
    return chosen


@pytest.fixture
def base(tmp_path: Path, family: Family) -> Path:
    return save_tiny_base(tmp_path / "base", family.model_type, **family.overrides)


@pytest.fixture
def adapter(tmp_path: Path, base: Path, family: Family) -> Path:
    is_conv1d = family.model_type == "gpt2"
    return save_peft_adapter(
        tmp_path / "adapter", base, r=8, target_modules=family.targets, fan_in_fan_out=is_conv1d
    )


async def test_a_family_answers_as_hugging_face_and_peft_do(base: Path, adapter: Path) -> None:
    """Prompts are longer than the window and the chunk; decode crosses blocks."""
    oracle = Oracle(base, [adapter])
    engine = make_engine(base, max_step_tokens=32)
    await engine.start()
    try:
        digest = (await load_all(engine, [adapter]))[0]
        rows = [None, digest, None, digest]
        prompts = [prompt_of(length, length) for length in (100, 61, 7, 33)]
        pairs = list(zip(prompts, rows, strict=True))
        mixed = await run_all(
            engine, [request(f"m{i}", p, d, 20, VOCAB) for i, (p, d) in enumerate(pairs)]
        )
        alone = await collect(engine.generate(request("alone", prompts[1], digest, 20, None)))
    finally:
        await engine.stop()
    for (prompt, row), answer in zip(pairs, mixed, strict=True):
        index = None if row is None else 0
        tokens = [*prompt, *answer.token_ids]
        expected = oracle.logprobs(index, tokens[:-1])[len(prompt) - 1 :]
        torch.testing.assert_close(full_logprobs(answer), expected, atol=1e-4, rtol=0)
        assert answer.token_ids == oracle.generate(index, prompt, 20)
    assert alone.token_ids == mixed[1].token_ids


LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 8,
    "long_factor": [1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 9.0],
    "original_max_position_embeddings": 64,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}


@pytest.mark.parametrize(
    ("model_type", "rope", "short_context"),
    [("phi3", LONGROPE, 64), ("llama", DYNAMIC, 512)],
)
async def test_one_set_of_rotary_frequencies_serves_everybody(
    tmp_path: Path, model_type: str, rope: dict[str, Any], short_context: int
) -> None:
    base = save_tiny_base(
        tmp_path / "base",
        model_type,
        rope_parameters=rope,
        **({"original_max_position_embeddings": 64} if model_type == "phi3" else {}),
    )
    oracle = Oracle(base, [])
    short, long = prompt_of(20, 1), prompt_of(200, 2)
    ask = request("short", short, None, 10, VOCAB)

    async def answers(max_model_len: int, *, has_neighbour: bool) -> list[torch.Tensor]:
        engine = make_engine(base, max_model_len=max_model_len)
        await engine.start()
        mates = [request("long", long, None, 10, VOCAB)] if has_neighbour else []
        made = await run_all(engine, [ask, *mates])
        await engine.stop()
        return [full_logprobs(answer) for answer in made]

    alone = await answers(512, has_neighbour=False)
    beside = await answers(512, has_neighbour=True)
    assert torch.equal(alone[0], beside[0])
    tokens = [*long, *oracle.generate(None, long, 10)]
    expected = oracle.logprobs(None, tokens[:-1])[len(long) - 1 :]
    torch.testing.assert_close(beside[1], expected, atol=1e-4, rtol=0)
    limited = await answers(short_context, has_neighbour=False)
    tokens = [*short, *oracle.generate(None, short, 10)]
    expected = oracle.logprobs(None, tokens[:-1])[len(short) - 1 :]
    torch.testing.assert_close(limited[0], expected, atol=1e-4, rtol=0)


def rewrite_config(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"layer_types": ["linear_attention", "full_attention"]}, "linear_attention"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantised"),
        ({"model_type": "never-heard-of"}, "never-heard-of"),
    ],
)
def test_a_base_that_cannot_work_is_refused_with_the_reason(
    tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    base = save_tiny_base(tmp_path / "base", "qwen2")
    rewrite_config(base, **changes)
    with pytest.raises(UnsupportedBase, match=reason):
        make_engine(base)


def test_a_family_that_computes_differently_here_is_found_out_at_start(tmp_path: Path) -> None:
    """Attention sinks reach the attention function as a keyword that is not served."""
    base = save_tiny_base(tmp_path / "base", "gpt_oss", num_local_experts=2, head_dim=16)
    with pytest.raises(UnsupportedBase, match="gpt_oss"):
        make_engine(base)


def test_the_check_of_the_architecture_says_nothing_about_kernels(
    tiny_base: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        check_architecture(tiny_base)
    assert "kernels" not in caplog.text


@pytest.mark.parametrize("model_type", ["bloom", "falcon", "gptj", "mamba", "rwkv"])
def test_families_beyond_the_engine_are_refused_by_name(tmp_path: Path, model_type: str) -> None:
    overrides = {
        "n_embd": 64,
        "n_layer": 2,
        "n_head": 4,
        "rotary_dim": 8,
        "attention_hidden_size": 64,
    }
    base = save_tiny_base(tmp_path / "base", model_type, **overrides)
    with pytest.raises(UnsupportedBase, match=model_type):
        make_engine(base)


def test_the_digest_covers_the_bias_of_the_head(tmp_path: Path) -> None:
    digests = set()
    for bias in (0.0, 1.0):
        base = save_tiny_base(tmp_path / str(bias), "phi", tie_word_embeddings=False)
        path = base / "model.safetensors"
        tensors = load_file(path)
        tensors["lm_head.bias"] = torch.full_like(tensors["lm_head.bias"], bias)
        save_file(tensors, path, {"format": "pt"})
        digests.add(load_base(base, EngineSettings(dtype="float32")).digest)
    assert len(digests) == 2


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedBase, match=r"config\.json"):
        make_engine(tmp_path)
