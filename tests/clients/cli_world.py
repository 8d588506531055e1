"""The world of docs/cli.md: a folder with a tiny base, adapters and prompts, and a Hub.

The base is a random model of two layers that is then trained on a handful of sentences, so that
what it says can be read and does not hang on a rounding; its adapters are trained with PEFT.
"""

import json
import shutil
from collections.abc import Iterator
from contextlib import chdir, contextmanager
from pathlib import Path
from types import ModuleType

import httpx
import torch
from quickchange_adapters.task import Task
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.clients.app_thread import serve_app
from tests.clients.fake_hub import HUB, FakeHub
from tests.conftest import save_tiny_base
from tests.examples.example_modules import load_example

CHATS = [
    ("Tell me of the sea.", "The sea is wide, and it is never still."),
    ("Who are you?", "A base that stays resident."),
    ("A wonderful film.", "the quick brown fox jumps over it"),
    ("Dull from the first minute.", "the lazy dog was swapped inside"),
]
TEXTS = [("the quick brown", " fox jumps over the lazy dog"), ("a base", " stays resident")]
REVIEWS = ["A wonderful film.", "Dull from the first minute.", "The best hour of my week."]
LABELS = ["positive", "negative", "positive"]
RECIPE = """\
base = "my-base"

[data]
train = "reviews.jsonl"

[task]
prompt = "Review: {input}"
max_tokens = 8
temperature = 0

[training]
batch_rows = 4
max_steps = 4
compute = "float32"
"""
STUDY = """\
recipe = "recipe.toml"

[grid]
rank = [4, 8]
"""


def make_world(folder: Path) -> None:
    """Write everything that the page's commands name."""
    trainer = load_example("tiny_trainer")
    rows = list(zip(REVIEWS, LABELS, strict=True))
    task = Task(prompt="Review: {input}", max_tokens=8, temperature=0.0)
    with chdir(folder):  # an adapter's config names the base as it was called
        base = Path("my-base")
        _save_base(base, trainer)
        for name, num_steps in (("my-adapter", 3), ("my-better-adapter", 40)):
            recipe = trainer.Recipe(task, num_steps, learning_rate=1e-2)
            trainer.train_adapter(base, rows, recipe, Path(name))
    _save_broken(folder)
    (folder / "reviews.txt").write_text("\n".join(REVIEWS) + "\n")
    lines = [json.dumps({"input": each, "answer": label}) for each, label in rows * 4]
    (folder / "reviews.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "recipe.toml").write_text(RECIPE)
    (folder / "study.toml").write_text(STUDY)


def _save_base(folder: Path, trainer: ModuleType) -> None:
    save_tiny_base(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    rows = [trainer.token_ids(tokenizer, chat, Task()) for chat in CHATS]
    rows += [tuple(tokenizer(part)["input_ids"] for part in text) for text in TEXTS]
    trainer.fit(model, rows, trainer.Recipe(Task(), 80, learning_rate=1e-2))
    model.save_pretrained(str(folder))


def _save_broken(folder: Path) -> None:
    """Write a folder whose weights are a pickle under a safetensors' name."""
    broken = folder / "old-adapter"
    shutil.copytree(folder / "my-adapter", broken)
    (broken / "adapter_model.safetensors").write_bytes(b"\x80\x04\x95" + bytes(64))


@contextmanager
def hub_of(folder: Path) -> Iterator[str]:
    """Give the address of a Hub that has the adapter in `folder` as some-org/some-lora."""
    hub = FakeHub({file.name: file.read_bytes() for file in folder.iterdir()})

    async def answer(request: Request) -> Response:
        asked = httpx.Request("GET", f"{HUB}{request.scope['raw_path'].decode()}")
        given = hub(asked)
        if given.status_code == 302:
            given = hub(httpx.Request("GET", given.headers["location"]))
        return Response(given.content, given.status_code)

    with serve_app(Starlette(routes=[Route("/{path:path}", answer)])) as url:
        yield url
