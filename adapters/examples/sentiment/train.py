"""Train the sentiment adapter: LoRA on all seven linears of the base, loss on the answer only.

A plain torch loop on the CPU. The adapter of the best validation loss is the one that is kept.
"""

import argparse
import json
import math
import time
from pathlib import Path
from random import Random
from typing import Any, TextIO

import torch
from chat_form import (
    BASE_ID,
    HERE,
    TASK,
    answer_ids,
    answer_logits,
    answer_loss,
    prompt_ids,
    read_rows,
)
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
NUM_ANSWER_TOKENS = 2  # one for either label, one for the end
HANDWRITTEN_REPEATS = 3  # in an epoch; the composed reviews come once
VALIDATE_EVERY = 25  # steps


def parsed_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base", type=Path, help="folder of the base model (Hugging Face form)")
    parser.add_argument("--output", type=Path, default=HERE / "adapter")
    parser.add_argument("--log", type=Path, default=HERE / "train_log.jsonl")
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--batch-rows", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--max-steps", type=int, default=None, help="stop early, to try things")
    return parser.parse_args()


def adapted(base: Path, rank: int) -> Any:
    """Return the base in float32 with a fresh LoRA on every linear of its blocks."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = LoraConfig(
        r=rank,
        lora_alpha=4 * rank,
        lora_dropout=0.05,
        target_modules=LINEARS,
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config)


def token_rows(tokenizer: Any, name: str) -> list[list[int]]:
    """Return prompt and answer of every row of a file as token ids, repeated by kind."""
    ids: list[list[int]] = []
    for row in read_rows(name):
        answer = answer_ids(tokenizer, row["label"])
        assert len(answer) == NUM_ANSWER_TOKENS
        repeats = HANDWRITTEN_REPEATS if row["kind"] == "handwritten" else 1
        ids += [prompt_ids(tokenizer, row["text"]) + answer] * repeats
    return ids


def batches_by_length(rng: Random, rows: list[list[int]], batch_rows: int) -> list[list[list[int]]]:
    """Return one epoch of batches in random order, each of rows of about one length."""
    ordered = sorted(rows, key=lambda row: (len(row), rng.random()))
    batches = [ordered[i : i + batch_rows] for i in range(0, len(ordered), batch_rows)]
    rng.shuffle(batches)
    return batches


def learning_rate_share(step: int, num_steps: int) -> float:
    """Return the share of the peak rate at a step: a short rise, then half a cosine."""
    warmup = max(1, num_steps // 20)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, num_steps - warmup)))


@torch.no_grad()
def validate(model: Any, rows: list[list[int]], pad_id: int) -> tuple[float, float]:
    """Return the validation rows' mean answer loss, and the share whose label came out first."""
    model.eval()
    logits = answer_logits(model, rows, NUM_ANSWER_TOKENS, pad_id)
    model.train()
    targets = torch.tensor([row[-NUM_ANSWER_TOKENS:] for row in rows])
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    is_right = logits[:, 0].argmax(-1) == targets[:, 0]
    return loss.item(), is_right.float().mean().item()


def save(model: Any, folder: Path) -> None:
    """Write the adapter's files: bfloat16 weights, a config without local paths, and the task.

    PEFT would write the target modules in an order that changes from run to run.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    weights = {name: tensor.to(torch.bfloat16) for name, tensor in state.items()}
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_model.safetensors").chmod(0o644)
    model.peft_config["default"].save_pretrained(str(folder))
    config_file = folder / "adapter_config.json"
    config = json.loads(config_file.read_text(encoding="utf-8"))
    config |= {
        "base_model_name_or_path": BASE_ID,
        "inference_mode": True,
        "target_modules": LINEARS,
    }
    for file, values in ((config_file, config), (folder / "task.json", TASK.to_json())):
        file.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def log_line(log: TextIO, **values: Any) -> None:
    log.write(json.dumps(values) + "\n")
    log.flush()


def planned_batches(
    rng: Random, rows: list[list[int]], options: argparse.Namespace
) -> list[list[list[int]]]:
    """Return every batch of the run, epoch after epoch."""
    num_steps = int(options.epochs * len(rows) / options.batch_rows)
    batches: list[list[list[int]]] = []
    while len(batches) < num_steps:
        batches += batches_by_length(rng, rows, options.batch_rows)
    return batches[:num_steps]


class Trainer:
    """Owns the adapter's parameters and their optimizer; one `step` a batch."""

    def __init__(self, model: Any, pad_id: int, learning_rate: float, num_steps: int) -> None:
        self.model = model
        self.pad_id = pad_id
        self.best_loss = math.inf
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._optimizer = torch.optim.AdamW(self._parameters, lr=learning_rate)
        self._schedule = torch.optim.lr_scheduler.LambdaLR(
            self._optimizer, lambda step: learning_rate_share(step, num_steps)
        )

    def step(self, batch: list[list[int]]) -> float:
        """Learn from one batch and return its loss."""
        loss = answer_loss(self.model, batch, NUM_ANSWER_TOKENS, self.pad_id)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._parameters, 1.0)
        self._optimizer.step()
        self._schedule.step()
        self._optimizer.zero_grad()
        return loss.item()

    def validate(self, rows: list[list[int]], output: Path) -> dict[str, float]:
        """Return loss and accuracy on held-out rows; save the adapter if the loss is a new best."""
        loss, accuracy = validate(self.model, rows, self.pad_id)
        if loss < self.best_loss:
            self.best_loss = loss
            save(self.model, output)
        return {"validation_loss": round(loss, 4), "validation_accuracy": round(accuracy, 3)}


def train(model: Any, tokenizer: Any, options: argparse.Namespace, log: TextIO) -> None:
    """Run the loop and log every step."""
    held_out = token_rows(tokenizer, "valid.jsonl")
    rows = token_rows(tokenizer, "train.jsonl")
    batches = planned_batches(Random(options.seed), rows, options)
    trainer = Trainer(model, tokenizer.pad_token_id, options.learning_rate, len(batches))
    started = time.process_time()
    progress = tqdm(batches[: options.max_steps], unit="step")
    for step, batch in enumerate(progress, start=1):
        values = {"loss": round(trainer.step(batch), 4)}
        if step % VALIDATE_EVERY == 0 or step == len(batches):
            values |= trainer.validate(held_out, options.output)
        progress.set_postfix(values)
        log_line(log, step=step, **values, cpu_s=round(time.process_time() - started, 1))


def main() -> None:
    options = parsed_options()
    logging.disable_progress_bar()
    torch.manual_seed(options.seed)
    tokenizer = AutoTokenizer.from_pretrained(options.base)
    model = adapted(options.base, options.rank)
    with options.log.open("w", encoding="utf-8") as log:
        train(model, tokenizer, options, log)


if __name__ == "__main__":
    main()
