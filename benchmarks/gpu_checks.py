"""Is what the GPU computes right? Kernels, captured steps and the engine against plain oracles.

Errors of kernels are relative: ‖actual - expected‖ / ‖expected‖, with the oracle in float32.
Errors of log probabilities are the largest difference.
"""

import copy
import math
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from quickchange_adapters.host_adapter import pack_adapter
from quickchange_adapters.layout import AdapterLayout, GroupShape, Place
from quickchange_adapters.ops.deltas import add_deltas, add_reference
from quickchange_adapters.ops.triton_deltas import TritonDeltas
from quickchange_adapters.ops.triton_product import product
from quickchange_adapters.plan import RowBlock, Term, build_plan
from quickchange_adapters.pool import AdapterPool, Slot
from quickchange_adapters.weights import AdapterWeights, LoraPair
from quickchange_server.engine.attention import KvShape, KvStorage, Rule
from quickchange_server.engine.attention_tiles import KvRow
from quickchange_server.engine.request import SamplingParams
from quickchange_server.engine.settings import EngineSettings
from quickchange_server.engine.triton_attention import TritonAttention
from torch import Tensor
from torch.nn import functional

from benchmarks.gpu_engine import (
    FAMILIES,
    MIB,
    VOCABULARY,
    Answer,
    GpuEngine,
    Row,
    random_adapter,
    random_model,
    random_prompt,
)
from benchmarks.gpu_far_checks import Check, bits_check, draws_check, far_checks

KERNEL_TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}
LOGPROB_TOLERANCE = 2e-3
MIN_AGREEMENT = 0.95
BLOCK_SIZE = 16
RANKS = (1, 8, 12, 16, 24, 64)
SMALL_KV_SHAPE = KvShape(2, 32, 32, 3)
KV_SHAPES = (KvShape(8, 128, 128, 4), KvShape(2, 96, 96, 7), KvShape(1, 256, 256, 8))
RULES = (
    Rule(0.1),
    Rule(0.1, window=50),
    Rule(0.1, softcap=20.0),
    Rule(0.1, window=9, softcap=5.0),
)


def run_checks(
    device: torch.device, half: torch.dtype, wanted: Sequence[str] = ("",)
) -> Iterator[Check]:
    """Make comparisons, each as soon as it is done; one that fails is an infinite error.

    The kernels' first, and in half precision most of them: compiled for float32, which has no
    matrix units, attention over wide heads takes a quarter of a minute for each variant.
    `wanted`: how the names of those begin that are made.
    """
    for name, check in all_checks(device, half):
        if not name.startswith(tuple(wanted)):
            continue
        try:
            yield from check()
        except Exception:
            traceback.print_exc()
            yield Check(f"{name}: FAILED, see above", math.inf, 0)


def all_checks(
    device: torch.device, half: torch.dtype
) -> Iterator[tuple[str, Callable[[], Iterable[Check]]]]:
    """Yield the comparisons by name, to be made."""
    for dtype in (half, torch.float32):
        yield f"deltas, {_name(dtype)}", partial(_delta_check, device, dtype)
    for dtype, shape, rule in attention_variants(half):
        title = f"attention, {_name(dtype)}, {shape.num_groups} x {shape.key_dim}, "
        title += f"window {rule.window}, cap {rule.softcap}"
        yield title, partial(_attention_check, title, device, dtype, shape, rule)
    for dtype in (half, torch.float32):
        yield f"product, {_name(dtype)}", partial(_product_check, device, dtype)
    yield "draws", lambda: [draws_check(device)]
    if device.type == "cuda":
        yield "far offsets", lambda: far_checks(device, half)
        yield "bits alone and together", lambda: [bits_check(device, half)]
    yield "steps ahead", lambda: ahead_checks(device)
    yield "engine in half precision", lambda: half_precision_checks(device, half)
    for family in FAMILIES:
        yield f"engine, {family}", partial(engine_checks, device, family)


def attention_variants(half: torch.dtype) -> Iterator[tuple[torch.dtype, KvShape, Rule]]:
    """Yield what attention is compared for: all shapes in half precision, a small one in full."""
    for shape in KV_SHAPES:
        yield from ((half, shape, rule) for rule in RULES[:: len(RULES) - 1])
    yield from ((torch.float32, SMALL_KV_SHAPE, rule) for rule in RULES)


