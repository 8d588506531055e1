"""The engine with the GPU's kernels, in Triton's interpreter, against the engine without them.

Decode steps take the way of captured steps, with padding rows; on a CPU they are computed again
instead of replayed.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from quickchange_adapters.pool import AdapterPool
from quickchange_adapters.weights import AdapterWeights
from quickchange_server.engine.attention_tiles import KvRow
from quickchange_server.engine.base_model import load_base
from quickchange_server.engine.cuda_graphs import DecodeInputs, DecodeStep
from quickchange_server.engine.model_runner import ModelRunner
from quickchange_server.engine.request import AdapterRef, GenerationRequest, SamplingParams
from quickchange_server.engine.settings import EngineSettings

from tests.conftest import MakeAdapter, save_tiny_base
from tests.server.engine.conftest import MIB, Answer, make_engine, peft_weights, run_all
from tests.server.engine.host_reads import HostReads
from tests.server.engine.test_engine_peft import full_logprobs, prompt_of

pytest.importorskip("triton", reason="the kernels need Triton, which is made for Linux only")

from quickchange_server.engine.fused_layers import fused_refusal
from quickchange_server.engine.triton_kernels import TritonKernels

VOCAB = 381
WINDOWED = {
    "head_dim": 16,
    "attn_logit_softcapping": 2.0,
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention"],
}


def ask(name: str, length: int, *adapters: tuple[str, float], num: int = 3) -> GenerationRequest:
    return GenerationRequest(
        name,
        prompt_of(length, length),
        tuple(AdapterRef(digest, weight) for digest, weight in adapters),
        SamplingParams(temperature=0, logprobs=VOCAB),
        max_tokens=num,
        ignore_eos=True,
    )


async def answers(
    base: Path,
    requests: list[GenerationRequest],
    weights: list[AdapterWeights],
    **settings: Any,
) -> list[Answer]:
    engine = make_engine(base, **settings)
    await engine.start()
    try:
        for version in weights:
            await engine.load_adapter(version)
        return await run_all(engine, requests)
    finally:
        await engine.stop()


async def assert_agree(
    base: Path, requests: list[GenerationRequest], weights: list[AdapterWeights], **settings: Any
) -> None:
    plain = await answers(base, requests, weights, **settings)
    kernels = await answers(base, requests, weights, kernels="triton", **settings)
    for expected, actual in zip(plain, kernels, strict=True):
        assert actual.finish_reason == "length"
        assert actual.token_ids == expected.token_ids
        torch.testing.assert_close(
            full_logprobs(actual), full_logprobs(expected), atol=1e-4, rtol=0
        )


async def test_a_mixed_batch_has_the_answers_of_the_plain_paths(
    tiny_base: Path, make_adapter: MakeAdapter
) -> None:
    weights = [
        peft_weights(make_adapter(seed=1), "one"),
        peft_weights(make_adapter(seed=2, r=20, target_modules=["q_proj", "down_proj"]), "two"),
    ]
    requests = [
        ask("base", 3),
        ask("one", 21, ("one", 1.0)),
        ask("mix", 5, ("two", 0.5), ("one", -0.3)),
    ]
    await assert_agree(tiny_base, requests, weights)


async def test_steps_launched_ahead_have_the_answers_of_the_plain_paths(
    tiny_base: Path, make_adapter: MakeAdapter
) -> None:
    """Tokens go from one step's result into the next one's input without the host."""
    weights = peft_weights(make_adapter(seed=1), "a")
    asks = [
        replace(ask(name, 3, *mix, num=num), sampling=SamplingParams(seed=num))
        for name, mix, num in (("base", (), 5), ("adapted", (("a", 1.0),), 6))
    ]
    plain = await answers(tiny_base, asks, [weights])
    engine = make_engine(tiny_base, kernels="triton", max_batch_rows=2)
    await engine.start()
    await engine.load_adapter(weights)
    found = await run_all(engine, asks)
    assert engine._engine.ahead.num_launched > 2
    await engine.stop()
    assert [answer.token_ids for answer in found] == [answer.token_ids for answer in plain]


async def test_windows_and_caps_reach_the_kernel(tmp_path: Path) -> None:
    base = save_tiny_base(tmp_path / "base", "gemma2", **WINDOWED)
    await assert_agree(base, [ask("a", 20), ask("b", 1)], [], cuda_graphs=False)


async def test_an_adapter_of_the_head_is_not_left_out_of_a_decode_step(
    tmp_path: Path, make_adapter: MakeAdapter
) -> None:
    """Captured steps know nothing of the vocabulary's two ends; such rows go the plain way."""
    base = save_tiny_base(tmp_path / "base", tie_word_embeddings=False)
    folder = make_adapter(base, target_modules=["q_proj", "lm_head", "embed_tokens"])
    await assert_agree(base, [ask("a", 4, ("ends", 1.0))], [peft_weights(folder, "ends")])


