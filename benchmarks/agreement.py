"""Does a mixed batch say what unmodified Hugging Face and PEFT say, on a real base?

The engine serves the base and several adapters in one batch, in the checkpoint's own dtype. Each
row is a piece of text and a greedy answer to it; both references are then shown the same tokens
(teacher forcing). Compared are the likeliest next token at every position, and the log probability
of the token that really follows. With `--merged` each adapter's rows run on its merged copy. How
far PEFT in bfloat16 is from PEFT in float32 is in the table too: the noise that the number
format brings by itself.

    python benchmarks/agreement.py --model BASE_FOLDER --adapter adapters/examples/sentiment/adapter
"""

import argparse
import asyncio
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from quickchange_adapters.loading import load_weights
from quickchange_server.engine.client import EngineClient
from quickchange_server.engine.request import (
    AdapterRef,
    GenerationRequest,
    SamplingParams,
    TokenLogprobs,
)
from quickchange_server.engine.settings import EngineSettings
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.failure import BenchmarkFailure, exit_on_failure
from benchmarks.machine import ROOT, Machine
from benchmarks.make_adapters import AdapterShape, linear_shapes, write_adapter
from benchmarks.report import Report, add_output_options, markdown_table
from benchmarks.server_process import base_folder

GIB = 1 << 30
CLEAR_GAP = 0.25
TEXT_FILE = ROOT / "adapters/examples/sentiment/test.jsonl"
HEADER = (
    "compared",
    "part",
    "positions",
    "same argmax",
    f"clear differences (gap > {CLEAR_GAP})",
    "mean / max difference of logprob",
)


@dataclass(frozen=True, slots=True)
class Predictions:
    """What one implementation says about each next token of a row; all are [positions].

    `gaps`: by how much the likeliest token leads the second; None where it was not asked for.
    """

    argmax: Tensor
    logprobs: Tensor
    gaps: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Row:
    """One row of the batch: its adapter (None: the base), its tokens, and what the engine said."""

    adapter: Path | None
    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    served: Predictions

    def places(self, part: str) -> slice:
        """Return which predictions concern the prompt, or the answer."""
        first_of_answer = len(self.prompt_ids) - 1
        return slice(0, first_of_answer) if part == "prompt" else slice(first_of_answer, None)


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two implementations over all rows, one part of each row."""

    name: str
    part: str
    num_positions: int
    argmax_agreement: float
    num_clear: int
    mean_difference: float
    max_difference: float

    def cells(self) -> Sequence[str]:
        """Return the table's row."""
        return (
            self.name,
            self.part,
            str(self.num_positions),
            f"{100 * self.argmax_agreement:.2f} %",
            str(self.num_clear),
            f"{self.mean_difference:.4f} / {self.max_difference:.3f}",
        )

    def as_json(self) -> dict[str, Any]:
        """Return plain data."""
        return {name: getattr(self, name) for name in self.__slots__}


async def serve_rows(
    folder: Path, adapters: Sequence[Path | None], options: argparse.Namespace
) -> list[Row]:
    """Run all rows at once on one engine."""
    prompts = prompt_rows(folder, len(adapters), options.prompt_tokens)
    settings = EngineSettings(
        dtype=options.dtype,
        device=options.device,
        max_batch_rows=len(adapters),
        kernels=options.kernels,
        quantize=options.quantize,
    )
    engine = EngineClient(folder, settings)
    await engine.start()
    try:
        for adapter in filter(None, adapters):
            await engine.load_adapter(_weights(adapter, engine))
        rows = list(zip(adapters, prompts, strict=True))
        if options.merged:
            return await _serve_merged(engine, rows, options.tokens)
        calls = (_serve_row(engine, *row, options.tokens) for row in rows)
        return list(await asyncio.gather(*calls))
    finally:
        await engine.stop()


