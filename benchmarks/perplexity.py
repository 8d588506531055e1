"""What does a number format cost in accuracy? Perplexity of a text, by the engine itself.

The text is cut into pieces of `--window` tokens; every token but the first of each piece counts.
The same pieces go to an engine in each format, one after the other, and to unmodified Hugging Face
code in float32.

    python benchmarks/perplexity.py --model BASE_FOLDER
    python benchmarks/perplexity.py --model BASE_FOLDER --text FILE --formats bfloat16,int8
"""

import argparse
import asyncio
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from quickchange_server.engine.client import EngineClient
from quickchange_server.engine.request import GenerationRequest, SamplingParams
from quickchange_server.engine.settings import EngineSettings

from benchmarks.failure import BenchmarkFailure, exit_on_failure
from benchmarks.machine import ROOT, Machine
from benchmarks.report import Report, add_output_options, markdown_table
from benchmarks.server_process import base_folder

FORMATS = ("float32", "bfloat16", "int8")
Windows = Sequence[tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class TextScore:
    """Log probabilities of a text's tokens in one format, [tokens] float64."""

    name: str
    logprobs: torch.Tensor

    @property
    def perplexity(self) -> float:
        """The exponential of the mean negative log probability."""
        return math.exp(-self.logprobs.mean().item())


def cut_text(text: str, folder: Path, window: int, num_tokens: int) -> Windows:
    """Return pieces of `window` token ids, of the first `num_tokens` tokens.

    Raises: BenchmarkFailure when the text is shorter than one window.
    """
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(str(folder))(text)["input_ids"][:num_tokens]
    pieces = [tuple(ids[i : i + window]) for i in range(0, len(ids) - window + 1, window)]
    if not pieces:
        raise BenchmarkFailure(f"the text has {len(ids)} tokens: give a longer one")
    return pieces


async def score_served(folder: Path, name: str, windows: Windows) -> TextScore:
    """Let an engine in one format score the pieces."""
    is_int8 = name == "int8"
    settings = EngineSettings(
        dtype="bfloat16" if is_int8 else name, quantize="int8" if is_int8 else None
    )
    engine = EngineClient(folder, settings)
    await engine.start()
    try:
        scored = [await _score(engine, i, window) for i, window in enumerate(windows)]
    finally:
        await engine.stop()
    return TextScore(name, torch.cat(scored))


async def _score(engine: EngineClient, index: int, window: tuple[int, ...]) -> torch.Tensor:
    request = GenerationRequest(
        f"window-{index}", window, (), SamplingParams(temperature=0), 1, prompt_logprobs=0
    )
    logprobs: list[float] = []
    async for output in engine.generate(request):
        if output.failure is not None:
            raise BenchmarkFailure(f"a request failed: {output.failure.message}")
        logprobs += [each.logprob for each in output.prompt_logprobs or () if each is not None]
    assert len(logprobs) == len(window) - 1
    return torch.tensor(logprobs, dtype=torch.float64)


@torch.inference_mode()
def score_plain(folder: Path, windows: Windows) -> TextScore:
    """Score the pieces by unmodified Hugging Face code in float32."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32).eval()
    scored = []
    for window in windows:
        ids = torch.tensor([window])
        logprobs = model(input_ids=ids).logits[0, :-1].double().log_softmax(-1)
        scored.append(logprobs.gather(1, ids[0, 1:, None]).squeeze(1))
    return TextScore("Hugging Face float32", torch.cat(scored))


def score_table(scores: Sequence[TextScore]) -> str:
    """Return one row a format, compared with the first."""
    reference = scores[0]
    rows = [
        (
            score.name,
            str(len(score.logprobs)),
            f"{score.perplexity:.3f}",
            f"{100 * (score.perplexity / reference.perplexity - 1):+.2f} %",
            f"{(score.logprobs - reference.logprobs).abs().mean().item():.4f}",
        )
        for score in scores
    ]
    header = ("format", "tokens", "perplexity", "against the first", "mean |difference| of logprob")
    return markdown_table(header, rows)


def parsed_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="builtin:smollm2-135m", help="the base: folder or id")
    parser.add_argument("--text", type=Path, help="default: this project's documents")
    parser.add_argument("--formats", default="bfloat16,int8", help=", ".join(FORMATS))
    parser.add_argument("--window", type=int, default=512, help="tokens of a piece")
    parser.add_argument("--tokens", type=int, default=20480, help="of the text, at most")
    add_output_options(parser)
    options = parser.parse_args()
    options.formats = options.formats.split(",")
    if unknown := set(options.formats) - set(FORMATS):
        parser.error(f"--formats: {sorted(unknown)} are none of {', '.join(FORMATS)}")
    return options


def read_text(file: Path | None) -> str:
    """Return the file's text, or the project's documents one after the other."""
    files = [file] if file else [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    return "\n\n".join(each.read_text(encoding="utf-8") for each in files)


def main() -> None:
    """Score and report."""
    options = parsed_options()
    folder = base_folder(str(options.model))
    windows = cut_text(read_text(options.text), folder, options.window, options.tokens)
    scores = [score_plain(folder, windows)]
    for name in options.formats:
        print(f"scoring in {name}", file=sys.stderr, flush=True)
        scores.append(asyncio.run(score_served(folder, name, windows)))
    settings = {
        "base": folder.name,
        "text": options.text or "README.md and docs/*.md of this commit",
        "pieces": f"{len(windows)} of {options.window} tokens",
    }
    results = [{"format": s.name, "perplexity": s.perplexity} for s in scores]
    report = Report("Perplexity", Machine.here(), settings, score_table(scores), results)
    report.publish(options.markdown, options.json)


if __name__ == "__main__":
    with exit_on_failure():
        main()
