"""Random bases made on the device, and the engine over them driven step by step.

No files and no downloads: what is compared and timed does not depend on the weights' values.
"""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any

import torch
from quickchange_adapters.host_adapter import HostAdapter, pack_adapter, pin_adapter
from quickchange_adapters.pool import AdapterPool
from quickchange_adapters.weights import AdapterWeights, LoraPair
from quickchange_server.engine.attention import ATTENTION_NAME, register_attention
from quickchange_server.engine.base_model import BaseModel
from quickchange_server.engine.engine import Engine
from quickchange_server.engine.model_runner import ModelRunner
from quickchange_server.engine.observer import StepStats
from quickchange_server.engine.request import (
    AdapterRef,
    GenerationRequest,
    SamplingParams,
    TokenOutput,
)
from quickchange_server.engine.settings import EngineSettings

MIB = 1 << 20
VOCABULARY = 512
TINY = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
}
LAYERS = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": TINY,
    "qwen2": TINY,
    "gemma2": {
        **TINY,
        **LAYERS,
        "head_dim": 64,
        "sliding_window": 24,
        "attn_logit_softcapping": 20.0,
    },
}
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {**TINY, "max_position_embeddings": 4096},
    "1b": {
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "max_position_embeddings": 4096,
    },
    "8b": {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
    },
}


@dataclass(frozen=True, slots=True)
class Row:
    """One request of a run: its prompt, and the adapters it mixes as (index, weight)."""

    prompt: tuple[int, ...]
    adapters: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Answer:
    """Tokens, and each one's full log probabilities where they were asked for."""

    token_ids: list[int]
    logprobs: torch.Tensor | None


class Recorder:
    """Keeps every step, and when it was over."""

    def __init__(self) -> None:
        self.steps: list[StepStats] = []
        self.ends_s: list[float] = []

    def clear(self) -> None:
        """Forget all."""
        self.steps.clear()
        self.ends_s.clear()

    def on_step(self, stats: StepStats) -> None:
        """Take note of one finished step."""
        self.steps.append(stats)
        self.ends_s.append(time.perf_counter())

    def decode_periods_s(self, num_rows: int) -> list[float]:
        """Return the time from step to step while so many rows decode: host work included."""
        is_full = [s.kind == "decode" and s.num_rows == num_rows for s in self.steps]
        both = zip(is_full, is_full[1:], strict=False)
        return [
            self.ends_s[index + 1] - self.ends_s[index]
            for index, (one, other) in enumerate(both)
            if one and other
        ]

    def on_activation(self, seconds: float) -> None:
        """Do nothing."""


def random_model(
    family: str, values: dict[str, Any], dtype: torch.dtype, device: torch.device, attention: str
) -> Any:
    """Make a model on the device whose logits vary; it has the same weights in every dtype."""
    from transformers import AutoConfig, AutoModelForCausalLM

    ends = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    config = AutoConfig.for_model(family, **values, **ends)
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    model.to(device).eval().requires_grad_(False)
    generator = torch.Generator(device).manual_seed(1)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            drawn = torch.randn(parameter.shape, generator=generator, device=device)
            parameter.copy_(drawn * parameter.shape[-1] ** -0.5)
    return model


def random_adapter(base: BaseModel, rank: int, seed: int) -> AdapterWeights:
    """Make an adapter on every linear of the blocks, large enough to change the answers."""
    generator = torch.Generator().manual_seed(seed)
    pairs = {}
    for module in base.layout.places:
        spec = base.spec.modules[module]
        lora_a = torch.randn(rank, spec.in_features, generator=generator) * spec.in_features**-0.5
        lora_b = torch.randn(spec.out_features, rank, generator=generator) * 0.1 * rank**-0.5
        pairs[module] = LoraPair(lora_a.to(base.dtype), lora_b.to(base.dtype))
    return AdapterWeights(f"adapter-{seed}", pairs)


class TimedBase(BaseModel):
    """A base whose digest is made up: hashing 16 GB takes longer than most of what is timed."""

    def checksum(self) -> str:
        """Return any digest."""
        return "0" * 64


