"""How an example becomes token ids: the same ids that serving builds for the same task.

The text is put into its form by `Task`, which serving calls too; the base's own chat template
renders the conversation. Knows no tensors.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quickchange_adapters.errors import CannotTrain
from quickchange_adapters.task import Task
from quickchange_adapters.training.examples import Example, Problems


@dataclass(frozen=True, slots=True)
class TokenRow:
    """One example as token ids; `answer_ids` ends with the token that ends an answer."""

    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]

    def __len__(self) -> int:
        """How many tokens there are; the last one is only predicted, never read."""
        return len(self.prompt_ids) + len(self.answer_ids)


class PromptForm:
    """A task in one of two forms, `chat` or `completion`, for one tokenizer.

    Raises: CannotTrain when the base cannot do the form.
    """

    def __init__(self, tokenizer: Any, task: Task, form: str, end_ids: Sequence[int]) -> None:
        if form == "chat" and not tokenizer.chat_template:
            raise CannotTrain('the base has no chat template; write form = "completion"')
        self._tokenizer = tokenizer
        self._is_chat = form == "chat"
        self.task = task
        self.end_id = self._find_end(end_ids)

    def prompt_ids(self, text: str) -> list[int]:
        """Return what the model reads before it answers."""
        if self._is_chat:
            return self._ids(self._chat_text(text), add_special_tokens=False)
        return self._ids(self.task.render_prompt(text), add_special_tokens=True)

    def answer_ids(self, answer: str) -> list[int]:
        """Return what the model is to say, and the token that ends it."""
        return [*self._ids(answer, add_special_tokens=False), self.end_id]

    def row(self, example: Example) -> TokenRow:
        """Return an example as token ids."""
        prompt, answer = self.prompt_ids(example.input), self.answer_ids(example.answer)
        return TokenRow(tuple(prompt), tuple(answer))

    def _ids(self, text: str, add_special_tokens: bool) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"])

    def _chat_text(self, text: str, answer: str | None = None) -> str:
        messages = self.task.render_chat([{"role": "user", "content": text}])
        if answer is not None:
            messages.append({"role": "assistant", "content": answer})
        return str(
            self._tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=answer is None
            )
        )

    def _find_end(self, end_ids: Sequence[int]) -> int:
        """Return the token that the chat template puts behind an answer, if it ends generation."""
        eos: int | None = self._tokenizer.eos_token_id
        known = [*([] if eos is None else [eos]), *end_ids]
        if not known:
            raise CannotTrain("the base names no token that ends an answer (eos_token_id)")
        if not self._is_chat:
            return known[0]
        after = self._chat_text("x", "answer").rpartition("answer")[2]
        found = [each for each in self._ids(after.strip(), False) if each in known]
        return found[0] if found else known[0]


def end_ids_of(base: Path) -> list[int]:
    """Return the ids that end an answer of a base, as serving reads them from its folder."""
    for name in ("generation_config.json", "config.json"):
        file = base / name
        if file.is_file():
            value = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id")
            if value is not None:
                return list(value) if isinstance(value, list) else [value]
    return []


def token_rows(examples: Sequence[Example], form: PromptForm, max_length: int) -> list[TokenRow]:
    """Return examples as token ids.

    Raises: DataInvalid for rows that are longer than `max_length`, or have no prompt at all.
    """
    problems = Problems()
    rows = [form.row(example) for example in examples]
    for example, row in zip(examples, rows, strict=True):
        if not row.prompt_ids:
            sentence = "the input has no tokens: the base's tokenizer knows none of its characters"
            problems.add(example.file, example.line, sentence)
        elif len(row) > max_length:
            problems.add(
                example.file,
                example.line,
                f"the row has {len(row)} tokens ({len(row.prompt_ids)} of prompt, "
                f"{len(row.answer_ids)} of answer), and training.max_length is {max_length}: "
                "shorten its fields, or raise max_length as far as the context goes",
            )
    problems.raise_any()
    return rows
