"""No skew: what the example is trained on and what the server asks are the same token ids."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from quickchange_adapters.task import Task, read_task_file
from quickchange_adapters.training.prompt_form import PromptForm
from quickchange_server.api.app import AppServices, create_app
from quickchange_server.tokenizer import Tokenizer
from transformers import AutoTokenizer

from tests.conftest import CHAT_TEMPLATE
from tests.server.conftest import serve_in_process
from tests.server.scripted_adapters import ScriptedAdapters
from tests.server.scripted_engine import ScriptedEngine

EXAMPLES = Path(__file__).parents[2] / "adapters" / "examples"
WITH_DEFAULT_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
) + CHAT_TEMPLATE


def example_task(name: str) -> Task:
    task = read_task_file(EXAMPLES / name / "adapter" / "task.json").task
    assert task is not None
    return task


TASKS = {name: example_task(name) for name in ("sentiment", "shakespeare", "product")} | {
    "a form": Task(prompt="Review: {input}\n\nVerdict {of} it:"),
    "a form and a system message": Task(
        "<{input}>", "Answer with one word. 🙂", ("\n",), 4, 0.0, 0.5
    ),
}
REVIEWS = [
    "The soup was cold.",
    "  two\n lines, {input} and {braces} \\n %s ",
    "naïve café — 你好 🙂<|im_end|>",
    "",
]


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, WITH_DEFAULT_SYSTEM])
@pytest.mark.parametrize("name", TASKS)
async def test_training_and_serving_build_identical_token_ids(
    tiny_base: Path,
    services: AppServices,
    adapters: ScriptedAdapters,
    scripted_engine: ScriptedEngine,
    name: str,
    template: str,
) -> None:
    trainer, server = (AutoTokenizer.from_pretrained(str(tiny_base)) for _ in range(2))
    trainer.chat_template = server.chat_template = template
    adapters.tasks["ada"] = TASKS[name]
    app = create_app(replace(services, tokenizer=Tokenizer(server)))
    async for client in serve_in_process(app):
        for review in REVIEWS:
            trained = PromptForm(trainer, TASKS[name], "chat", ()).prompt_ids(review)
            body: dict[str, Any] = {
                "model": "ada",
                "messages": [{"role": "user", "content": review}],
            }
            answer = await client.post("/v1/chat/completions", json=body)
            assert answer.status_code == 200, answer.text
            assert list(scripted_engine.requests[-1].prompt_ids) == trained
            assert answer.json()["usage"]["prompt_tokens"] == len(trained)
            tokenized = await client.post("/tokenize", json=body)
            assert tokenized.json()["tokens"] == trained


async def test_a_completion_has_the_ids_that_it_was_trained_on(
    tiny_base: Path,
    services: AppServices,
    adapters: ScriptedAdapters,
    scripted_engine: ScriptedEngine,
) -> None:
    trainer, server = (AutoTokenizer.from_pretrained(str(tiny_base)) for _ in range(2))
    task = adapters.tasks["ada"] = Task("Review: {input}\nVerdict:")
    form = PromptForm(trainer, task, "completion", ())
    async for client in serve_in_process(
        create_app(replace(services, tokenizer=Tokenizer(server)))
    ):
        for review in REVIEWS:
            body = {"model": "ada", "prompt": review}
            assert (await client.post("/v1/completions", json=body)).status_code == 200
            assert list(scripted_engine.requests[-1].prompt_ids) == form.prompt_ids(review)
