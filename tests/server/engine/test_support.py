"""The support matrix: family × adapter feature × way of being served, against PEFT.

`tools/support_page.py` writes docs/support.md from CELLS, so every cell there is a case here.
Adapters take the whole way that an upload takes: validated and loaded from PEFT's own files.
"""

import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from quickchange_adapters.errors import AdapterRefused
from quickchange_adapters.loading import load_weights
from quickchange_server.engine.client import EngineClient
from quickchange_server.engine.request import GenerationRequest

from tests.conftest import save_peft_adapter, save_tiny_base
from tests.server.engine.conftest import Answer, Recorder, collect, make_engine, run_all
from tests.server.engine.test_engine_peft import Oracle, full_logprobs, prompt_of, request
from tests.server.engine.test_families import FAMILIES, Family

VOCAB = 381
NUM_TOKENS = 10
MODES = ("alone", "mixed", "chunked", "prefix", "preempted", "merged")
Config = dict[str, Any]


@dataclass(frozen=True)
class Feature:
    """One adapter feature: what it adds to a LoRA config, and families that it cannot fit."""

    config: Config
    not_for: dict[str, str]


BIASED = ("llama-biases", "qwen2", "qwen2-sliding", "gpt2")
UNBIASED = "its linears have no bias"
SCALED = "its embedding scales what it looks up"
FEATURES: dict[str, Feature] = {
    "all linears": Feature({}, {}),
    "rsLoRA, rank and alpha patterns": Feature(
        {"use_rslora": True, "rank_pattern": {r"\.0\..*": 3}, "alpha_pattern": {r"\.1\..*": 40}},
        {},
    ),
    "some layers": Feature({"layers_to_transform": [1]}, {}),
    "exclude_modules": Feature({"exclude_modules": ["o_proj", "mlp.c_proj"]}, {}),
    "lora_bias": Feature({"lora_bias": True, "r": 5}, {}),
    "bias: lora_only": Feature(
        {"bias": "lora_only"}, {name: UNBIASED for name in FAMILIES if name not in BIASED}
    ),
    "lm_head": Feature({"target_modules": ["lm_head"]}, {}),
    "embedding": Feature(
        {"target_modules": ["embed_tokens", "wte"]}, {"gemma2": SCALED, "gemma3": SCALED}
    ),
}


@dataclass(frozen=True)
class Cell:
    """One row of the matrix: a family and a feature; every mode is tried in one test."""

    family: str
    feature: str

    @property
    def name(self) -> str:
        return f"{self.family}-{self.feature}"

    @property
    def refusal(self) -> str | None:
        return FEATURES[self.feature].not_for.get(self.family)


CELLS = [Cell(family, feature) for family in FAMILIES for feature in FEATURES]
SERVED = [cell for cell in CELLS if cell.refusal is None]


