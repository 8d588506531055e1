"""Train a LoRA with PEFT on a handful of rows, with the prompt form that will be served.

A plain torch loop, small enough to read in a minute. The prompt is rendered by the same code that
the server uses (`quickchange_adapters.task`), and written beside the weights as task.json.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from quickchange_adapters.task import Task
from transformers import AutoModelForCausalLM, AutoTokenizer

IGNORED = -100  # what torch's cross-entropy leaves out

Row = tuple[str, str]
"""What the user says, and what the model is to answer."""


@dataclass(frozen=True)
class Recipe:
    """How an adapter is trained."""

    task: Task
    num_steps: int
    rank: int = 8
    learning_rate: float = 1e-3
    seed: int = 0


def train_adapter(base: Path, rows: Sequence[Row], recipe: Recipe, folder: Path) -> float:
    """Train on all rows at every step, save a folder that can be pushed; return the last loss."""
    torch.manual_seed(recipe.seed)
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        LoraConfig(
            r=recipe.rank,
            lora_alpha=2 * recipe.rank,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        ),
    )
    loss = fit(model, [token_ids(tokenizer, row, recipe.task) for row in rows], recipe)
    model.save_pretrained(str(folder))
    (folder / "task.json").write_text(json.dumps(recipe.task.to_json()), encoding="utf-8")
    return loss


def fit(model: Any, rows: Sequence[tuple[list[int], list[int]]], recipe: Recipe) -> float:
    """Fit a model's trainable weights to (prompt ids, answer ids) pairs; return the last loss."""
    ids, mask, labels = batch(rows)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=recipe.learning_rate)
    model.train()
    for _ in range(recipe.num_steps):
        loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return float(loss.detach())


def token_ids(tokenizer: Any, row: Row, task: Task) -> tuple[list[int], list[int]]:
    """Return the chat prompt for a row, and its answer up to the end token."""
    asked, answer = row
    text = tokenizer.apply_chat_template(
        task.render_chat([{"role": "user", "content": asked}]),
        tokenize=False,
        add_generation_prompt=True,
    )
    prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
    said = tokenizer(answer, add_special_tokens=False)["input_ids"]
    return prompt, [*said, tokenizer.eos_token_id]


def batch(rows: Sequence[tuple[list[int], list[int]]]) -> tuple[torch.Tensor, ...]:
    """Return token ids, mask and labels, each [rows, tokens]; only answers are learnt."""
    longest = max(len(prompt) + len(answer) for prompt, answer in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    labels = torch.full_like(ids, IGNORED)
    for index, (prompt, answer) in enumerate(rows):
        end = len(prompt) + len(answer)
        ids[index, :end] = torch.tensor(prompt + answer)
        mask[index, :end] = 1
        labels[index, len(prompt) : end] = torch.tensor(answer)
    return ids, mask, labels
