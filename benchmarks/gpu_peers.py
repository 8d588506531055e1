"""The same work by transformers and PEFT, on the same machine in the same run.

A batch of prompts starts at once and every answer has as many tokens. The base is of the same
shape with the same kind of random weights; what is timed does not depend on their values.
"""

import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
from transformers.generation.streamers import BaseStreamer

from benchmarks.gpu_decode import Timed
from benchmarks.gpu_engine import SHAPES, random_model, random_prompt
from benchmarks.gpu_engine import Row as Request
from benchmarks.gpu_session import Row

HEADER = ("engine", "rows", "adapters", "tokens/s", "decode step")
CONTINUOUS_BLOCK = 256  # transformers' default
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
Outcome = tuple[float, float]  # seconds of the whole, and of one decode step


@dataclass(frozen=True, slots=True)
class Work:
    """So many prompts, and how many adapters of rank 16 they use in turn."""

    num_rows: int
    num_adapters: int
    prompt_tokens: int
    answer_tokens: int

    def prompts(self) -> list[list[int]]:
        """Return token ids."""
        return [list(random_prompt(self.prompt_tokens, row)) for row in range(self.num_rows)]

    def row(self, name: str, outcome: Outcome) -> Row:
        """Return a line of the table."""
        whole_s, step_s = outcome
        rate = self.num_rows * self.answer_tokens / whole_s
        cells = (
            name,
            str(self.num_rows),
            str(self.num_adapters or "none"),
            f"{rate:.0f}",
            f"{1e3 * step_s:.2f} ms",
        )
        values = {"engine": name, "rows": self.num_rows, "adapters": self.num_adapters}
        return Row(cells, {**values, "per_s": rate, "whole_s": whole_s, "step_s": step_s})


class Clock(BaseStreamer):  # type: ignore[misc]
    """Notes when `generate` hands out the tokens of each step."""

    def __init__(self) -> None:
        self.times_s: list[float] = []

    def put(self, value: Any) -> None:
        """Note the time."""
        self.times_s.append(time.perf_counter())

    def end(self) -> None:
        """Do nothing: the last step was noted."""

    def step_s(self) -> float:
        """Return the median time of a step."""
        times = self.times_s[1:]
        return median(b - a for a, b in zip(times, times[1:], strict=False))


def ours(timed: Timed, works: list[Work]) -> Iterator[Row]:
    """Time Quickchange's engine."""
    for work in works:
        requests = [
            Request(tuple(prompt), ((row % work.num_adapters, 1.0),) if work.num_adapters else ())
            for row, prompt in enumerate(work.prompts())
        ]
        started_s = time.perf_counter()
        timed.engine.run(requests, work.answer_tokens, None)
        whole_s = time.perf_counter() - started_s
        step_s = median(timed.engine.recorder.decode_periods_s(work.num_rows))
        yield work.row("Quickchange", (whole_s, step_s))


class Peers:
    """transformers' model of one shape, made when first wanted."""

    def __init__(self, shape: str, dtype: torch.dtype, device: torch.device) -> None:
        self._parts = "llama", SHAPES[shape], dtype, device
        self._model: Any = None

    def static(self, works: list[Work]) -> Iterator[Callable[[], Row]]:
        """Time `generate`: all rows start and end together."""
        for work in works:
            yield partial(self._static, work)

    def continuous(self, works: list[Work]) -> Iterator[Row]:
        """Time `generate_batch`, which is transformers' continuous batching."""
        from transformers import GenerationConfig
        from transformers.generation.configuration_utils import ContinuousBatchingConfig

        model = self._base()
        for work in works:
            config = GenerationConfig(
                max_new_tokens=work.answer_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0
            )
            per_row = -(-(work.prompt_tokens + work.answer_tokens) // CONTINUOUS_BLOCK) + 1
            batching = ContinuousBatchingConfig(
                block_size=CONTINUOUS_BLOCK,
                num_blocks=work.num_rows * per_row + 8,
                max_batch_tokens=max(CONTINUOUS_BLOCK, work.num_rows * work.prompt_tokens // 8),
            )
            generate: Callable[..., Any] = partial(
                model.generate_batch,
                work.prompts(),
                generation_config=config,
                continuous_batching_config=batching,
                record_timestamps=True,
                progress_bar=False,
            )
            found = generate()
            counts = {len(each.generated_tokens) for each in found.values()}
            if counts != {work.answer_tokens} or len(found) != work.num_rows:
                raise RuntimeError(f"answers of {counts} tokens to {len(found)} prompts")
            yield work.row("transformers, continuous", _continuous_outcome(found.values()))

    def peft(self, works: list[Work]) -> Iterator[Row]:
        """Time PEFT: one adapter is active, several go through `adapter_names`."""
        model = self._with_adapters(max(work.num_adapters for work in works))
        for work in works:
            names: dict[str, Any] = {}
            model.set_adapter("a0")
            if work.num_adapters > 1:
                rows = range(work.num_rows)
                names = {"adapter_names": [f"a{row % work.num_adapters}" for row in rows]}
            yield work.row("PEFT", self._generate(model, work, names))

    def _static(self, work: Work) -> Row:
        return work.row("transformers, static", self._generate(self._base(), work, {}))

    def _base(self) -> Any:
        if self._model is None:
            self._model = random_model(*self._parts, "sdpa")
            self._model.generation_config.eos_token_id = None
            self._model.generation_config.pad_token_id = 0
        return self._model

    def _with_adapters(self, count: int) -> Any:
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(r=16, lora_alpha=16, target_modules=TARGETS, init_lora_weights=False)
        options = {"autocast_adapter_dtype": False}
        with torch.device(self._parts[3]):  # thousands of small matrices, drawn where they stay
            model = get_peft_model(self._base(), config, adapter_name="a0", **options)
            for index in range(1, count):
                model.add_adapter(f"a{index}", config, **options)
        return model.eval()

    def _generate(self, model: Any, work: Work, keywords: dict[str, Any]) -> Outcome:
        inputs = torch.tensor(work.prompts(), device=self._parts[3])
        outcomes = []
        for _ in range(2):  # the first one warms up
            clock = Clock()
            started_s = time.perf_counter()
            with torch.inference_mode():
                model.generate(
                    input_ids=inputs,
                    attention_mask=torch.ones_like(inputs),
                    max_new_tokens=work.answer_tokens,
                    do_sample=False,
                    streamer=clock,
                    **keywords,
                )
            outcomes.append((time.perf_counter() - started_s, clock.step_s()))
        return outcomes[-1]


def _continuous_outcome(found: Iterable[Any]) -> Outcome:
    """Take the times that transformers noted, which leave out how its manager warms up."""
    found = list(found)
    whole_s = max(each.lifespan[1] for each in found) - min(each.lifespan[0] for each in found)
    steps = [
        later - earlier
        for each in found
        for earlier, later in itertools.pairwise(each.timestamps or ())
    ]
    return whole_s, median(steps) if steps else float("nan")
