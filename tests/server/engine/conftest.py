"""Fixtures for the engine: tiny bases, PEFT adapters as weights, and ways to run requests."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from quickchange_adapters.weights import AdapterWeights, LoraPair
from quickchange_server.engine.client import EngineClient
from quickchange_server.engine.observer import StepStats
from quickchange_server.engine.request import GenerationRequest, TokenLogprobs, TokenOutput
from quickchange_server.engine.settings import EngineSettings

MIB = 1 << 20


@dataclass
class Recorder:
    """Observer that keeps every step."""

    steps: list[StepStats] = field(default_factory=list)

    def on_step(self, stats: StepStats) -> None:
        self.steps.append(stats)

    def on_activation(self, seconds: float) -> None:
        pass


@dataclass
class Answer:
    """All outputs of one request, put together."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: tuple[TokenLogprobs | None, ...] = ()
    last: TokenOutput | None = None
    num_cached: int = 0

    @property
    def finish_reason(self) -> str | None:
        return None if self.last is None else self.last.finish_reason


async def collect(outputs: AsyncIterator[TokenOutput]) -> Answer:
    """Read a request to its end."""
    answer = Answer()
    async for output in outputs:
        answer.token_ids.extend(output.token_ids)
        answer.logprobs.extend(output.logprobs or ())
        answer.prompt_logprobs = output.prompt_logprobs or answer.prompt_logprobs
        answer.num_cached = max(answer.num_cached, output.num_cached_tokens)
        answer.last = output
    return answer


async def run_all(engine: EngineClient, requests: Iterable[GenerationRequest]) -> list[Answer]:
    """Run requests at once and return their answers in order."""
    return await asyncio.gather(*(collect(engine.generate(r)) for r in requests))


def peft_weights(folder: Path, digest: str | None = None) -> AdapterWeights:
    """Read a PEFT folder with PEFT's own rules for scaling: the tests' independent loader."""
    from peft import LoraConfig, PeftModel
    from peft.tuners.lora import LoraLayer
    from transformers import AutoModelForCausalLM

    config = LoraConfig.from_pretrained(str(folder))
    base = config.base_model_name_or_path
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    peft_model = PeftModel.from_pretrained(model, str(folder))
    pairs, added, replaced = {}, {}, {}
    for name, module in peft_model.get_base_model().named_modules():
        if not isinstance(module, LoraLayer):
            continue
        scaling = module.scaling["default"]
        if "default" in module.lora_embedding_A:
            lora_a = module.lora_embedding_A["default"].detach()
            lora_b = module.lora_embedding_B["default"].detach() * scaling
        else:
            lora_a = module.lora_A["default"].weight.detach()
            lora_b = module.lora_B["default"].weight.detach() * scaling
            if config.lora_bias:
                added[name] = module.lora_B["default"].bias.detach() * scaling
            if config.bias != "none" and module.get_base_layer().bias is not None:
                replaced[name] = module.get_base_layer().bias.detach()
        pairs[name] = LoraPair(lora_a, lora_b)
    return AdapterWeights(digest or f"digest-of-{folder}", pairs, added, replaced)


MakeEngine = Callable[..., EngineClient]


def make_engine(folder: Path, **settings: Any) -> EngineClient:
    """Make an engine with small ceilings."""
    observer = settings.pop("observer", None)
    values: dict[str, Any] = {
        "dtype": "float32",
        "kv_cache_bytes": 4 * MIB,
        "adapter_device_bytes": 16 * MIB,
        "max_step_tokens": 64,
    }
    values.update(settings)
    return EngineClient(folder, EngineSettings(**values), observer)


@pytest.fixture
async def engine(tiny_base: Path) -> AsyncIterator[EngineClient]:
    """A started float32 engine over the tiny Llama."""
    client = make_engine(tiny_base)
    await client.start()
    yield client
    await client.stop()