def _delta_check(device: torch.device, dtype: torch.dtype) -> list[Check]:
    error = deltas_error(device, dtype)
    return [Check(f"deltas, {_name(dtype)}", error, KERNEL_TOLERANCE[dtype])]


def _product_check(device: torch.device, dtype: torch.dtype) -> list[Check]:
    x, weight = torch.randn(7, 3000, device=device), torch.randn(500, 3000, device=device)
    actual = product(x.to(dtype), weight.to(dtype), None)
    expected = x.to(dtype).double() @ weight.to(dtype).double().t()
    error = relative_error(actual, expected.float())
    return [Check(f"product of few rows, {_name(dtype)}", error, KERNEL_TOLERANCE[dtype])]


def _attention_check(
    title: str, device: torch.device, dtype: torch.dtype, shape: KvShape, rule: Rule
) -> list[Check]:
    return [Check(title, attention_error(device, dtype, shape, rule), KERNEL_TOLERANCE[dtype])]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Return ‖actual - expected‖ / ‖expected‖; NaN stays NaN and is no good."""
    return float((actual.float() - expected).norm() / expected.norm())


def deltas_error(device: torch.device, dtype: torch.dtype) -> float:
    """Compare mixed ranks, mixes and joined rows with the reference; return the worst error."""
    shape = GroupShape("group", 2048, (1024, 256, 200), 2)
    places = {f"{n}.{p}": Place("group", n, p) for n in range(2) for p in range(3)}
    layout = AdapterLayout({"group": shape}, places)
    pool = AdapterPool(layout, 512 * layout.row_elements * dtype.itemsize, dtype, device)
    slots = [_slot(pool, layout, rank, seed) for seed, rank in enumerate(RANKS)]
    blocks = _row_blocks(slots)
    num_tokens = blocks[-1].end + 1
    worst = 0.0
    for layer in range(2):
        x = torch.randn(num_tokens, shape.in_features, device=device).to(dtype)
        actual = torch.zeros(num_tokens, shape.out_features, device=device, dtype=dtype)
        expected = torch.zeros_like(actual, dtype=torch.float32)
        tables = TritonDeltas(pool, len(blocks))
        plan = build_plan(blocks, num_tokens, pool, is_exact=False, tables=tables)
        tables.start(x, pool.arenas["group"], layer)
        add_deltas(actual, x, pool.arenas["group"], layer, plan)
        for block in blocks:
            add_reference(expected, x, pool.arenas["group"], layer, block)
        worst = max(worst, relative_error(actual, expected))
    return worst


def _slot(pool: AdapterPool, layout: AdapterLayout, rank: int, seed: int) -> Slot:
    generator = torch.Generator().manual_seed(seed)
    shape = layout.groups["group"]
    pairs = {
        module: LoraPair(
            torch.randn(rank, shape.in_features, generator=generator) * shape.in_features**-0.5,
            torch.randn(shape.part_outs[place.part], rank, generator=generator) * rank**-0.5,
        )
        for module, place in layout.places.items()
    }
    adapter = pack_adapter(
        AdapterWeights(f"check-{seed}", pairs), layout, pool.arenas["group"].lora_a.dtype
    )
    slots = pool.acquire(adapter)
    assert slots is not None
    return slots[0]


def _row_blocks(slots: list[Slot]) -> list[RowBlock]:
    """One row of each adapter, two mixes, a run of equal rows, and a short chunk."""
    terms: list[tuple[Term, ...]] = [(Term(slot),) for slot in slots]
    terms += [tuple(Term(slot, 0.5 - i) for i, slot in enumerate(slots[n : n + 4])) for n in (0, 2)]
    terms += [(Term(slots[3]),)] * 20
    blocks = [RowBlock(row, row + 1, each) for row, each in enumerate(terms)]
    start = len(blocks) + 1
    return [*blocks, RowBlock(start, start + 11, terms[5])]


def attention_error(device: torch.device, dtype: torch.dtype, shape: KvShape, rule: Rule) -> float:
    """Compare decode rows and chunks over scattered blocks with a dense product in float32."""
    spans = [(0, 1), (15, 1), (300, 1), (77, 1), (1700, 1), (0, 130), (190, 70)]
    generator = torch.Generator().manual_seed(0)
    counts = [-(-(position + tokens) // BLOCK_SIZE) for position, tokens in spans]
    order = (1 + torch.randperm(sum(counts), generator=generator)).tolist()
    storage = KvStorage(
        [shape], len(order) + 1, BLOCK_SIZE, torch.empty(0, dtype=dtype, device=device)
    )
    for tensor in (*storage.keys, *storage.values):
        tensor.normal_()
    rows, start = [], 0
    for (position, tokens), count in zip(spans, counts, strict=True):
        rows.append(KvRow(start, position, tokens, [order.pop() for _ in range(count)]))
        start += tokens
    num_heads = shape.num_heads * shape.num_groups
    query = torch.randn(num_heads, start, shape.key_dim, device=device).to(dtype)
    out = torch.full((start, num_heads, shape.value_dim), float("nan"), device=device, dtype=dtype)
    TritonAttention([shape], BLOCK_SIZE, 64, device).fill(rows).attend(storage, 0, query, rule, out)
    expected = torch.cat([_dense_attention(storage, query, row, rule) for row in rows])
    return relative_error(out, expected)


def _dense_attention(storage: KvStorage, query: Tensor, row: KvRow, rule: Rule) -> Tensor:
    """Return one request's rows [tokens, heads, dim] in float32, with a mask as large as it is."""
    length = row.position + row.num_tokens
    blocks = torch.tensor([row.blocks], device=query.device)
    keys, values = (each.float() for each in storage.gather(0, blocks, length))
    q = query[:, row.start : row.start + row.num_tokens].float()[None]
    groups = q.shape[1] // keys.shape[1]
    keys, values = keys.repeat_interleave(groups, 1), values.repeat_interleave(groups, 1)
    own = torch.arange(row.position, length, device=query.device)[:, None]
    positions = torch.arange(length, device=query.device)
    is_seen = positions <= own
    if rule.window is not None:
        is_seen = is_seen & (positions > own - rule.window)
    if rule.softcap is None:
        out = functional.scaled_dot_product_attention(
            q, keys, values, attn_mask=is_seen, scale=rule.scaling
        )
        return out[0].transpose(0, 1)
    scores = rule.softcap * torch.tanh(q @ keys.transpose(2, 3) * rule.scaling / rule.softcap)
    weights = torch.softmax(scores.masked_fill(~is_seen, float("-inf")), dim=-1)
    return (weights @ values)[0].transpose(0, 1)


