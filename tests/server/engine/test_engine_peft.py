"""The engine against PEFT and Hugging Face, in float32 on tiny models."""

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from quickchange_server.engine.client import EngineClient
from quickchange_server.engine.request import AdapterRef, GenerationRequest, SamplingParams

from tests.conftest import LLAMA_LINEARS, MakeAdapter, save_peft_adapter, save_tiny_base
from tests.server.engine.conftest import Answer, collect, make_engine, peft_weights, run_all

VOCAB = 381
GREEDY = SamplingParams(temperature=0)
ADAPTERS: list[dict[str, Any]] = [
    {"r": 1, "target_modules": list(LLAMA_LINEARS)},
    {"r": 4, "target_modules": ["q_proj", "v_proj"]},
    {"r": 8, "target_modules": list(LLAMA_LINEARS), "use_rslora": True},
    {"r": 12, "target_modules": ["o_proj", "down_proj"]},
    {"r": 16, "target_modules": ["gate_proj"], "lora_alpha": 4},
    {"r": 24, "target_modules": ["k_proj", "up_proj"]},
    {
        "r": 64,
        "target_modules": list(LLAMA_LINEARS),
        "rank_pattern": {"q_proj": 3, "layers.1.mlp.up_proj": 9},
        "alpha_pattern": {"v_proj": 40},
    },
]


def prompt_of(length: int, seed: int) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(3, VOCAB, (length,), generator=generator).tolist())


class Oracle:
    """PEFT over an unmodified Hugging Face model; None is the base."""

    def __init__(self, base: Path, folders: Sequence[Path]) -> None:
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        self.base = AutoModelForCausalLM.from_pretrained(str(base), dtype=torch.float32).eval()
        self.models: list[Any] = []
        for folder in folders:
            model = AutoModelForCausalLM.from_pretrained(str(base), dtype=torch.float32)
            self.models.append(PeftModel.from_pretrained(model, str(folder)).eval())

    def model(self, adapter: int | None) -> Any:
        return self.base if adapter is None else self.models[adapter]

    @torch.no_grad()
    def logprobs(self, adapter: int | None, token_ids: Sequence[int]) -> torch.Tensor:
        logits = self.model(adapter)(torch.tensor([list(token_ids)])).logits[0]
        return torch.log_softmax(logits, dim=-1)

    def generate(self, adapter: int | None, prompt: Sequence[int], num_tokens: int) -> list[int]:
        ids = torch.tensor([list(prompt)])
        out = self.model(adapter).generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=num_tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        return list(out[0, len(prompt) :].tolist())


def full_logprobs(answer: Answer) -> torch.Tensor:
    """Every generated position's log probabilities, [tokens, vocabulary]."""
    rows = torch.empty(len(answer.logprobs), VOCAB)
    for index, entry in enumerate(answer.logprobs):
        for token_id, value in entry.top:
            rows[index, token_id] = value
    return rows


def request(
    name: str, prompt: tuple[int, ...], digest: str | None, num_tokens: int, logprobs: int | None
) -> GenerationRequest:
    return GenerationRequest(
        name,
        prompt,
        () if digest is None else (AdapterRef(digest),),
        SamplingParams(temperature=0, logprobs=logprobs),
        max_tokens=num_tokens,
        ignore_eos=True,
    )


@pytest.fixture(scope="module")
def folders(make_adapter: MakeAdapter) -> list[Path]:
    return [make_adapter(seed=i, **config) for i, config in enumerate(ADAPTERS)]


@pytest.fixture(scope="module")
def oracle(tiny_base: Path, folders: list[Path]) -> Oracle:
    return Oracle(tiny_base, folders)


async def load_all(engine: EngineClient, folders: Sequence[Path]) -> list[str]:
    digests = [f"adapter-{index}" for index in range(len(folders))]
    for digest, folder in zip(digests, folders, strict=True):
        await engine.load_adapter(peft_weights(folder, digest))
    return digests


async def test_every_row_of_a_mixed_batch_has_pefts_logits(
    engine: EngineClient, folders: list[Path], oracle: Oracle
) -> None:
    digests = await load_all(engine, folders)
    rows: list[int | None] = [None, *range(len(folders)), None]
    prompts = [prompt_of(5 + 9 * i, i) for i in range(len(rows))]
    answers = await run_all(
        engine,
        [
            request(f"r{i}", prompts[i], None if a is None else digests[a], 6, VOCAB)
            for i, a in enumerate(rows)
        ],
    )
    for adapter, prompt, answer in zip(rows, prompts, answers, strict=True):
        tokens = [*prompt, *answer.token_ids]
        expected = oracle.logprobs(adapter, tokens[:-1])[len(prompt) - 1 :]
        torch.testing.assert_close(full_logprobs(answer), expected, atol=1e-4, rtol=0)


async def test_greedy_tokens_equal_pefts_generate_alone_and_in_a_batch_with_chunked_prefill(
    engine: EngineClient, folders: list[Path], oracle: Oracle
) -> None:
    digests = await load_all(engine, folders)
    rows: list[int | None] = [None, *range(len(folders))]
    prompts = [prompt_of(40 * (i + 1), 100 + i) for i in range(len(rows))]
    requests = [
        request(f"r{i}", prompts[i], None if a is None else digests[a], 12, None)
        for i, a in enumerate(rows)
    ]
    together = await run_all(engine, requests)
    for adapter, prompt, answer, one in zip(rows, prompts, together, requests, strict=True):
        alone = await collect(engine.generate(one))
        expected = oracle.generate(adapter, prompt, 12)
        assert answer.token_ids == expected
        assert alone.token_ids == expected