class GpuEngine:
    """An engine without a thread: every step runs in the call of `run`."""

    def __init__(
        self,
        family: str,
        values: dict[str, Any],
        settings: EngineSettings,
        make_base: type[BaseModel] = BaseModel,
    ) -> None:
        register_attention()
        device, dtype = torch.device(settings.device), getattr(torch, settings.dtype)
        model = random_model(family, values, dtype, device, ATTENTION_NAME)
        self.base = make_base(model, settings)
        self.pool = AdapterPool(
            self.base.layout, settings.adapter_device_bytes, dtype, self.base.device
        )
        self.runner = ModelRunner(
            self.base, self.pool, settings.kv_cache_bytes, settings.kv_block_size, settings
        )
        self.recorder = Recorder()
        self.sampling = SamplingParams(temperature=0)
        self._outputs: list[TokenOutput] = []
        self._engine = Engine(
            self.runner, settings, frozenset(), self.recorder, self._outputs.extend
        )
        self._num_requests = 0

    def add_adapter(self, weights: AdapterWeights) -> HostAdapter:
        """Pack a version, pinned on a GPU, and keep it in host memory."""
        adapter = pack_adapter(weights, self.base.layout, self.base.dtype, self.base.bias_of)
        if self.base.device.type == "cuda":
            adapter = pin_adapter(adapter)
        return self.add_packed(adapter)

    def add_packed(self, adapter: HostAdapter) -> HostAdapter:
        """Keep a packed version in host memory."""
        self._engine.residency.add_host(adapter)
        return adapter

    @torch.inference_mode()
    def run(
        self,
        rows: Sequence[Row],
        num_tokens: int,
        num_logprobs: int | None,
        *,
        is_resident: bool = True,
        on_step: Callable[[], object] = lambda: None,
    ) -> list[Answer]:
        """Answer all rows, as `sampling` says, as many at once as fit.

        `is_resident`: their adapters are brought to the device before; else as in serving, while
        steps run. `on_step` is called between steps.

        Raises: RuntimeError if one of them fails.
        """
        self._outputs.clear()
        self.recorder.clear()
        names = [self._add(row, num_tokens, num_logprobs, is_resident) for row in rows]
        num_seen, num_left = 0, len(names)
        while num_left:
            self._engine.run_calls()  # one that waits would keep steps from being launched ahead
            self._engine.step()
            on_step()
            for output in self._outputs[num_seen:]:
                if output.failure is not None:
                    raise RuntimeError(f"{output.request_id} failed: {output.failure.message}")
                num_left -= output.finish_reason is not None
            num_seen = len(self._outputs)
        return [] if num_logprobs is None else [self._answer(name) for name in names]

    def tokens(self, rows: Sequence[Row], num_tokens: int) -> list[list[int]]:
        """Answer all rows without log probabilities, so that steps may be launched ahead."""
        self.run(rows, num_tokens, None)
        found: dict[str, list[int]] = {}
        for output in self._outputs:
            found.setdefault(output.request_id, []).extend(output.token_ids)
        return [found[name] for name in sorted(found, key=lambda each: (len(each), each))]

    @property
    def num_ahead(self) -> int:
        """How many steps were launched before the last one's tokens were known."""
        return self._engine.ahead.num_launched

    def activate(self, digest: str) -> "Future[bool]":
        """Begin to bring a version to the device, as a hint does in serving."""
        return self._engine.residency.activate(digest)

    def _add(self, row: Row, num_tokens: int, num_logprobs: int | None, is_resident: bool) -> str:
        self._num_requests += 1
        name = f"request-{self._num_requests}"
        adapters = tuple(AdapterRef(f"adapter-{index}", weight) for index, weight in row.adapters)
        sampling = replace(self.sampling, logprobs=num_logprobs)
        request = GenerationRequest(
            name, row.prompt, adapters, sampling, num_tokens, ignore_eos=True, cache_scope=name
        )
        refusal = self._engine.residency.claim(request)
        if refusal is not None:
            raise RuntimeError(f"{name} was refused: {refusal.message}")
        if is_resident:
            self._activate(adapters)
        self._engine.add(request)
        return name

    def _activate(self, adapters: Sequence[AdapterRef]) -> None:
        """Bring adapters to the device now, so that all rows begin in one step."""
        copies = (self._engine.residency.host_copy(adapter.digest) for adapter in adapters)
        for slot in self.pool.acquire(*(copy for copy in copies if copy is not None)) or ():
            self.pool.release(slot)

    def _answer(self, name: str) -> Answer:
        outputs = [output for output in self._outputs if output.request_id == name]
        entries = [entry for output in outputs for entry in output.logprobs or ()]
        token_ids = [token for output in outputs for token in output.token_ids]
        if not entries or len(entries[0].top) < VOCABULARY:
            return Answer(token_ids, None)
        logprobs = torch.empty(len(entries), VOCABULARY)
        for index, entry in enumerate(entries):
            ids, values = zip(*entry.top, strict=True)
            logprobs[index, list(ids)] = torch.tensor(values)
        return Answer(token_ids, logprobs)


def random_prompt(length: int, seed: int) -> tuple[int, ...]:
    """Return so many token ids."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(VOCABULARY, (length,), generator=generator).tolist())
