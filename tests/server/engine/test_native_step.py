"""Steps of the native library: as near to float32 as the plain paths, and the same bits always.

Bases and adapters hold numbers that bfloat16 can hold, so that PEFT in float32 is the oracle.
"""

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from quickchange_adapters.weights import AdapterWeights, LoraPair
from quickchange_server.engine.base_model import load_base
from quickchange_server.engine.client import EngineClient
from quickchange_server.engine.native_step import NativeStep, StepInput
from quickchange_server.engine.request import AdapterRef, GenerationRequest, SamplingParams
from quickchange_server.engine.settings import EngineSettings
from quickchange_server.engine.unsupported import UnsupportedBase
from safetensors.torch import load_file, save_file

from tests.conftest import save_peft_adapter, save_tiny_base
from tests.server.engine.conftest import (
    Answer,
    Recorder,
    collect,
    make_engine,
    peft_weights,
    run_all,
)
from tests.server.engine.native import HAS_AMX, instructions, needs_native
from tests.server.engine.test_engine_peft import Oracle, prompt_of

VOCAB = 381
SLIDING = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}
BASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-untied-no-gqa": ("llama", {"tie_word_embeddings": False, "num_key_value_heads": 4}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-wide-heads-gelu": ("llama", {"head_dim": 96, "hidden_act": "gelu_pytorch_tanh"}),
    "llama-3-heads": (
        "llama",
        {"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 2},
    ),
    "llama-5-heads": (
        "llama",
        {"hidden_size": 160, "num_attention_heads": 5, "num_key_value_heads": 1},
    ),
    "llama-one-kv-head": ("llama", {"num_attention_heads": 32, "num_key_value_heads": 1}),
    "qwen2": ("qwen2", {"hidden_size": 128}),
    "qwen2-sliding": ("qwen2", {"hidden_size": 128, "use_sliding_window": True, **SLIDING}),
    "qwen3": ("qwen3", {}),
    "mistral": ("mistral", {"sliding_window": 16}),
}
ADAPTERS: list[dict[str, Any]] = [
    {"r": 8},
    {"r": 3, "target_modules": ["q_proj", "v_proj", "down_proj"], "lora_bias": True},
    {"r": 20, "target_modules": ["o_proj", "up_proj", "lm_head", "embed_tokens"]},
]

DECODED: list[tuple[int | tuple[int, float], ...]] = [(), (0,), (1,), (2,), ((0, 0.5), (1, 2.0))]

pytestmark = needs_native


@pytest.fixture(autouse=True, params=["vectors", "soft tiles", *(["tiles"] if HAS_AMX else [])])
def set_of_instructions(request: pytest.FixtureRequest) -> Iterator[None]:
    """By AVX-512 alone, and with products and attention by AMX."""
    with instructions(request.param):
        yield


