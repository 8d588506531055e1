"""What a model answers, greedily, within a task's limits. Knows no right answers."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from quickchange_adapters.task import Task

DEFAULT_MAX_TOKENS = 64
BATCH_ROWS = 16

OnRows = Callable[[int], None]
"""Is told how many more rows are done."""


@dataclass(frozen=True, slots=True)
class Answer:
    """`has_ended`: by the end token or a stop string, not by the limit of tokens."""

    text: str
    has_ended: bool


class Answerer:
    """Answers prompts of one task with one model, in batches of similar lengths."""

    def __init__(self, model: Any, tokenizer: Any, task: Task, end_ids: Sequence[int]) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._task = task
        self._end_ids = list(end_ids)

    def answer(self, prompts: Sequence[Sequence[int]], on_rows: OnRows) -> list[Answer]:
        """Return an answer to each prompt, in the prompts' order."""
        self._model.eval()
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        found: dict[int, Answer] = {}
        for start in range(0, len(order), BATCH_ROWS):
            some = order[start : start + BATCH_ROWS]
            answers = self._answer_batch([prompts[i] for i in some])
            found.update(zip(some, answers, strict=True))
            on_rows(len(some))
        return [found[i] for i in range(len(prompts))]

    @torch.no_grad()
    def _answer_batch(self, prompts: Sequence[Sequence[int]]) -> Iterator[Answer]:
        longest = max(map(len, prompts))
        pad = self._end_ids[0]
        ids = [[pad] * (longest - len(each)) + list(each) for each in prompts]
        mask = [[0] * (longest - len(each)) + [1] * len(each) for each in prompts]
        output = self._model.generate(
            input_ids=torch.tensor(ids),
            attention_mask=torch.tensor(mask),
            max_new_tokens=self._task.max_tokens or DEFAULT_MAX_TOKENS,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            eos_token_id=self._end_ids,
            pad_token_id=pad,
        )
        return (self._read(row[longest:].tolist()) for row in output)

    def _read(self, ids: list[int]) -> Answer:
        """Return the text before the first end token or stop string."""
        end = next((i for i, each in enumerate(ids) if each in self._end_ids), None)
        text = str(self._tokenizer.decode(ids[:end], skip_special_tokens=True))
        places = [place for stop in self._task.stop if (place := text.find(stop)) >= 0]
        return Answer(text[: min(places)] if places else text, end is not None or bool(places))
