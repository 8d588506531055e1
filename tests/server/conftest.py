"""Fixtures of the HTTP edge: tokenizers, a scripted engine, an app around it."""

from pathlib import Path

import pytest
from quickchange_server.tokenizer import Tokenizer

from tests.server.scripted_engine import ScriptedEngine


@pytest.fixture(scope="session")
def tokenizer(tiny_base: Path) -> Tokenizer:
    """Return the tiny base's byte-level tokenizer."""
    return Tokenizer.load(tiny_base)


@pytest.fixture(scope="session")
def piece_tokenizer() -> Tokenizer:
    """Return a small tokenizer of the other kind: pieces with a space mark and byte fallback."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    specials = ["<unk>", "<s>", "</s>"]
    pieces = [*specials, *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["\u2581", "t", "h", "e", "\u2581t", "he", "\u2581the", "é", "你"]
    merges = [("\u2581", "t"), ("h", "e"), ("\u2581t", "he")]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    backend = Backend(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    backend.add_special_tokens(specials)
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>"))


@pytest.fixture
def scripted_engine() -> ScriptedEngine:
    """Return a fresh scripted engine, not yet started."""
    return ScriptedEngine()
