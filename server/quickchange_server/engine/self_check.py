"""At start: does this architecture compute the same here as it does unmodified?

A two-layer random clone of the config, narrow where width does not matter, answers one prompt
through the engine (chunks, blocks, decode) and through plain Hugging Face code. A family that
passes something special to attention, or shares it in a way we do not see, is found out here
instead of in wrong answers.
"""

import copy
from pathlib import Path
from typing import Any

import torch
from quickchange_adapters.pool import AdapterPool

from quickchange_server.engine.attention import ATTENTION_NAME, register_attention
from quickchange_server.engine.base_model import BaseModel
from quickchange_server.engine.engine import Engine
from quickchange_server.engine.model_runner import ModelRunner
from quickchange_server.engine.observer import NoObserver
from quickchange_server.engine.request import GenerationRequest, SamplingParams, TokenOutput
from quickchange_server.engine.rope import freeze_rope
from quickchange_server.engine.settings import EngineSettings
from quickchange_server.engine.unsupported import UnsupportedBase

NUM_PROMPT, NUM_TOKENS, CHUNK, WINDOW = 30, 6, 12, 8
VOCABULARY, INTERMEDIATE = 64, 64
TOLERANCE = 2e-3
_SETTINGS = EngineSettings(
    dtype="float32",
    kernels="plain",  # what the clone computes with; that no other kernels are used is no news
    max_step_tokens=CHUNK,
    kv_block_size=4,
    merged_bytes=0,
    max_model_len=64,
)


@torch.no_grad()
def check_architecture(folder: Path) -> None:
    """Compare a small random clone with the unmodified model.

    Raises: UnsupportedBase with what differs.
    """
    from transformers import AutoConfig

    register_attention()
    name = folder.name
    try:
        config = AutoConfig.from_pretrained(str(folder), local_files_only=True)
        name = config.model_type
        worst = _largest_difference(config)
    except Exception as error:  # any of the families' own ways of failing
        reason = f"{type(error).__name__}: {error}"
        raise UnsupportedBase(f"{name!r} cannot be served: {reason}") from error
    if not worst <= TOLERANCE:
        raise UnsupportedBase(
            f"{name!r} computes differently here than in transformers: log probabilities of a "
            f"random clone differ by {worst:.2g}"
        )


def _largest_difference(config: Any) -> float:
    from transformers import AutoModelForCausalLM

    config = _shrink(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        plain = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        plain = plain.float().eval()
        for parameter in plain.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0.0, parameter.shape[-1] ** -0.5)
        prompt = tuple(torch.randint(VOCABULARY, (NUM_PROMPT,)).tolist())
    served = copy.deepcopy(plain)
    served.set_attn_implementation(ATTENTION_NAME)
    token_ids, logprobs = _run_engine(served, prompt)
    freeze_rope(plain, 64)
    expected = _teacher_forced(plain, [*prompt, *token_ids])
    return float((torch.tensor(logprobs) - expected).abs().max())


def _shrink(config: Any) -> Any:
    config = copy.deepcopy(config.get_text_config())
    layer_types = getattr(config, "layer_types", None)
    if layer_types:
        kinds = sorted(set(layer_types))
        config.layer_types = (kinds * 2)[:2]
    wanted = {
        "num_hidden_layers": 2,
        "vocab_size": VOCABULARY,
        "intermediate_size": min(INTERMEDIATE, getattr(config, "intermediate_size", 0) or 64),
    }
    if getattr(config, "sliding_window", None):
        wanted["sliding_window"] = WINDOW
    for name, value in wanted.items():
        if hasattr(config, name):
            setattr(config, name, value)
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(config, name, None)
    return config


def _run_engine(model: Any, prompt: tuple[int, ...]) -> tuple[list[int], list[float]]:
    """Return the greedy tokens and the log probabilities of every token after the first."""
    base = BaseModel(model, _SETTINGS)
    freeze_rope(base.model, 64)
    pool = AdapterPool(base.layout, 0, base.dtype, base.device)
    runner = ModelRunner(base, pool, 1 << 24, _SETTINGS.kv_block_size)
    outputs: list[TokenOutput] = []
    engine = Engine(runner, _SETTINGS, frozenset(), NoObserver(), outputs.extend)
    sampling = SamplingParams(temperature=0, logprobs=0)
    engine.add(
        GenerationRequest(
            "check", prompt, (), sampling, NUM_TOKENS, ignore_eos=True, prompt_logprobs=0
        )
    )
    while not outputs or outputs[-1].finish_reason is None:
        engine.step()
    if outputs[-1].failure is not None:
        raise RuntimeError(outputs[-1].failure.message)
    entries = [*(outputs[0].prompt_logprobs or ())[1:]]
    entries += [entry for output in outputs for entry in output.logprobs or ()]
    token_ids = [token for output in outputs for token in output.token_ids]
    return token_ids, [entry.logprob for entry in entries if entry is not None]


def _teacher_forced(model: Any, token_ids: list[int]) -> torch.Tensor:
    ids = torch.tensor([token_ids])
    logprobs = torch.log_softmax(model(ids, use_cache=False).logits[0, :-1].float(), dim=-1)
    return logprobs.gather(1, ids[0, 1:, None])[:, 0]
