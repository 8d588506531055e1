"""Fixtures of the HTTP edge: tokenizers, a scripted engine, an app around it."""

from collections.abc import AsyncIterator, Callable
from pathlib import Path

import httpx
import pytest
import pytest_asyncio
from fastapi import FastAPI
from quickchange_server.api.app import AppServices, create_app
from quickchange_server.metrics import ServerMetrics
from quickchange_server.tokenizer import Tokenizer

from tests.server.documented import DocumentedAnswers
from tests.server.scripted_adapters import ScriptedAdapters
from tests.server.scripted_engine import ScriptedEngine

BASE_URL = "http://127.0.0.1"
DIGEST_A, DIGEST_B = "a" * 64, "b" * 64


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


@pytest.fixture
def adapters() -> ScriptedAdapters:
    """Return a service with the adapters `ada` and `bob`, and the alias `ada@blue`."""
    return ScriptedAdapters({"ada": DIGEST_A, "bob": DIGEST_B, "ada@blue": DIGEST_B})


@pytest.fixture
def services(
    scripted_engine: ScriptedEngine, adapters: ScriptedAdapters, tokenizer: Tokenizer
) -> AppServices:
    """Return an app's services around the scripted engine."""
    return AppServices(scripted_engine, adapters, tokenizer, ServerMetrics())


@pytest_asyncio.fixture
async def client(services: AppServices) -> AsyncIterator[httpx.AsyncClient]:
    """Return a client of a started app."""
    async for each in serve_in_process(create_app(services)):
        yield each


async def serve_in_process(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    """Start an app's lifespan, and yield a client that calls it without a socket.

    What it answers must be what its OpenAPI says.
    """
    hooks = {"response": [DocumentedAnswers(app).check]}
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url=BASE_URL, event_hooks=hooks) as client,
    ):
        yield client


@pytest.fixture
def say(scripted_engine: ScriptedEngine, tokenizer: Tokenizer) -> Callable[[str], None]:
    """Return a function that tells the engine what to answer."""

    def tell(text: str) -> None:
        scripted_engine.answer = lambda request: tokenizer.encode(text)

    return tell
