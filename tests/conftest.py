"""Shared fixtures: a tiny random base with a real tokenizer, and PEFT adapters for it."""

import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Triton's own library chooses its interpreter when it is first imported, by whichever test that is.
os.environ["TRITON_INTERPRET"] = "1"

import pytest
import torch
from quickchange_adapters.catalog import sqlite_url

from tests.postgres_server import NoPostgres, PostgresServer
from tests.s3_server import CREDENTIALS, FaultyProxy, S3Server

TINY_TEXT = (
    "the quick brown fox jumps over the lazy dog. a base stays resident while adapters are "
    "swapped inside one running batch. naïve café — 你好 🙂 review positive negative movie\n"
) * 8
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

MakeAdapter = Callable[..., Path]


def pytest_configure() -> None:
    """Take Ctrl-C's signal, which tests send, also where a background shell has it ignored."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def save_tiny_tokenizer(folder: Path) -> int:
    """Train a small byte-level BPE tokenizer with a chat template; return its vocabulary size."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=384,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TINY_TEXT], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        unk_token="<|endoftext|>",
        pad_token="<|im_end|>",
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(str(folder))
    return len(fast)


def tiny_config(model_type: str, vocab_size: int, **overrides: Any) -> Any:
    """Return the config of a 2-layer, 64-wide random model of a family."""
    from transformers import AutoConfig

    values: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
        "tie_word_embeddings": True,
    }
    values.update(overrides)
    return AutoConfig.for_model(model_type, **values)


def save_tiny_base(folder: Path, model_type: str = "llama", **overrides: Any) -> Path:
    """Write a tiny random base (float32, weights large enough that adapters matter)."""
    from transformers import AutoModelForCausalLM

    folder.mkdir(parents=True, exist_ok=True)
    vocab_size = save_tiny_tokenizer(folder)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(model_type, vocab_size, **overrides))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0.0, 0.08)
    model.to(torch.float32).save_pretrained(str(folder))
    return folder


def save_peft_adapter(folder: Path, base: Path, **config: Any) -> Path:
    """Write a random, non-zero adapter with PEFT itself. `seed` and `std` shape its weights."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    seed = config.pop("seed", 0)
    std = config.pop("std", 0.1)
    settings: dict[str, Any] = {
        "r": 8,
        "lora_alpha": 16,
        "target_modules": list(LLAMA_LINEARS),
        "task_type": "CAUSAL_LM",
    }
    settings.update(config)
    model = AutoModelForCausalLM.from_pretrained(str(base), dtype=torch.float32)
    peft_model = get_peft_model(model, LoraConfig(**settings))
    generator = torch.Generator().manual_seed(1000 + seed)
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "lora_" in name or (settings.get("bias", "none") != "none" and "bias" in name):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
    peft_model.save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny random Llama with tokenizer and chat template."""
    return save_tiny_base(tmp_path_factory.mktemp("tiny") / "tiny-llama")


@pytest.fixture(scope="session")
def make_adapter(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> MakeAdapter:
    """Return a function that writes a PEFT adapter folder; equal arguments give the same one."""
    made: dict[str, Path] = {}

    def make(base: Path = tiny_base, **config: Any) -> Path:
        key = json.dumps([str(base), config], sort_keys=True, default=str)
        if key not in made:
            folder = tmp_path_factory.mktemp("adapter") / f"adapter-{len(made)}"
            made[key] = save_peft_adapter(folder, base, **config)
        return made[key]

    return make


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    """A PostgreSQL server; tests that need it are skipped where it cannot run."""
    try:
        server = PostgresServer()
    except NoPostgres as error:
        pytest.skip(f"no PostgreSQL here: {error}")
    yield server
    server.close()


@pytest.fixture(params=["sqlite", "postgresql"])
def catalog_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """URL of an empty catalog, in each kind of database."""
    if request.param == "sqlite":
        return sqlite_url(tmp_path / "catalog.db")
    server: PostgresServer = request.getfixturevalue("postgres")
    return server.empty_database()


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    """An S3 API server in a process of its own."""
    server = S3Server()
    yield server
    server.close()


@pytest.fixture
def s3_proxy(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    """A proxy in front of the S3 server, where the AWS settings of the environment point to."""
    proxy = FaultyProxy(s3_server.port)
    for name, value in {**CREDENTIALS, "AWS_ENDPOINT_URL": proxy.endpoint}.items():
        monkeypatch.setenv(name, value)
    yield proxy
    proxy.close()