def lora_config(family: Family, feature: Feature) -> Config:
    is_conv1d = family.model_type == "gpt2"
    return {"r": 8, "target_modules": family.targets, "fan_in_fan_out": is_conv1d, **feature.config}


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Bases of all families, made when first asked for."""

    class Bases(dict[str, Path]):
        def __missing__(self, name: str) -> Path:
            family = FAMILIES[name]
            folder = tmp_path_factory.mktemp("base") / name
            self[name] = save_tiny_base(folder, family.model_type, **family.overrides)
            return self[name]

    return Bases()


@asynccontextmanager
async def serving(
    base: Path, folders: Sequence[Path], **settings: Any
) -> AsyncIterator[EngineClient]:
    engine = make_engine(base, **settings)
    await engine.start()
    try:
        for index, folder in enumerate(folders):
            files = (folder / "adapter_config.json", folder / "adapter_model.safetensors")
            weights = load_weights(*files, engine.base, f"a{index}", torch.float32)
            await engine.load_adapter(weights)
        yield engine
    finally:
        await engine.stop()


def ask(name: str, length: int, adapter: int | None) -> GenerationRequest:
    digest = None if adapter is None else f"a{adapter}"
    return request(name, prompt_of(length, length), digest, NUM_TOKENS, VOCAB)


def check(oracle: Oracle, adapter: int | None, asked: GenerationRequest, answer: Answer) -> None:
    tokens = [*asked.prompt_ids, *answer.token_ids]
    expected = oracle.logprobs(adapter, tokens[:-1])[len(asked.prompt_ids) - 1 :]
    torch.testing.assert_close(full_logprobs(answer), expected, atol=1e-4, rtol=0)
    gap = expected.topk(2).values.diff().abs()
    assert answer.token_ids == expected.argmax(-1).tolist() or gap.min() < 1e-4


@pytest.mark.parametrize("cell", SERVED, ids=lambda cell: cell.name)
async def test_cell(cell: Cell, bases: dict[str, Path], tmp_path: Path) -> None:
    family, base = FAMILIES[cell.family], bases[cell.family]
    config = lora_config(family, FEATURES[cell.feature])
    folder = save_peft_adapter(tmp_path / "it", base, seed=1, **config)
    plain = save_peft_adapter(
        tmp_path / "plain", base, seed=2, **{**lora_config(family, FEATURES["all linears"]), "r": 4}
    )
    oracle = Oracle(base, [folder, plain])
    async with serving(base, [folder, plain], max_step_tokens=48) as engine:
        asked = ask("alone", 30, 0)
        answer = await collect(engine.generate(asked))
        assert answer.num_cached == 0
        check(oracle, 0, asked, answer)
        again = await collect(engine.generate(asked))
        assert again.num_cached == 16
        check(oracle, 0, asked, again)
        rows: list[int | None] = [0, 1, None, 0]
        mixed = [ask(f"m{i}", 40 + 17 * i, row) for i, row in enumerate(rows)]
        for row, one, got in zip(rows, mixed, await run_all(engine, mixed), strict=True):
            check(oracle, row, one, got)
        await engine.merge("a0")
        merged = ask("merged", 21, 0)
        check(oracle, 0, merged, await collect(engine.generate(merged)))
    await check_preempted(base, [folder, plain], oracle)


async def check_preempted(base: Path, folders: Sequence[Path], oracle: Oracle) -> None:
    """Three requests into blocks for two: somebody is computed anew, nobody notices."""
    recorder = Recorder()
    async with serving(base, folders) as engine:
        block_bytes = engine.snapshot().memory_bytes["kv_total"]
        block_bytes //= engine.snapshot().kv_blocks_total + 1
    small = {"kv_cache_bytes": 8 * block_bytes, "observer": recorder}
    async with serving(base, folders, **small) as engine:
        for index in range(len(folders)):
            assert await engine.activate(f"a{index}")
        rows: list[int | None] = [0, 1, None]
        asks = [ask(f"p{i}", 26 + i, row) for i, row in enumerate(rows)]
        for row, one, got in zip(rows, asks, await run_all(engine, asks), strict=True):
            check(oracle, row, one, got)
    assert sum(step.num_preempted for step in recorder.steps) > 0


REFUSED = [cell for cell in CELLS if cell.refusal == SCALED]


@pytest.mark.parametrize("cell", REFUSED, ids=lambda cell: cell.name)
def test_refused(cell: Cell, bases: dict[str, Path], tmp_path: Path) -> None:
    base = bases[cell.family]
    config = lora_config(FAMILIES[cell.family], FEATURES[cell.feature])
    folder = save_peft_adapter(tmp_path / "it", base, **config)
    files = (folder / "adapter_config.json", folder / "adapter_model.safetensors")
    with pytest.raises(AdapterRefused, match="embed_tokens"):
        load_weights(*files, make_engine(base).base, "it", torch.float32)


def test_the_page_of_the_documentation_lists_these_cells() -> None:
    root = Path(__file__).resolve().parents[3]
    tool = [sys.executable, str(root / "tools" / "support_page.py"), "--check"]
    assert subprocess.run(tool, check=False).returncode == 0, "run python tools/support_page.py"
