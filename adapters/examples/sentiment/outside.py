"""Ask the adapter about reviews by others, which are not part of this project; print its score.

They lie in the source distribution of an old PyPI package (MIT licence): sentences of film and
product reviews, each with the mean of twenty people's ratings (Hutto and Gilbert, ICWSM 2014).
    pip download --no-deps --no-binary :all: vaderSentiment==0.5
    unzip vaderSentiment-0.5.zip && tar xzf vaderSentiment-0.5/additional_resources/*.tar.gz
    python adapters/examples/sentiment/outside.py "$(quickchange base path)" hutto_ICWSM_2014
"""

import argparse
from pathlib import Path
from random import Random
from typing import Any

import torch
from peft import PeftModel
from quickchange_adapters.task import read_task_file
from quickchange_adapters.training.answers import Answer, Answerer
from quickchange_adapters.training.examples import Example, read_examples
from quickchange_adapters.training.prompt_form import PromptForm, end_ids_of
from quickchange_adapters.training.recipe import read_recipe
from quickchange_adapters.training.word_baseline import NAME, word_answers
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

HERE = Path(__file__).parent
FILES = ("movieReviewSnippets_GroundTruth.txt", "amazonReviewSnippets_GroundTruth.txt")
CLEAR = 1.0  # of a rating from -4 to 4: what is nearer to 0 has no label


def labelled(file: Path) -> list[Example]:
    """Return a file's sentences with a clear rating."""
    found = []
    for number, line in enumerate(file.read_text("utf-8", errors="replace").splitlines(), start=1):
        fields = line.split("\t")
        if len(fields) == 3 and abs(float(fields[1])) >= CLEAR:
            label = "positive" if float(fields[1]) > 0 else "negative"
            found.append(Example(fields[2].strip(), label, file, number, {}))
    return found


def sampled(examples: list[Example], num_rows: int, seed: int) -> list[Example]:
    """Return as many sentences of either label, drawn at random."""
    rng = Random(seed)
    return [
        each
        for label in ("positive", "negative")
        for each in rng.sample([e for e in examples if e.answer == label], num_rows // 2)
    ]


def answers(base: Path, adapter: Path, examples: list[Example]) -> list[Answer]:
    """Return what the adapter says to each sentence."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, str(adapter)).eval()
    task = read_task_file(adapter / "task.json").task
    assert task is not None
    form = PromptForm(tokenizer, task, "chat", end_ids_of(base))
    with tqdm(total=len(examples), unit="row") as bar:
        answerer = Answerer(model, tokenizer, task, [form.end_id])
        return answerer.answer([form.prompt_ids(each.input) for each in examples], bar.update)


def share_right(examples: list[Example], said: list[Answer]) -> str:
    right = sum(e.answer == a.text.strip() for e, a in zip(examples, said, strict=True))
    return f"{100 * right / len(examples):.1f} % of {len(examples)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base", type=Path, help="folder of the base")
    parser.add_argument("folder", type=Path, help="where the four lists of sentences are")
    parser.add_argument("--adapter", type=Path, default=HERE / "adapter")
    parser.add_argument("--rows", type=int, default=200, help="of each list")
    parser.add_argument("--seed", type=int, default=7)
    options = parser.parse_args()
    recipe = read_recipe(HERE / "recipe.toml")
    train = read_examples(recipe.data.train, recipe.data)
    for name in FILES:
        examples = sampled(labelled(options.folder / name), options.rows, options.seed)
        said = answers(options.base, options.adapter, examples)
        print(f"{name}: the adapter {share_right(examples, said)}, "
              f"{NAME} {share_right(examples, word_answers(train, examples))}")  # fmt: skip


if __name__ == "__main__":
    main()
