"""How fast is plain PEFT `generate` on the work of throughput.py?

A static batch without a server: C prompts start and end together. The base is an unmodified
Hugging Face model, one adapter is PEFT's active adapter, several go through `adapter_names`, which
is PEFT's own way to mix them in a batch. A streamer notes when each step's tokens are there.

    python benchmarks/peft_baseline.py --model BASE_FOLDER
"""

import argparse
import itertools
import secrets
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers.generation.streamers import BaseStreamer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.failure import exit_on_failure
from benchmarks.machine import Machine
from benchmarks.make_adapters import AdapterShape, write_adapters
from benchmarks.report import (
    Report,
    add_output_options,
    option_type,
    scenario_results,
    scenario_table,
)
from benchmarks.server_process import base_folder
from benchmarks.timing import Figures, RequestTiming, summarise
from benchmarks.workload import (
    DEFAULT_SCENARIOS,
    Prompts,
    Scenario,
    adapter_name,
    max_adapters,
    parse_scenarios,
)


class ClockStreamer(BaseStreamer):  # type: ignore[misc]
    """Notes when `generate` hands out the tokens of each step; the first call is the prompt."""

    def __init__(self) -> None:
        self.times_s: list[float] = []

    def put(self, value: Any) -> None:
        """Note the time."""
        self.times_s.append(time.perf_counter())

    def end(self) -> None:
        """Do nothing: the last step was noted."""


class PeftModels:
    """The plain base, and the base with all adapters in PEFT, each loaded once."""

    def __init__(self, options: argparse.Namespace, folder: Path, adapters: list[Path]) -> None:
        from transformers import AutoTokenizer

        self._device = options.device
        self._tokenizer = AutoTokenizer.from_pretrained(str(folder), padding_side="left")
        self._tokenizer.pad_token = self._tokenizer.pad_token or self._tokenizer.eos_token
        self._base = _plain_model(folder, options)
        self._peft: Any = _peft_model(folder, adapters, options) if adapters else None
        self.dtype = str(self._base.dtype).removeprefix("torch.")

    def generate(self, scenario: Scenario, prompts: list[str], num_tokens: int) -> ClockStreamer:
        """Generate so many tokens for all prompts in one static batch."""
        model = self._peft if scenario.num_adapters else self._base
        inputs = self._tokenizer(prompts, return_tensors="pt", padding=True).to(self._device)
        streamer = ClockStreamer()
        with torch.inference_mode():
            out = model.generate(
                **inputs,
                **self._adapter_argument(scenario),
                max_new_tokens=num_tokens,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=self._tokenizer.pad_token_id,
                streamer=streamer,
            )
        assert out.shape[1] == inputs["input_ids"].shape[1] + num_tokens
        return streamer

    def _adapter_argument(self, scenario: Scenario) -> dict[str, list[str]]:
        """Return `adapter_names` where there is a mix; one adapter is made PEFT's active one."""
        if scenario.num_adapters == 1:
            self._peft.set_adapter(adapter_name(0))
        if scenario.num_adapters <= 1:
            return {}
        indices = (row % scenario.num_adapters for row in range(scenario.num_clients))
        return {"adapter_names": [adapter_name(index) for index in indices]}


def _plain_model(folder: Path, options: argparse.Namespace) -> Any:
    from transformers import AutoModelForCausalLM

    dtype = "auto" if options.dtype == "auto" else getattr(torch, options.dtype)
    model = AutoModelForCausalLM.from_pretrained(str(folder), dtype=dtype).eval()
    model.generation_config.eos_token_id = None
    return model.to(options.device)


def _peft_model(folder: Path, adapters: list[Path], options: argparse.Namespace) -> Any:
    """Load all adapters; they stay in the base's dtype, which is PEFT's fastest form."""
    from peft import PeftModel

    first, *others = adapters
    model = PeftModel.from_pretrained(
        _plain_model(folder, options),
        str(first),
        adapter_name=first.name,
        autocast_adapter_dtype=False,
    )
    for path in others:
        model.load_adapter(str(path), adapter_name=path.name, autocast_adapter_dtype=False)
    return model.eval()


def measure(models: PeftModels, scenario: Scenario, prompts: Prompts, num_tokens: int) -> Figures:
    """Run one static batch."""
    texts = [prompts.take() for _ in range(scenario.num_clients)]
    cpu_s, started_s = time.process_time(), time.perf_counter()
    times_s = tuple(models.generate(scenario, texts, num_tokens).times_s[1:])
    cpu_s, ended_s = time.process_time() - cpu_s, time.perf_counter()
    timing = RequestTiming(started_s, times_s, ended_s, num_tokens)
    return summarise([timing] * scenario.num_clients, server_cpu_s=cpu_s)


def run_all(models: PeftModels, options: argparse.Namespace) -> dict[Scenario, list[Figures]]:
    """Warm up, then run all scenarios in turn, several times."""
    prompts = Prompts(options.prompt_words, options.seed)
    runs: dict[Scenario, list[Figures]] = {scenario: [] for scenario in options.scenarios}
    for scenario in options.scenarios:
        measure(models, scenario, prompts, 2)
    for repeat, scenario in itertools.product(range(options.repeats), options.scenarios):
        figures = measure(models, scenario, prompts, options.tokens)
        runs[scenario].append(figures)
        note = (
            f"{repeat + 1}/{options.repeats} {scenario.title}: {figures.tokens_per_s:.1f} tokens/s"
        )
        print(note, file=sys.stderr, flush=True)
    return runs


def settings_of(options: argparse.Namespace, folder: Path, dtype: str) -> dict[str, object]:
    """Return what is printed above the table."""
    return {
        "server": "none: PEFT generate, static batch, all rows start and end together",
        "base": folder.name,
        "dtype, device": f"{dtype}, {options.device}",
        "work": f"prompts of {options.prompt_words} words, {options.tokens} tokens out, greedy, "
        "end of text ignored",
        "adapters": f"rank {options.rank} on all seven linears, in turn, in the base's dtype",
        "runs": f"{options.repeats} interleaved; medians of the runs",
        "seed": options.seed,
    }


def parsed_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="builtin:smollm2-135m", help="the base: folder or id")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument(
        "--scenarios",
        type=option_type(parse_scenarios),
        default=parse_scenarios(DEFAULT_SCENARIOS),
        help=f"adapters:rows with commas ({DEFAULT_SCENARIOS})",
    )
    parser.add_argument("--prompt-words", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=64, help="tokens out per row")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--seed", type=int, default=None)
    add_output_options(parser)
    options = parser.parse_args()
    if any(scenario.is_merged for scenario in options.scenarios):
        parser.error("a merged adapter is not measured here: it is a plain model, as the base is")
    if options.seed is None:
        options.seed = secrets.randbelow(1 << 32)
    return options


def main() -> None:
    """Measure and report."""
    options = parsed_options()
    machine = Machine.here()
    folder = base_folder(options.model)
    with tempfile.TemporaryDirectory() as made:
        count = max_adapters(options.scenarios)
        adapters = write_adapters(folder, Path(made), count, AdapterShape(options.rank))
        models = PeftModels(options, folder, adapters)
    runs = run_all(models, options)
    settings = settings_of(options, folder, models.dtype)
    report = Report("Plain PEFT", machine, settings, scenario_table(runs), scenario_results(runs))
    report.publish(options.markdown, options.json)


if __name__ == "__main__":
    with exit_on_failure():
        main()
