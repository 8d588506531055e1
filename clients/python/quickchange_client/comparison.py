"""Two versions side by side: their configs, how strong they are, and what they answer.

Shows no tables. One of the two may be the base, which has neither config nor norms.
"""

import json
import math
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from quickchange_client.adapter import AdapterVersion
from quickchange_client.client import Quickchange
from quickchange_client.errors import ApiError
from quickchange_client.generation import GenerationOptions
from quickchange_client.multipart import Progress

MAX_TOKENS = 64
NUM_AT_ONCE = 8
ALWAYS_SHOWN = ("peft_type", "r", "lora_alpha", "target_modules")


@dataclass(frozen=True, slots=True)
class Side:
    """One of the two: what was asked for, and for an adapter the version and its config."""

    model: str
    version: AdapterVersion | None = None
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def task(self) -> dict[str, Any]:
        """The version's task.json; empty when there is none."""
        return (self.version and self.version.task) or {}

    def norms(self) -> dict[str, float]:
        """Return the norm of the update of every module, from the report of the upload."""
        report = self.version.report if self.version else None
        modules = report.modules.matched if report else []
        return {m.module: m.update_norm for m in modules if m.update_norm is not None}


@dataclass(frozen=True, slots=True)
class FieldPair:
    """A setting as either side has it; None: it does not."""

    name: str
    a: Any
    b: Any

    @property
    def is_equal(self) -> bool:
        """Whether both say the same; lists of names have no order."""
        return _plain(self.a) == _plain(self.b)


@dataclass(frozen=True, slots=True)
class NormPair:
    """The norm of a target's whole update; None: a side does not touch it."""

    target: str
    num_modules: int
    a: float | None
    b: float | None


@dataclass(frozen=True, slots=True)
class Output:
    """What a side answered; `error` is why it did not."""

    text: str = ""
    finish_reason: str | None = None
    num_tokens: int = 0
    error: str | None = None


@dataclass(frozen=True, slots=True)
class OutputPair:
    """What both sides answered to a prompt."""

    prompt: str
    a: Output
    b: Output

    @property
    def is_equal(self) -> bool:
        """Whether both answered, and the same."""
        return self.a.error is None and self.b.error is None and self.a.text == self.b.text


@dataclass(frozen=True, slots=True)
class AskOptions:
    """How both sides are asked: greedily unless `temperature` says otherwise.

    `max_tokens` None: what a side's task.json says, else 64. `is_raw`: as plain text, not as a
    chat. `is_raw_prompt`: leave task.json aside.
    """

    max_tokens: int | None = None
    temperature: float = 0.0
    seed: int = 0
    is_raw: bool = False
    is_raw_prompt: bool = False

    def for_side(self, side: Side) -> GenerationOptions:
        """Return the options of a request to one side."""
        own = None if self.is_raw_prompt else side.task.get("max_tokens")
        return {
            "max_tokens": self.max_tokens or own or MAX_TOKENS,
            "temperature": self.temperature,
            "seed": self.seed,
            "raw_prompt": self.is_raw_prompt or None,
        }


def read_side(client: Quickchange, model: str) -> Side:
    """Look up what a model string means now. Raises: the tree in `errors`."""
    found = client.models.get(model)
    name, _, number = (found.root or "").rpartition(":")
    if found.parent is None or not number.isdecimal():
        return Side(model)
    version = client.adapters.get_version(name, int(number))
    return Side(model, version, client.adapters.get_config(name, int(number)).values)


def compare_fields(a: Side, b: Side) -> list[FieldPair]:
    """Return what always matters, and every field of config and task that differs.

    Beside the base, which has no config, a config's other fields say nothing.
    """
    others = (*a.config, *b.config) if a.version and b.version else ()
    pairs = [
        FieldPair(name, a.config.get(name), b.config.get(name))
        for name in dict.fromkeys((*ALWAYS_SHOWN, *others))
    ]
    tasks = [
        FieldPair(f"task {name}", a.task.get(name), b.task.get(name))
        for name in dict.fromkeys((*a.task, *b.task))
    ]
    return [each for each in (*pairs, *tasks) if each.name in ALWAYS_SHOWN or not each.is_equal]


def compare_norms(a: Side, b: Side) -> list[NormPair]:
    """Return the norms by what is targeted (`q_proj`, …), and of all together, last."""
    ours, theirs = a.norms(), b.norms()
    modules = sorted({*ours, *theirs})
    targets = sorted({_target(module) for module in modules})
    pairs = [
        _norm_pair(target, [m for m in modules if _target(m) == target], ours, theirs)
        for target in targets
    ]
    return [*pairs, _norm_pair("all", modules, ours, theirs)] if modules else []


def compare_outputs(
    client: Quickchange,
    sides: tuple[Side, Side],
    prompts: Sequence[str],
    options: AskOptions,
    progress: Progress | None = None,
) -> list[OutputPair]:
    """Ask both sides every prompt, several at once; `progress(done, total)`.

    What a server refuses is an output with an `error`. Raises: what ends all of it, such as
    ConnectionFailed.
    """
    jobs = [(side, prompt) for prompt in prompts for side in sides]
    outputs: list[Output] = []
    executor = ThreadPoolExecutor(NUM_AT_ONCE)
    try:
        for output in executor.map(lambda job: _ask(client, job[0], job[1], options), jobs):
            outputs.append(output)
            if progress is not None:
                progress(len(outputs), len(jobs))
    finally:
        executor.shutdown(cancel_futures=True)
    pairs = zip(prompts, outputs[0::2], outputs[1::2], strict=True)
    return [OutputPair(prompt, a, b) for prompt, a, b in pairs]


def _ask(client: Quickchange, side: Side, prompt: str, options: AskOptions) -> Output:
    asked = options.for_side(side)
    try:
        answer = (
            client.complete(side.model, prompt, **asked)
            if options.is_raw
            else client.chat(side.model, prompt, **asked)
        )
    except ApiError as error:
        return Output(error=str(error))
    num_tokens = answer.usage.completion_tokens if answer.usage else 0
    return Output(answer.text, answer.choices[0].finish_reason, num_tokens)


def _norm_pair(
    target: str, modules: Sequence[str], ours: dict[str, float], theirs: dict[str, float]
) -> NormPair:
    a, b = (_total(norms[m] for m in modules if m in norms) for norms in (ours, theirs))
    return NormPair(target, len(modules), a, b)


def _total(norms: Iterable[float]) -> float | None:
    squares = [norm * norm for norm in norms]
    return math.sqrt(sum(squares)) if squares else None


def _target(module: str) -> str:
    return module.rpartition(".")[2]


def _plain(value: Any) -> str:
    if isinstance(value, list):
        value = sorted(value, key=str)
    return json.dumps(value, sort_keys=True)