async def _serve_merged(
    engine: EngineClient, rows: Sequence[tuple[Path | None, tuple[int, ...]]], num_tokens: int
) -> list[Row]:
    """Run each adapter's rows by themselves, on its merged copy."""
    served: list[Row] = []
    for adapter in dict.fromkeys(adapter for adapter, _ in rows):
        if adapter is not None:
            await engine.merge(str(adapter))
        calls = [_serve_row(engine, a, prompt, num_tokens) for a, prompt in rows if a == adapter]
        served += await asyncio.gather(*calls)
        if adapter is not None:
            await engine.unmerge(str(adapter))
    return served


def prompt_rows(folder: Path, count: int, num_tokens: int) -> list[tuple[int, ...]]:
    """Cut so many pieces out of the example's reviews."""
    from transformers import AutoTokenizer

    lines = TEXT_FILE.read_text(encoding="utf-8").splitlines()
    text = "\n".join(json.loads(line)["text"] for line in lines)
    ids = AutoTokenizer.from_pretrained(str(folder))(text)["input_ids"]
    if len(ids) < count * num_tokens:
        raise BenchmarkFailure(f"the text has {len(ids)} tokens: ask for fewer or shorter rows")
    return [tuple(ids[i * num_tokens : (i + 1) * num_tokens]) for i in range(count)]


def _weights(adapter: Path, engine: EngineClient) -> Any:
    config, weights = adapter / "adapter_config.json", adapter / "adapter_model.safetensors"
    return load_weights(config, weights, engine.base, str(adapter), engine.dtype)


async def _serve_row(
    engine: EngineClient, adapter: Path | None, prompt: tuple[int, ...], num_tokens: int
) -> Row:
    request = GenerationRequest(
        f"row-{adapter}-{hash(prompt)}",
        prompt,
        () if adapter is None else (AdapterRef(str(adapter)),),
        SamplingParams(temperature=0, logprobs=1),
        max_tokens=num_tokens,
        ignore_eos=True,
        prompt_logprobs=1,
    )
    entries: list[TokenLogprobs] = []
    async for output in engine.generate(request):
        if output.failure is not None:
            raise BenchmarkFailure(f"a request failed: {output.failure.message}")
        entries += [entry for entry in output.prompt_logprobs or () if entry is not None]
        entries += output.logprobs or ()
    argmax = torch.tensor([entry.top[0][0] for entry in entries])
    served = Predictions(argmax, torch.tensor([entry.logprob for entry in entries]))
    answer = tuple(entry.token_id for entry in entries[len(prompt) - 1 :])
    return Row(adapter, prompt, prompt + answer, served)


def reference_predictions(
    folder: Path, rows: Sequence[Row], dtype: torch.dtype
) -> list[Predictions]:
    """Show the rows' tokens to unmodified Hugging Face and PEFT, one by one."""
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(str(folder), dtype=dtype).eval()
    results = {i: _predict(base, row) for i, row in enumerate(rows) if row.adapter is None}
    adapted = [(i, row) for i, row in enumerate(rows) if row.adapter is not None]
    model = _with_adapters(base, list(dict.fromkeys(row.adapter for _, row in adapted)))
    for index, row in adapted:
        model.set_adapter(_peft_name(row.adapter))
        results[index] = _predict(model, row)
    return [results[i] for i in range(len(rows))]


def _with_adapters(base: Any, adapters: Sequence[Path | None]) -> Any:
    from peft import PeftModel

    model = base
    for number, path in enumerate(adapters):
        if number == 0:
            model = PeftModel.from_pretrained(base, str(path), adapter_name=_peft_name(path))
        else:
            model.load_adapter(str(path), adapter_name=_peft_name(path))
    return model.eval()


def _peft_name(adapter: Path | None) -> str:
    """Return a name that PEFT takes: it may hold no dot."""
    return str(adapter).replace(".", "_")


@torch.inference_mode()
def _predict(model: Any, row: Row) -> Predictions:
    logits = model(torch.tensor([row.token_ids])).logits[0, :-1].float()
    logprobs = torch.log_softmax(logits, dim=-1)
    top = logprobs.topk(2, dim=-1).values
    following = torch.tensor(row.token_ids[1:]).unsqueeze(1)
    return Predictions(
        logprobs.argmax(dim=-1), logprobs.gather(1, following).squeeze(1), top[:, 0] - top[:, 1]
    )


