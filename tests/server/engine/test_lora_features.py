"""What a LoRA config can ask for, against PEFT: biases, head, embedding, some layers only."""

from pathlib import Path
from typing import Any

import pytest
import torch
from quickchange_adapters.limits import AdapterLimits
from quickchange_adapters.structure import check_structure
from quickchange_server.engine.request import AdapterRef

from tests.conftest import LLAMA_LINEARS, save_peft_adapter, save_tiny_base
from tests.server.engine.conftest import make_engine, peft_weights, run_all
from tests.server.engine.test_engine_peft import Oracle, full_logprobs, prompt_of, request

VOCAB = 381
ALL = list(LLAMA_LINEARS)
FEATURES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "layers_to_transform": ({}, {"target_modules": ALL, "layers_to_transform": [1]}),
    "layers_pattern": (
        {},
        {"target_modules": ALL, "layers_to_transform": [0], "layers_pattern": "layers"},
    ),
    "exclude_modules": ({}, {"target_modules": ALL, "exclude_modules": ["k_proj", "up_proj"]}),
    "regex-targets": ({}, {"target_modules": r".*layers\.1\..*(q|down)_proj"}),
    "all-linear": ({}, {"target_modules": "all-linear"}),
    "lora_bias": ({}, {"target_modules": ALL, "lora_bias": True}),
    "bias-lora_only": (
        {"attention_bias": True, "mlp_bias": True},
        {"target_modules": ["q_proj", "v_proj", "down_proj"], "bias": "lora_only"},
    ),
    "lm_head-tied": ({}, {"target_modules": ["q_proj", "lm_head"]}),
    "lm_head-untied": ({"tie_word_embeddings": False}, {"target_modules": ["lm_head"]}),
    "embedding-tied": ({}, {"target_modules": ["embed_tokens", "v_proj"]}),
    "embedding-untied": ({"tie_word_embeddings": False}, {"target_modules": ["embed_tokens"]}),
    "head-and-embedding": (
        {"tie_word_embeddings": False},
        {"target_modules": ["embed_tokens", "lm_head", "o_proj"], "r": 12},
    ),
}


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("is_merged", [False, True], ids=["mixed", "merged"])
async def test_a_feature_computes_what_peft_computes(
    tmp_path: Path, feature: str, is_merged: bool
) -> None:
    overrides, config = FEATURES[feature]
    base = save_tiny_base(tmp_path / "base", **overrides)
    folder = save_peft_adapter(tmp_path / "adapter", base, **config)
    plain = save_peft_adapter(tmp_path / "plain", base, r=4, seed=9)
    oracle = Oracle(base, [folder, plain])
    assert (oracle.logprobs(0, prompt_of(9, 1)) - oracle.logprobs(None, prompt_of(9, 1))).any()
    engine = make_engine(base, max_step_tokens=32)
    await engine.start()
    try:
        await engine.load_adapter(peft_weights(folder, "it"))
        await engine.load_adapter(peft_weights(plain, "plain"))
        files = (folder / "adapter_config.json", folder / "adapter_model.safetensors")
        structure = check_structure(*files, engine.base, AdapterLimits())
        assert engine.packed_size(structure) == engine.size_of("it")
        prompts = [prompt_of(length, length) for length in (50, 21, 9)]
        rows: list[tuple[str | None, int | None]] = [("it", 0), ("plain", 1), (None, None)]
        if is_merged:
            await engine.merge("it")
            rows = [("it", 0)] * 3
        answers = await run_all(
            engine,
            [request(f"r{i}", prompts[i], rows[i][0], 8, VOCAB) for i in range(3)],
        )
    finally:
        await engine.stop()
    for (_, index), prompt, answer in zip(rows, prompts, answers, strict=True):
        tokens = [*prompt, *answer.token_ids]
        expected = oracle.logprobs(index, tokens[:-1])[len(prompt) - 1 :]
        torch.testing.assert_close(full_logprobs(answer), expected, atol=1e-4, rtol=0)


async def test_biases_are_weighted_in_a_mix(tmp_path: Path) -> None:
    base = save_tiny_base(tmp_path / "base")
    folders = [
        save_peft_adapter(tmp_path / f"a{i}", base, seed=i, lora_bias=True, r=4) for i in range(2)
    ]
    engine = make_engine(base)
    await engine.start()
    try:
        parts = [peft_weights(folder, f"a{i}") for i, folder in enumerate(folders)]
        for part in parts:
            await engine.load_adapter(part)
        ask = request("half", prompt_of(20, 3), None, 6, VOCAB)
        weights = (0.5, 0.5)
        mixes = [
            tuple(AdapterRef(p.digest, w) for p, w in zip(parts, weights, strict=True)),
            (AdapterRef("a0"),),
        ]
        both = [
            type(ask)(f"m{i}", ask.prompt_ids, mix, ask.sampling, 6, ignore_eos=True)
            for i, mix in enumerate(mixes)
        ]
        same = type(ask)(
            "same", ask.prompt_ids, (AdapterRef("a0", 0.5), AdapterRef("a0", 0.5)), ask.sampling, 6,
            ignore_eos=True,
        )  # fmt: skip
        mixed, alone, doubled = await run_all(engine, [*both, same])
    finally:
        await engine.stop()
    torch.testing.assert_close(full_logprobs(doubled), full_logprobs(alone), atol=1e-4, rtol=0)
    assert (full_logprobs(mixed)[0] - full_logprobs(alone)[0]).abs().max() > 1e-3
