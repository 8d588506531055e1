"""The PEFT baseline on a tiny base."""

from argparse import Namespace
from pathlib import Path

from benchmarks.make_adapters import AdapterShape, write_adapters
from benchmarks.peft_baseline import PeftModels, measure
from benchmarks.workload import Prompts, parse_scenarios


def test_base_one_adapter_and_a_mix_are_generated_in_static_batches(
    tiny_base: Path, tmp_path: Path
) -> None:
    adapters = write_adapters(tiny_base, tmp_path, 2, AdapterShape(rank=4, dtype="float32"))
    models = PeftModels(Namespace(device="cpu", dtype="auto"), tiny_base, adapters)
    for scenario in parse_scenarios("base:2,1:2,2:3"):
        figures = measure(models, scenario, Prompts(5, seed=1), num_tokens=4)
        assert figures.tokens_per_s > 0
        assert figures.tokens_per_piece == 1
        assert figures.ttft_p50_s < figures.e2e_p50_s