def engine_settings(device: torch.device, dtype: str, **values: Any) -> EngineSettings:
    """Return small ceilings, with Triton's kernels whatever the device."""
    return EngineSettings(
        device=str(device),
        dtype=dtype,
        kv_cache_bytes=32 * MIB,
        adapter_device_bytes=32 * MIB,
        max_step_tokens=48,
        max_batch_rows=8,
        merged_bytes=0,
        **{"kernels": "triton", **values},
    )


ROWS = [
    Row(random_prompt(5, 0)),
    Row(random_prompt(70, 1), ((0, 1.0),)),
    Row(random_prompt(33, 2), ((1, 1.0),)),
    Row(random_prompt(1, 3), ((0, 0.7), (1, -0.4))),
    Row(random_prompt(64, 4)),
]


def ready_engine(device: torch.device, family: str, dtype: str, **values: Any) -> GpuEngine:
    """Make an engine with the two adapters that `ROWS` use."""
    engine = GpuEngine(family, FAMILIES[family], engine_settings(device, dtype, **values))
    for seed, rank in enumerate((8, 20)):
        engine.add_adapter(random_adapter(engine.base, rank, seed))
    return engine


def engine_checks(device: torch.device, family: str) -> Iterator[Check]:
    """Compare the float32 engine with Hugging Face's code, and captured steps with eager ones."""
    engine = ready_engine(device, family, "float32")
    answers = engine.run(ROWS, 8, VOCABULARY)
    graphs = engine.runner.graphs
    assert graphs is not None
    num_missing = 0.0 if graphs.num_captured else float("nan")
    yield Check(f"engine, {family}: decode steps were captured", num_missing, 0)
    error = hugging_face_error(engine, family, answers)
    yield Check(f"engine, {family}: against Hugging Face", error, LOGPROB_TOLERANCE)
    again = engine.run(ROWS, 8, VOCABULARY)
    yield Check(f"engine, {family}: captured against itself", _largest(answers, again), 0)
    for title, values in OTHER_WAYS.items():
        other = ready_engine(device, family, "float32", **values).run(ROWS, 8, VOCABULARY)
        yield Check(f"engine, {family}: captured against {title}", _largest(answers, other), 1e-4)


