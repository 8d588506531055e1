"""`lm-eval`, unmodified: a task scored over HTTP and in its own process gives the same.

Its `local-completions` model sends token ids to /v1/completions with `echo` and `logprobs`; its
`hf` model computes in this process with Hugging Face and PEFT, in float32.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lm_eval
import pytest
from lm_eval.tasks import TaskManager

HERE = Path(__file__).resolve().parent
TASK = "opposites"
NEAR = 1e-4


@pytest.fixture(scope="module")
def tasks() -> Iterator[TaskManager]:
    """The task of this folder; lm-eval reads its data from where it is started."""
    before = Path.cwd()
    os.chdir(HERE / "tasks")
    yield TaskManager(include_path=str(HERE / "tasks"), include_defaults=False)
    os.chdir(before)


def score(tasks: TaskManager, model: str, arguments: dict[str, Any]) -> Any:
    return lm_eval.simple_evaluate(
        model=model,
        model_args=arguments,
        tasks=[TASK],
        task_manager=tasks,
        log_samples=True,
        bootstrap_iters=0,
        batch_size=4,
    )


def likelihoods(found: Any) -> list[tuple[float, bool]]:
    samples = sorted(found["samples"][TASK], key=lambda each: each["doc_id"])
    return [
        (float(value), str(is_greedy) == "True")
        for each in samples
        for value, is_greedy in each["filtered_resps"]
    ]


@pytest.mark.parametrize("model", ["base", "ada"])
def test_both_ways_give_the_same(site: Any, tasks: TaskManager, model: str) -> None:
    local = {"pretrained": str(site.base_folder), "dtype": "float32", "device": "cpu"}
    if model != "base":
        local["peft"] = str(site.adapters[model])
    served = {
        "model": site.base if model == "base" else model,
        "base_url": f"{site.url}/v1/completions",
        "tokenizer": str(site.base_folder),
        "max_length": 512,
    }
    ours = score(tasks, "local-completions", served)
    theirs = score(tasks, "hf", local)
    for metric in ("acc,none", "acc_norm,none"):
        assert ours["results"][TASK][metric] == theirs["results"][TASK][metric]
    pairs = list(zip(likelihoods(ours), likelihoods(theirs), strict=True))
    print(f"\n{model}: accuracy {ours['results'][TASK]['acc,none']:.3f}, {len(pairs)} answers,")
    print(f"largest difference {max(abs(a[0] - b[0]) for a, b in pairs):.1e}")
    assert len(pairs) == 4 * len(ours["samples"][TASK]) > 60
    assert max(abs(a[0] - b[0]) for a, b in pairs) < NEAR
    assert [a[1] for a, _ in pairs] == [b[1] for _, b in pairs]
