"""How a review and its label become token ids: one form for training, evaluation and serving.

`TASK` puts the review into its form (here: as it is) with the function that the server uses too,
and training writes it beside the weights as task.json. The base's own chat template renders the
message and adds its default system prompt; the assistant answers with the label and the end token.
"""

import json
from pathlib import Path
from typing import Any

import torch
from quickchange_adapters.task import Task
from torch import Tensor

HERE = Path(__file__).parent
BASE_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
LABELS = ("positive", "negative")
TASK = Task(prompt="{input}", max_tokens=4, temperature=0.0)


def read_rows(name: str) -> list[dict[str, str]]:
    """Return the rows of one of this folder's JSON lines files."""
    return [json.loads(line) for line in (HERE / name).read_text(encoding="utf-8").splitlines()]


def prompt_ids(tokenizer: Any, review: str, task: Task = TASK) -> list[int]:
    """Return the chat prompt for a review, up to where the assistant begins."""
    text = tokenizer.apply_chat_template(
        task.render_chat([{"role": "user", "content": review}]),
        tokenize=False,
        add_generation_prompt=True,
    )
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def answer_ids(tokenizer: Any, label: str) -> list[int]:
    """Return what the assistant says: the label's tokens and the end token."""
    return [*tokenizer(label, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]


def shared_prefix_length(rows: list[list[int]], num_answer_tokens: int) -> int:
    """Return how many tokens all rows begin with; the answers are never counted."""
    longest = min(map(len, rows)) - num_answer_tokens - 1
    return next((i for i in range(longest) if len({row[i] for row in rows}) > 1), longest)


def left_padded(rows: list[list[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Return token ids and mask, both [rows, tokens], so that every row ends in the last column."""
    longest = max(map(len, rows))
    ids = [[pad_id] * (longest - len(row)) + row for row in rows]
    mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids), torch.tensor(mask)


def answer_logits(model: Any, rows: list[list[int]], num_answer_tokens: int, pad_id: int) -> Tensor:
    """Return the logits [rows, num_answer_tokens, vocabulary] that predict the rows' last tokens.

    The system prompt that all rows begin with is computed once and its keys and values are
    repeated; gradients flow through it as if every row had computed its own.
    """
    prefix = shared_prefix_length(rows, num_answer_tokens)
    cache = model(
        input_ids=torch.tensor([rows[0][:prefix]]), use_cache=True, logits_to_keep=1
    ).past_key_values
    cache.batch_repeat_interleave(len(rows))
    ids, mask = left_padded([row[prefix:] for row in rows], pad_id)
    logits = model(
        input_ids=ids,
        attention_mask=torch.cat([torch.ones(len(rows), prefix, dtype=mask.dtype), mask], dim=1),
        position_ids=prefix + (mask.cumsum(1) - 1).clamp(min=0),
        past_key_values=cache,
        logits_to_keep=num_answer_tokens + 1,
    ).logits
    return logits[:, :-1].float()


def answer_loss(model: Any, rows: list[list[int]], num_answer_tokens: int, pad_id: int) -> Tensor:
    """Return the mean cross-entropy over the last `num_answer_tokens` tokens of every row."""
    logits = answer_logits(model, rows, num_answer_tokens, pad_id)
    targets = torch.tensor([row[-num_answer_tokens:] for row in rows])
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