def round_numbers(folder: Path, file: str) -> Path:
    """Keep of every number in a file what bfloat16 can hold."""
    tensors = load_file(folder / file)
    rounded = {name: tensor.bfloat16().to(tensor.dtype) for name, tensor in tensors.items()}
    save_file(rounded, folder / file, metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def base_of(tmp_path_factory: pytest.TempPathFactory) -> Any:
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            model_type, overrides = BASES[name]
            folder = tmp_path_factory.mktemp("base") / name
            save_tiny_base(folder, model_type, **{"head_dim": 32, **overrides})
            made[name] = round_numbers(folder, "model.safetensors")
        return made[name]

    return make


@pytest.fixture(scope="module")
def folders_of(tmp_path_factory: pytest.TempPathFactory, base_of: Any) -> Any:
    made: dict[str, list[Path]] = {}

    def make(name: str) -> list[Path]:
        if name not in made:
            parent = tmp_path_factory.mktemp("adapters")
            made[name] = [
                round_numbers(
                    save_peft_adapter(parent / str(i), base_of(name), seed=i, **config),
                    "adapter_model.safetensors",
                )
                for i, config in enumerate(ADAPTERS)
            ]
        return made[name]

    return make


@asynccontextmanager
async def serving(
    base: Path, folders: Sequence[Path], **settings: Any
) -> AsyncIterator[EngineClient]:
    values: dict[str, Any] = {"dtype": "bfloat16", "kernels": "native", "num_threads": 2}
    engine = make_engine(base, **{**values, **settings})
    await engine.start()
    try:
        for index, folder in enumerate(folders):
            await engine.load_adapter(peft_weights(folder, f"a{index}"))
        yield engine
    finally:
        await engine.stop()


def ask(
    name: str,
    prompt: Sequence[int],
    *adapters: int | tuple[int, float],
    num: int = 1,
    scope: str = "",
    is_scored: bool = True,
) -> GenerationRequest:
    pairs = [(each, 1.0) if isinstance(each, int) else each for each in adapters]
    return GenerationRequest(
        name,
        tuple(prompt),
        tuple(AdapterRef(f"a{index}", weight) for index, weight in pairs),
        SamplingParams(temperature=0, logprobs=VOCAB),
        max_tokens=num,
        ignore_eos=True,
        cache_scope=scope,
        prompt_logprobs=VOCAB if is_scored else None,
    )


def scores(entries: Sequence[Any]) -> torch.Tensor:
    """Log probabilities [places, vocabulary] of an answer's entries."""
    rows = torch.empty(len(entries), VOCAB)
    for row, entry in zip(rows, entries, strict=True):
        for token_id, value in entry.top:
            row[token_id] = value
    return rows


def prompt_scores(answer: Answer) -> torch.Tensor:
    return scores(answer.prompt_logprobs[1:])


def batch() -> list[GenerationRequest]:
    """The base, each adapter and a mix; longer than the chunk, the window and a block."""
    return [
        ask("base", prompt_of(70, 1)),
        ask("zero", prompt_of(61, 2), 0),
        ask("one", prompt_of(33, 3), 1),
        ask("two", prompt_of(90, 4), 2),
        ask("mix", prompt_of(45, 5), (0, 0.5), (2, -0.25)),
        ask("short", prompt_of(2, 6), 0),
    ]


async def scored(base: Path, folders: Sequence[Path], **settings: Any) -> list[torch.Tensor]:
    async with serving(base, folders, **settings) as engine:
        return [prompt_scores(answer) for answer in await run_all(engine, batch())]


@pytest.mark.parametrize("name", BASES)
async def test_scores_are_as_near_to_float32_as_the_plain_paths(
    name: str, base_of: Any, folders_of: Any
) -> None:
    base, folders = base_of(name), folders_of(name)
    oracle = Oracle(base, folders)
    native = await scored(base, folders)
    plain = await scored(base, folders, kernels="plain")
    exact = await scored(base, folders, kernels="plain", dtype="float32")
    for asked, ours, theirs, wanted in zip(batch(), native, plain, exact, strict=True):
        if len(asked.adapters) < 2:  # PEFT cannot mix; float32's own test against PEFT can
            index = int(asked.adapters[0].digest[1:]) if asked.adapters else None
            torch.testing.assert_close(
                wanted, oracle.logprobs(index, asked.prompt_ids)[:-1], atol=2e-4, rtol=0
            )
        error, allowed = (ours - wanted).abs(), (theirs - wanted).abs()
        assert error.mean() <= 1.2 * allowed.mean() + 1e-3, asked.request_id
        assert error.max() <= 1.5 * allowed.max() + 2e-2, asked.request_id


@pytest.mark.parametrize("name", ["llama", "qwen2-sliding"])
async def test_a_tokens_bits_do_not_depend_on_anything_around_it(
    name: str, base_of: Any, folders_of: Any
) -> None:
    """Alone or not, in whatever chunks, on one thread or two, decoded or prefilled, preempted."""
    base, folders = base_of(name), folders_of(name)
    mixed = await scored(base, folders)
    for asked, wanted in zip(batch(), mixed, strict=True):
        async with serving(base, folders, max_step_tokens=17, num_threads=1) as engine:
            answer = await collect(engine.generate(asked))
            assert torch.equal(prompt_scores(answer), wanted), asked.request_id


@pytest.mark.parametrize(
    "name",
    [
        *("llama", "llama-wide-heads-gelu", "llama-3-heads", "llama-5-heads"),
        *("llama-one-kv-head", "qwen2-sliding"),
    ],
)
async def test_decode_has_the_bits_of_prefill_with_prefix_reuse_and_preemption(
    name: str, base_of: Any, folders_of: Any
) -> None:
    base, folders = base_of(name), folders_of(name)
    asks = [
        ask(f"r{i}", prompt_of(20 + i, i), *rows, num=30, is_scored=False)
        for i, rows in enumerate(DECODED)
    ]
    recorder = Recorder()
    async with serving(base, folders) as engine:
        roomy = await run_all(engine, asks)
        again = await run_all(
            engine, [dataclasses.replace(a, request_id=f"again-{a.request_id}") for a in asks]
        )
        block_bytes = engine.snapshot().memory_bytes["kv_total"]
        block_bytes //= engine.snapshot().kv_blocks_total + 1
        assert all(answer.num_cached >= 16 for answer in again)
        for asked, answer in zip(asks, roomy, strict=True):
            tokens = [*asked.prompt_ids, *answer.token_ids]
            whole = dataclasses.replace(
                asked,
                request_id=f"whole-{asked.request_id}",
                prompt_ids=tuple(tokens),
                max_tokens=1,
                prompt_logprobs=VOCAB,
                cache_scope="whole",
            )
            prefilled = prompt_scores(await collect(engine.generate(whole)))
            decoded = scores(answer.logprobs)
            assert torch.equal(prefilled[len(asked.prompt_ids) - 1 :], decoded)
    small = {"kv_cache_bytes": 9 * block_bytes, "observer": recorder}
    async with serving(base, folders, **small) as engine:
        crowded = await run_all(engine, asks)
    assert sum(step.num_preempted for step in recorder.steps) > 0
    for first, second, third in zip(roomy, again, crowded, strict=True):
        assert first.token_ids == second.token_ids == third.token_ids
        assert torch.equal(scores(first.logprobs), scores(second.logprobs))
        assert torch.equal(scores(first.logprobs), scores(third.logprobs))


async def test_a_merged_copy_answers_as_its_adapter_and_the_base_stays(
    base_of: Any, folders_of: Any
) -> None:
    base, folders = base_of("llama-biases"), folders_of("llama-biases")
    async with serving(base, folders, merged_bytes=1 << 24) as engine:
        for index in range(3):
            asked = ask(f"u{index}", prompt_of(40, index), index)
            unmerged = prompt_scores(await collect(engine.generate(asked)))
            await engine.merge(f"a{index}")
            asked = dataclasses.replace(asked, request_id=f"m{index}", cache_scope="merged")
            merged = prompt_scores(await collect(engine.generate(asked)))
            await engine.unmerge(f"a{index}")
            torch.testing.assert_close(merged, unmerged, atol=0.1, rtol=0)
            assert not torch.equal(merged, unmerged)
        assert await engine.base_checksum() == engine.base.digest


async def test_rows_of_one_adapter_are_computed_together(
    base_of: Any, folders_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[list[int]] = []
    run = NativeStep.run

    def noting_run(native: NativeStep, step: StepInput, merged: Any) -> Any:
        if len(step.wanted) == len(step.positions):  # a token of each row
            sizes.append([block.num_rows for block in step.blocks])
        return run(native, step, merged)

    monkeypatch.setattr(NativeStep, "run", noting_run)
    num = 200  # long enough to meet on a busy machine
    asked = [ask(f"r{i}", prompt_of(9, i), i % 2, num=num, is_scored=False) for i in range(6)]
    async with serving(base_of("llama"), folders_of("llama")) as engine:
        await run_all(engine, [*asked, ask("base", prompt_of(9, 6), num=num, is_scored=False)])
    assert all(len(each) <= 2 for each in sizes)
    assert any(min(each) > 1 for each in sizes if len(each) == 2)


async def test_a_neighbours_overflow_stays_alone(base_of: Any, folders_of: Any) -> None:
    """Rows with finite numbers have the very bits that they have without the bad neighbour."""
    base, folders = base_of("llama"), folders_of("llama")
    weights = peft_weights(folders[0])
    pairs = {m: LoraPair(p.lora_a * 1e25, p.lora_b * 1e25) for m, p in weights.pairs.items()}
    sound = [ask("b", prompt_of(40, 1)), ask("a", prompt_of(50, 2), 1)]
    async with serving(base, folders) as engine:
        await engine.load_adapter(AdapterWeights("a9", pairs))
        alone = [prompt_scores(answer) for answer in await run_all(engine, sound)]
        bad = ask("bad", prompt_of(60, 3), 9, num=5, is_scored=False)
        fresh = [
            dataclasses.replace(s, request_id=f"{s.request_id}2", cache_scope="x") for s in sound
        ]
        failed, *rest = await asyncio.gather(
            collect(engine.generate(bad)), *(collect(engine.generate(each)) for each in fresh)
        )
        assert failed.last is not None
        assert failed.last.failure is not None
        assert failed.last.failure.code == "non_finite"
        for wanted, answer in zip(alone, rest, strict=True):
            assert torch.equal(prompt_scores(answer), wanted)
        later = dataclasses.replace(sound[0], request_id="later", cache_scope="y")
        assert torch.equal(prompt_scores(await collect(engine.generate(later))), alone[0])


def test_a_token_that_is_no_number_stays_with_those_that_see_it(base_of: Any) -> None:
    """What lies before it in the prompt keeps its bits, wherever the prompt is cut."""
    client = make_engine(base_of("llama"), dtype="bfloat16", kernels="native", num_threads=2)
    native = client._engine.runner.native
    assert native is not None
    embeds = client._base_model.embed(torch.tensor(prompt_of(60, 1)))

    def run(bad: int | None) -> torch.Tensor:
        rows = []
        for start, end in ((0, 37), (37, 60)):
            part = embeds[start:end].clone()
            if bad is not None and start <= bad < end:
                part[bad - start] = torch.inf
            positions = list(range(start, end))
            tables, wanted = [0] * len(positions), list(range(len(positions)))
            rows.append(
                native.run(StepInput(part, positions, tables, [1, 2, 3, 4], (), wanted), None)[0]
            )
        return torch.cat(rows)

    wanted = run(None)
    for bad in (10, 36, 50, 59):
        actual = run(bad)
        assert torch.equal(actual[:bad], wanted[:bad])
        assert not actual[bad:].isfinite().any()


async def test_weights_are_packed_once_and_unpack_exactly(base_of: Any) -> None:
    folder = base_of("llama")
    native = load_base(folder, EngineSettings(dtype="bfloat16", kernels="native"))
    plain = load_base(folder, EngineSettings(dtype="bfloat16", kernels="plain"))
    assert native.native is not None
    assert plain.native is None
    assert native.digest == plain.digest
    assert native.num_bytes <= 1.1 * plain.num_bytes
    int8 = load_base(folder, EngineSettings(dtype="bfloat16", quantize="int8"))
    assert int8.digest != native.digest
    assert int8.num_bytes < 0.75 * native.num_bytes
    with pytest.raises(UnsupportedBase, match="float32"):
        load_base(folder, EngineSettings(dtype="float32", quantize="int8"))


async def test_a_quantised_base_serves_adapters_mixes_and_merges(
    base_of: Any, folders_of: Any
) -> None:
    """As near to the portable twin as bfloat16 is; the same bits always; the base stays."""
    base, folders = base_of("llama-biases"), folders_of("llama-biases")
    int8: dict[str, Any] = {"quantize": "int8", "merged_bytes": 1 << 24}
    portable = await scored(base, folders, kernels="plain", **int8)
    unquantised = await scored(base, folders)
    async with serving(base, folders, **int8) as engine:
        native = [prompt_scores(answer) for answer in await run_all(engine, batch())]
        asked = dataclasses.replace(batch()[1], request_id="alone", cache_scope="alone")
        assert torch.equal(prompt_scores(await collect(engine.generate(asked))), native[1])
        await engine.merge("a0")
        asked = dataclasses.replace(asked, request_id="merged", cache_scope="merged")
        merged = prompt_scores(await collect(engine.generate(asked)))
        assert await engine.base_checksum() == engine.base.digest
    torch.testing.assert_close(merged, native[1], atol=0.1, rtol=0)
    for ours, theirs, whole in zip(native, portable, unquantised, strict=True):
        torch.testing.assert_close(ours, theirs, atol=0.2, rtol=0)
        assert not torch.equal(ours, whole)
        assert (ours - whole).abs().mean() < 0.1


async def test_the_stages_of_a_step_are_measured_when_somebody_asks(base_of: Any) -> None:
    async with serving(base_of("llama"), []) as engine:
        native = engine._engine.runner.native
        assert native is not None
        await collect(engine.generate(ask("unseen", prompt_of(20, 1))))
        native.start_clock()
        assert set(native.read_clock().values()) == {0.0}
        await collect(engine.generate(ask("seen", prompt_of(20, 2))))
        seconds = native.read_clock()
    idle = {"A of qkv", "A of output", "A of gate and up", "A of down"}
    assert {stage for stage, value in seconds.items() if value == 0} == idle
