"""What `quickchange serve` is given in a run on a GPU: a random base with a tokenizer, adapters.

The base is shaped like Llama and made on the device; the tokenizer is trained on made-up words; the
adapters are made and saved by PEFT. Nothing is fetched.
"""

import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.make_adapters import LINEARS
from benchmarks.workload import WORDS, adapter_name

SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ANSWER_SPREAD = 4.0
"""Standard deviation of the logits: the likeliest token then leads by more than rounding moves."""
RANKS = (8, 16, 64, 16, 8, 64, 16, 8)
SECOND, UPLOADED, MISSHAPEN = "second", "uploaded", "misshapen"


@dataclass(frozen=True, slots=True)
class Shape:
    """A base's sizes. `num_tokens`: of the vocabulary, at most."""

    hidden: int
    inner: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    num_tokens: int
    max_tokens: int = 4096

    def config(self, vocabulary: int) -> Any:
        """Return transformers' config."""
        from transformers import LlamaConfig

        return LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=self.hidden,
            intermediate_size=self.inner,
            num_hidden_layers=self.num_layers,
            num_attention_heads=self.num_heads,
            num_key_value_heads=self.num_kv_heads,
            max_position_embeddings=self.max_tokens,
            tie_word_embeddings=False,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=2,
        )


SHAPES: Mapping[str, Shape] = {
    "tiny": Shape(64, 128, 2, 4, 2, 512, 1024),
    "small": Shape(256, 512, 4, 4, 2, 2048),
    "1b": Shape(2048, 8192, 16, 32, 8, 8192),
}


def write_tokenizer(folder: Path, num_tokens: int) -> int:
    """Train a byte-level BPE whose tokens are plain ASCII, each with a text of its own.

    Returns how many tokens there are, at most `num_tokens`.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=num_tokens, special_tokens=list(SPECIALS), show_progress=False
    )
    tokenizer.train_from_iterator(_made_up_text(num_tokens), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=SPECIALS[1],
        eos_token=SPECIALS[2],
        unk_token=SPECIALS[0],
        pad_token=SPECIALS[2],
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(str(folder))
    return len(fast)


def _made_up_text(num_words: int) -> list[str]:
    """Return sentences of the workload's words and of as many made-up ones, each several times."""
    chooser = random.Random(0)
    syllables = [a + b for a in "bcdfghklmnprstvwz" for b in ("a", "e", "i", "o", "u", "an", "er")]
    made_up = ["".join(chooser.choices(syllables, k=3)) for _ in range(num_words)]
    words = [*WORDS, *made_up] * 3
    chooser.shuffle(words)
    return [" ".join(words[start : start + 12]) + ".\n" for start in range(0, len(words), 12)]


def write_base(folder: Path, shape: Shape, dtype: torch.dtype, device: torch.device) -> Any:
    """Make a random base on the device and write it with its tokenizer; return the model."""
    from transformers import LlamaForCausalLM

    folder.mkdir(parents=True, exist_ok=True)
    config = shape.config(write_tokenizer(folder, shape.num_tokens))
    torch.manual_seed(0)
    with torch.device(device):
        model = LlamaForCausalLM(config).to(dtype)
        with torch.no_grad():
            model.lm_head.weight.normal_(0, ANSWER_SPREAD / shape.hidden**0.5)
            model.model.embed_tokens.weight.normal_()
    model.eval().requires_grad_(False)
    model.save_pretrained(str(folder))
    return model


def write_adapters(model: Any, folder: Path) -> dict[str, Path]:
    """Make random adapters on all linears with PEFT, and save them as PEFT does.

    Returns folders by name: those of the workload, then `SECOND`, `UPLOADED` and `MISSHAPEN`.
    """
    ranks = {adapter_name(index): rank for index, rank in enumerate(RANKS)}
    ranks |= {SECOND: 16, UPLOADED: 16}
    torch.manual_seed(1)
    adapted = _adapted(model, ranks)
    adapted.save_pretrained(str(folder), selected_adapters=list(ranks), save_embedding_layers=False)
    write_misshapen(folder / adapter_name(0), folder / MISSHAPEN)
    return {name: folder / name for name in (*ranks, MISSHAPEN)}


def _adapted(model: Any, ranks: Mapping[str, int]) -> Any:
    from peft import LoraConfig, get_peft_model

    adapted: Any = None
    with torch.device(model.device):  # many small matrices, drawn where they stay
        for name, rank in ranks.items():
            config = LoraConfig(
                r=rank,
                lora_alpha=rank,
                target_modules=list(LINEARS),
                init_lora_weights=False,
                task_type="CAUSAL_LM",
            )
            if adapted is None:
                adapted = get_peft_model(
                    model, config, adapter_name=name, autocast_adapter_dtype=False
                )
            else:
                adapted.add_adapter(name, config, autocast_adapter_dtype=False)
    return adapted


def write_misshapen(good: Path, folder: Path) -> None:
    """Write an adapter like a good one, one of whose matrices is a row too wide."""
    from safetensors.torch import load_file, save_file

    folder.mkdir(parents=True, exist_ok=True)
    tensors = load_file(str(good / "adapter_model.safetensors"))
    name = next(name for name in sorted(tensors) if "lora_A" in name)
    tensors[name] = torch.cat([tensors[name], tensors[name][:, :1]], dim=1).contiguous()
    save_file(tensors, str(folder / "adapter_model.safetensors"))
    (folder / "adapter_config.json").write_bytes((good / "adapter_config.json").read_bytes())
