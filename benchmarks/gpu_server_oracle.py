"""Are a server's greedy answers those of transformers and PEFT, shown the same tokens?

The server answers in its own dtype, all rows in one batch. The references are shown what it wrote
(teacher forcing), in float32 and in the server's dtype: how far the second is from the first is
the noise that the number format brings by itself.
"""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.failure import BenchmarkFailure
from benchmarks.gpu_server_api import Answer, Api
from benchmarks.gpu_server_findings import Check, Outcome

CLEAR_GAP = 0.25
"""By so much of log probability the likeliest token must lead for a difference to count."""
LEAST_AGREEMENT = 0.95
SLACK = 0.02
"""Of the agreement of PEFT in the server's own dtype, below which the server's may lie."""
ANSWER_TOKENS = 24
PROMPT_TOKENS = 48


@dataclass(frozen=True, slots=True)
class Forced:
    """What a reference says after each token but the last: [positions]."""

    argmax: Tensor
    gaps: Tensor
    logprobs: Tensor


@dataclass(frozen=True, slots=True)
class Agreement:
    """How two answers to the same tokens compare."""

    num_positions: int
    share: float
    num_clear: int
    num_clear_differences: int
    mean_difference: float

    @property
    def text(self) -> str:
        """For people."""
        return (
            f"{100 * self.share:.1f} % of {self.num_positions}, "
            f"{self.num_clear_differences} of {self.num_clear} clear ones differ, "
            f"logprobs {self.mean_difference:.4f} apart"
        )


def compare(ours: Forced, theirs: Forced) -> Agreement:
    """Compare position by position; `theirs` says which are clear."""
    is_same = ours.argmax == theirs.argmax
    is_clear = theirs.gaps > CLEAR_GAP
    return Agreement(
        len(is_same),
        float(is_same.float().mean()),
        int(is_clear.sum()),
        int((is_clear & ~is_same).sum()),
        float((ours.logprobs - theirs.logprobs).abs().mean()),
    )


def verdict(served: Agreement, noise: Agreement) -> Outcome:
    """Judge a server's agreement with float32 by that of PEFT in the server's dtype."""
    least = min(LEAST_AGREEMENT, noise.share - SLACK)
    is_enough = served.num_clear >= served.num_positions // 4  # else it would say little
    may_differ = noise.num_clear_differences + 1
    is_good = served.share >= least and served.num_clear_differences <= may_differ and is_enough
    return f"{served.text}; PEFT itself {100 * noise.share:.1f} %", is_good


class Oracle:
    """transformers and PEFT over the files that the server has. `dtype` is the server's.

    `adapters`: folders by name; PEFT takes names without a dot.
    """

    def __init__(
        self, base: Path, adapters: Mapping[str, Path], dtype: torch.dtype, device: torch.device
    ) -> None:
        self._base = base
        self._adapters = adapters
        self._dtype = dtype
        self._device = device
        self._ids = ids_by_text(base)
        self._models: dict[torch.dtype, Any] = {}

    def prompts(self, count: int) -> list[list[int]]:
        """Return so many prompts of random tokens, none of them special."""
        generator = torch.Generator().manual_seed(7)
        shape = (count, PROMPT_TOKENS)
        ids = torch.randint(3, len(self._ids), shape, generator=generator)
        return [[int(token) for token in row] for row in ids]

    def checks(self, api: Api, base_name: str) -> dict[str, Check]:
        """Return a check for the base and for each adapter; all are answered in one batch."""
        names = [base_name, *self._adapters]
        prompts = self.prompts(2 * len(names))
        asked = list(zip([*names, *names], prompts, strict=True))
        answers: list[Answer] = []

        def check(name: str) -> Outcome:
            if not answers:
                answers.extend(api.answers(asked, ANSWER_TOKENS))
            mine = [answer for answer, (it, _) in zip(answers, asked, strict=True) if it == name]
            return self.judge(mine, name if name in self._adapters else None)

        return {f"{name} as PEFT says it": partial(check, name) for name in names}

    def judge(self, answers: Sequence[Answer], adapter: str | None) -> Outcome:
        """Compare answers of one adapter, or of the base."""
        exact, rounded = (
            joined([self.forced(answer, adapter, dtype) for answer in answers])
            for dtype in (torch.float32, self._dtype)
        )
        served = joined([self.served(answer) for answer in answers])
        return verdict(compare(served, exact), compare(rounded, exact))

    def served(self, answer: Answer) -> Forced:
        """Return what the server said, as ids."""
        argmax = torch.tensor(self.ids(answer.likeliest))
        return Forced(argmax, torch.zeros(len(argmax)), torch.tensor(answer.logprobs))

    def ids(self, tokens: Sequence[str]) -> list[int]:
        """Return the ids of tokens' texts. Raises: BenchmarkFailure for a text of none."""
        try:
            return [self._ids[token] for token in tokens]
        except KeyError as error:
            raise BenchmarkFailure(f"no token of the vocabulary is {error}") from error

    @torch.inference_mode()
    def forced(self, answer: Answer, adapter: str | None, dtype: torch.dtype) -> Forced:
        """Show an answer's tokens to the base, or to one adapter of it."""
        model = self._model(dtype)
        if adapter is not None:
            model.set_adapter(adapter)
        ids = torch.tensor([self.ids(answer.tokens)], device=self._device)
        with model.disable_adapter() if adapter is None else nullcontext():
            logits = model(ids).logits[0, :-1].float()
        logprobs = torch.log_softmax(logits, dim=-1)
        top = logprobs.topk(2, dim=-1)
        following = logprobs.gather(1, ids[0, 1:, None])[:, 0]
        gaps = top.values[:, 0] - top.values[:, 1]
        return Forced(top.indices[:, 0].cpu(), gaps.cpu(), following.cpu())

    def _model(self, dtype: torch.dtype) -> Any:
        """Return the base with all adapters, made when it is first wanted."""
        if dtype not in self._models:
            from peft import PeftModel
            from transformers import AutoModelForCausalLM

            base = AutoModelForCausalLM.from_pretrained(str(self._base), dtype=dtype)
            (first, path), *others = self._adapters.items()
            model = PeftModel.from_pretrained(base.to(self._device), str(path), adapter_name=first)
            for name, other in others:
                model.load_adapter(str(other), adapter_name=name)
            self._models[dtype] = model.to(dtype).eval()
        return self._models[dtype]


def joined(parts: Sequence[Forced]) -> Forced:
    """Put several rows behind one another."""
    return Forced(
        torch.cat([part.argmax for part in parts]),
        torch.cat([part.gaps for part in parts]),
        torch.cat([part.logprobs for part in parts]),
    )


def ids_by_text(base: Path) -> dict[str, int]:
    """Return the vocabulary of a byte-level tokenizer whose tokens are ASCII, by the tokens' text.

    Raises: BenchmarkFailure where two tokens have one text.
    """
    from tokenizers import Tokenizer

    vocabulary = Tokenizer.from_file(str(base / "tokenizer.json")).get_vocab()
    ids = {
        piece.replace("\u0120", " ").replace("\u010a", "\n"): token
        for piece, token in vocabulary.items()
    }
    if len(ids) != len(vocabulary):
        raise BenchmarkFailure("two tokens of the vocabulary have the same text")
    return ids