async def test_adapters_of_the_fixture_change_the_answer(
    folders: list[Path], oracle: Oracle
) -> None:
    prompt = prompt_of(20, 5)
    base = oracle.logprobs(None, prompt)
    for index in range(len(folders)):
        assert (oracle.logprobs(index, prompt) - base).abs().max() > 0.01


async def test_logits_are_bit_equal_whatever_the_batch_mates(
    tiny_base: Path, folders: list[Path]
) -> None:
    prompts = [prompt_of(7 + 5 * i, 50 + i) for i in range(6)]

    async def logprobs_of(mates: Sequence[int]) -> torch.Tensor:
        engine = make_engine(tiny_base)
        await engine.start()
        digests = await load_all(engine, folders)
        requests = [request("me", prompts[0], digests[2], 8, VOCAB)]
        requests += [
            request(f"m{i}", prompts[i], digests[i] if i % 2 else None, 8, None) for i in mates
        ]
        answers = await run_all(engine, requests)
        await engine.stop()
        return full_logprobs(answers[0])

    alone = await logprobs_of([])
    for mates in ([1], [1, 2, 3], [5, 4, 3, 2, 1]):
        assert torch.equal(alone, await logprobs_of(mates))


async def test_prompt_logprobs_equal_teacher_forcing(
    engine: EngineClient, folders: list[Path], oracle: Oracle
) -> None:
    digests = await load_all(engine, folders)
    prompt = prompt_of(150, 9)
    answer = await collect(
        engine.generate(
            GenerationRequest(
                "echo",
                prompt,
                (AdapterRef(digests[2]),),
                SamplingParams(temperature=0, logprobs=0),
                max_tokens=1,
                prompt_logprobs=0,
            )
        )
    )
    expected = oracle.logprobs(2, prompt)
    assert answer.prompt_logprobs[0] is None
    values = [entry.logprob for entry in answer.prompt_logprobs[1:] if entry is not None]
    wanted = expected[torch.arange(149), torch.tensor(prompt[1:])]
    torch.testing.assert_close(torch.tensor(values), wanted, atol=1e-4, rtol=0)


async def test_a_mix_is_the_weighted_sum_of_its_adapters(
    engine: EngineClient, tiny_base: Path, folders: list[Path]
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    chosen, weights = [0, 2, 3], [0.7, -0.4, 1.3]
    model = AutoModelForCausalLM.from_pretrained(str(tiny_base), dtype=torch.float32)
    peft_model = PeftModel.from_pretrained(model, str(folders[chosen[0]]), adapter_name="a0")
    for i in chosen[1:]:
        peft_model.load_adapter(str(folders[i]), adapter_name=f"a{i}")
    peft_model.add_weighted_adapter(
        [f"a{i}" for i in chosen], weights, "mix", combination_type="cat"
    )
    peft_model.set_adapter("mix")
    digests = await load_all(engine, folders)
    prompt = prompt_of(30, 77)
    mix = tuple(AdapterRef(digests[i], w) for i, w in zip(chosen, weights, strict=True))
    mixed = GenerationRequest(
        "mix", prompt, mix, SamplingParams(temperature=0, logprobs=VOCAB), 5, ignore_eos=True
    )
    mates = [request(f"m{i}", prompt_of(9, i), digests[i], 5, None) for i in range(3)]
    answer, *_ = await run_all(engine, [mixed, *mates])
    tokens = torch.tensor([[*prompt, *answer.token_ids[:-1]]])
    with torch.no_grad():
        expected = torch.log_softmax(peft_model(tokens).logits[0, len(prompt) - 1 :], dim=-1)
    torch.testing.assert_close(full_logprobs(answer), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3"])
async def test_another_family_serves_like_peft(tmp_path: Path, model_type: str) -> None:
    overrides = {"head_dim": 16} if model_type == "qwen3" else {}
    base = save_tiny_base(tmp_path / model_type, model_type, **overrides)
    folder = save_peft_adapter(tmp_path / "adapter", base, r=8, target_modules=list(LLAMA_LINEARS))
    oracle = Oracle(base, [folder])
    engine = make_engine(base)
    await engine.start()
    try:
        digests = await load_all(engine, [folder])
        prompts = [prompt_of(80, 1), prompt_of(33, 2)]
        requests = [request("b", prompts[0], None, 8, None)]
        requests.append(request("a", prompts[1], digests[0], 8, None))
        answers = await run_all(engine, requests)
    finally:
        await engine.stop()
    assert answers[0].token_ids == oracle.generate(None, prompts[0], 8)
    assert answers[1].token_ids == oracle.generate(0, prompts[1], 8)


async def test_bfloat16_stays_near_float32(
    tiny_base: Path, folders: list[Path], oracle: Oracle
) -> None:
    engine = make_engine(tiny_base, dtype="bfloat16")
    await engine.start()
    try:
        digests = await load_all(engine, folders)
        prompts = [prompt_of(30, i) for i in range(len(folders))]
        answers = await asyncio.gather(
            *(
                collect(engine.generate(request(f"r{i}", prompts[i], digests[i], 4, VOCAB)))
                for i in range(len(folders))
            )
        )
    finally:
        await engine.stop()
    for index, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        tokens = [*prompt, *answer.token_ids]
        expected = oracle.logprobs(index, tokens[:-1])[len(prompt) - 1 :]
        assert (full_logprobs(answer) - expected).abs().mean() < 0.1