@pytest.mark.parametrize(
    ("model_type", "is_fused"), [("llama", True), ("llama", False), ("gemma2", False)]
)
def test_a_decode_step_never_waits_for_the_device(
    tmp_path: Path, model_type: str, *, is_fused: bool
) -> None:
    folder = save_tiny_base(tmp_path / "base", model_type)
    settings = EngineSettings(kernels="triton", max_batch_rows=2, fused_layers=is_fused)
    base = load_base(folder, settings)
    pool = AdapterPool(base.layout, MIB, base.dtype, base.device)
    runner = ModelRunner(base, pool, MIB, settings.kv_block_size, settings)
    kernels = TritonKernels(pool, runner.storage, runner.kv_shapes, 2, 0, base.max_model_len)
    inputs = DecodeInputs(kernels.attention, 2, settings.kv_block_size, base.device)
    rows = [KvRow(0, 4, 1, [1]), KvRow(1, 20, 1, [2, 3])]
    batch = inputs.fill(DecodeStep([5, 6], rows, []), 2)
    with torch.inference_mode(), HostReads() as reads:
        logits = runner.decode(batch, kernels.deltas)
    assert reads.names == []
    assert torch.isfinite(logits).all()
    with HostReads() as reads:
        int(torch.tensor([5]))
    assert reads.names, "the mode notes such reads"


FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "mistral": {"sliding_window": 8},
    "qwen2": {},
    "qwen3": {"head_dim": 24},
}


@pytest.mark.parametrize("model_type", list(FAMILIES))
async def test_fused_blocks_compute_what_the_models_own_modules_do(
    tmp_path: Path, model_type: str
) -> None:
    base = save_tiny_base(tmp_path / "base", model_type, **FAMILIES[model_type])
    loaded = load_base(base, EngineSettings(kernels="triton"))
    assert fused_refusal(loaded) is None
    await assert_agree(base, [ask("a", 20), ask("b", 1)], [])


@pytest.mark.parametrize(
    ("model_type", "values", "reason"),
    [
        ("gemma2", {}, "not of Llama's shape"),
        ("llama", {"hidden_act": "relu"}, "activation is 'relu'"),
    ],
)
async def test_other_bases_are_computed_by_their_own_modules(
    tmp_path: Path, model_type: str, values: dict[str, Any], reason: str
) -> None:
    base = save_tiny_base(tmp_path / "base", model_type, **values)
    refusal = fused_refusal(load_base(base, EngineSettings(kernels="triton")))
    assert refusal is not None
    assert reason in refusal
    await assert_agree(base, [ask("a", 20)], [], cuda_graphs=False)


async def test_adapters_reach_every_group_of_fused_blocks(
    tiny_base: Path, make_adapter: MakeAdapter
) -> None:
    """Each linear by itself: one whose delta was left out would leave the base's answer."""
    modules = ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
    weights = [
        peft_weights(make_adapter(seed=index, r=4, target_modules=[module]), module)
        for index, module in enumerate(modules)
    ]
    requests = [ask(module, 6, (module, 1.0)) for module in modules]
    await assert_agree(tiny_base, [*requests, ask("base", 6)], weights)


async def test_products_of_few_rows_change_no_answer(tiny_base: Path) -> None:
    plain = await answers(tiny_base, [ask("a", 5), ask("b", 3)], [], kernels="triton")
    settings: dict[str, Any] = {"kernels": "triton", "skinny_products": True}
    skinny = await answers(tiny_base, [ask("a", 5), ask("b", 3)], [], **settings)
    for expected, actual in zip(plain, skinny, strict=True):
        assert actual.token_ids == expected.token_ids
        torch.testing.assert_close(
            full_logprobs(actual), full_logprobs(expected), atol=1e-4, rtol=0
        )


def test_a_warm_runner_has_captured_its_steps_and_touched_the_scratch_block_alone(
    tiny_base: Path,
) -> None:
    settings = EngineSettings(kernels="triton", max_batch_rows=4)
    base = load_base(tiny_base, settings)
    pool = AdapterPool(base.layout, MIB, base.dtype, base.device)
    runner = ModelRunner(base, pool, MIB, settings.kv_block_size, settings)
    runner.warm_up()
    assert runner.graphs is not None
    assert runner.graphs.num_captured == 4
    assert runner.storage.keys[0][0].any()
    assert not any(each[1:].any() for each in (*runner.storage.keys, *runner.storage.values))