def compare(
    name: str, rows: Sequence[Row], ours: Sequence[Predictions], theirs: Sequence[Predictions]
) -> list[Comparison]:
    """Compare position by position: the prompts (prefill) and the answers (decode) apart."""
    return [_compare_part(name, part, rows, ours, theirs) for part in ("prompt", "answer")]


def _compare_part(
    name: str,
    part: str,
    rows: Sequence[Row],
    ours: Sequence[Predictions],
    theirs: Sequence[Predictions],
) -> Comparison:
    def joined(predictions: Sequence[Predictions], field: str) -> Tensor:
        pairs = zip(predictions, rows, strict=True)
        return torch.cat([getattr(each, field)[row.places(part)] for each, row in pairs])

    same = joined(ours, "argmax") == joined(theirs, "argmax")
    difference = (joined(ours, "logprobs") - joined(theirs, "logprobs")).abs()
    is_clear = ~same & (joined(theirs, "gaps") > CLEAR_GAP)
    return Comparison(
        name,
        part,
        len(same),
        float(same.float().mean()),
        int(is_clear.sum()),
        float(difference.mean()),
        float(difference.max()),
    )


def run(options: argparse.Namespace, folder: Path, made: Path) -> list[Comparison]:
    """Serve the rows, ask both references, compare all three."""
    shapes = linear_shapes(folder, AdapterShape().targets)
    adapters: list[Path | None] = [None, *options.adapter]
    for seed, rank in enumerate(options.ranks):
        path = made / f"rank-{rank}-{seed}"
        write_adapter(path, shapes, AdapterShape(rank), seed)
        adapters.append(path)
    rows = asyncio.run(serve_rows(folder, adapters * options.rows, options))
    served = [row.served for row in rows]
    half = reference_predictions(folder, rows, torch.bfloat16)
    full = reference_predictions(folder, rows, torch.float32)
    return [
        *compare("engine – PEFT bfloat16", rows, served, half),
        *compare("engine – PEFT float32", rows, served, full),
        *compare("PEFT bfloat16 – PEFT float32", rows, half, full),
    ]


def parsed_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="builtin:smollm2-135m", help="the base: folder or id")
    parser.add_argument("--adapter", type=Path, action="append", default=[], metavar="FOLDER")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="auto", help="of the engine")
    parser.add_argument("--kernels", default="auto", help="auto, native or plain")
    parser.add_argument("--quantize", choices=["int8"], help="quantise the engine's base")
    parser.add_argument(
        "--merged", action="store_true", help="each adapter's rows alone, on its merged copy"
    )
    parser.add_argument("--ranks", default="8,16,16,64", help="of the random adapters, with commas")
    parser.add_argument("--rows", type=int, default=2, help="rows per adapter and for the base")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=64, help="tokens out per row")
    add_output_options(parser)
    options = parser.parse_args()
    options.ranks = [int(rank) for rank in options.ranks.split(",") if rank]
    options.adapter = [path.resolve() for path in options.adapter]
    return options


def main() -> None:
    """Measure and report."""
    options = parsed_options()
    machine = Machine.here()
    folder = base_folder(options.model)
    with tempfile.TemporaryDirectory() as made:
        comparisons = run(options, folder, Path(made))
    settings = {
        "base": folder.name,
        "dtype, device of the engine": f"{options.dtype}, {options.device}",
        "kernels, quantised": f"{options.kernels}, {options.quantize or 'no'}",
        "batch": f"{options.rows} rows of the base and of each adapter, "
        + ("one adapter after the other, merged" if options.merged else "all at once"),
        "adapters": f"random of ranks {options.ranks} on all seven linears; "
        f"given: {[path.parent.name for path in options.adapter]}",
        "rows": f"{options.prompt_tokens} tokens of reviews, {options.tokens} tokens greedy answer",
    }
    table = markdown_table(HEADER, [comparison.cells() for comparison in comparisons])
    results = [comparison.as_json() for comparison in comparisons]
    report = Report("Agreement with PEFT", machine, settings, table, results)
    report.publish(options.markdown, options.json)


if __name__ == "__main__":
    with exit_on_failure():
        main()