SAMPLINGS = {
    "greedy": SamplingParams(temperature=0),
    "drawn": SamplingParams(seed=1),
    "drawn with filters": SamplingParams(seed=2, temperature=0.8, top_k=40, top_p=0.9),
}


def ahead_checks(device: torch.device) -> Iterator[Check]:
    """Count tokens that differ when the next step is launched before a step's tokens are read."""
    ahead = ready_engine(device, "llama", "float32")
    in_turn = ready_engine(device, "llama", "float32", steps_ahead=False)
    for title, sampling in SAMPLINGS.items():
        ahead.sampling = in_turn.sampling = sampling
        before = ahead.num_ahead
        pairs = zip(ahead.tokens(ROWS, 64), in_turn.tokens(ROWS, 64), strict=True)
        others = sum(a != b for mine, own in pairs for a, b in zip(mine, own, strict=True))
        is_seen = ahead.num_ahead > before and not in_turn.num_ahead
        yield Check(f"steps ahead, {title}", others if is_seen else float("nan"), 0)


OTHER_WAYS: dict[str, dict[str, bool]] = {
    "eager": {"cuda_graphs": False},
    "blocks that are not fused": {"cuda_graphs": False, "fused_layers": False},
    "the library's products": {"skinny_products": False},
}


def _largest(answers: Sequence[Answer], others: Sequence[Answer]) -> float:
    return _worst(_difference(*pair) for pair in zip(answers, others, strict=True))


def hugging_face_error(engine: GpuEngine, family: str, answers: Sequence[Answer]) -> float:
    """Return the worst log probability of `ROWS`' answers against the unmodified model's."""
    oracle = random_model(family, FAMILIES[family], torch.float32, engine.base.device, "eager")
    return _worst(
        _logprob_error(_adapted(oracle, engine, row), row, answer)
        for row, answer in zip(ROWS, answers, strict=True)
    )


def half_precision_checks(device: torch.device, dtype: torch.dtype) -> Iterator[Check]:
    """Count how often the engine in half precision picks what float32 would pick next."""
    name = str(dtype).removeprefix("torch.")
    engine = ready_engine(device, "llama", name)
    answers = engine.run(ROWS, 16, VOCABULARY)
    oracle = random_model("llama", FAMILIES["llama"], torch.float32, device, "eager")
    agreed = []
    for row, answer in zip(ROWS, answers, strict=True):
        expected = _teacher_forced(_adapted(oracle, engine, row), row, answer)
        agreed += (expected.argmax(-1).cpu() == torch.tensor(answer.token_ids)).tolist()
    share = sum(agreed) / len(agreed)
    yield Check(f"engine, {name}: other tokens than float32's", 1 - share, 1 - MIN_AGREEMENT)


def _worst(errors: Iterable[float]) -> float:
    """Return the largest; NaN if any is."""
    return float(torch.tensor(list(errors)).max())


def _difference(one: Answer, other: Answer) -> float:
    if one.token_ids != other.token_ids:
        return float("nan")
    assert one.logprobs is not None
    assert other.logprobs is not None
    return float((one.logprobs - other.logprobs).abs().max())


def _adapted(oracle: Any, engine: GpuEngine, row: Row) -> Any:
    """Return the model with a row's adapters added to its weights."""
    model = copy.deepcopy(oracle)
    for index, weight in row.adapters:
        rank = (8, 20)[index]
        for module, pair in random_adapter(engine.base, rank, index).pairs.items():
            linear = model.get_submodule(module)
            delta = (pair.lora_b.float() @ pair.lora_a.float()).to(linear.weight.device)
            linear.weight += weight * delta
    return model


def _teacher_forced(model: Any, row: Row, answer: Answer) -> Tensor:
    """Return float32 log probabilities of every answered position [tokens, vocabulary]."""
    token_ids = torch.tensor([[*row.prompt, *answer.token_ids[:-1]]], device=model.device)
    with torch.no_grad():
        logits = model(token_ids, use_cache=False).logits[0, len(row.prompt) - 1 :].float()
    return torch.log_softmax(logits, dim=-1)


def _logprob_error(model: Any, row: Row, answer: Answer) -> float:
    assert answer.logprobs is not None
    return float((answer.logprobs - _teacher_forced(model, row, answer).cpu()).abs().max())
