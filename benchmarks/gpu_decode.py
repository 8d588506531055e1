"""Decode steps and prefill of a whole model, as shares of what the machine can do at most.

The roofline of a step is what it must read once, over the measured bandwidth: the base's matrices,
the rows' KV, and the distinct adapters. `step`: from one step's end to the next one's, host work
included; `on the device`: the captured step replayed by itself.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from statistics import median
from typing import TypeVar

from quickchange_adapters.ops.triton_product import MAX_ROWS, SkinnyWeight
from quickchange_server.engine.cuda_graphs import Replay
from quickchange_server.engine.settings import EngineSettings

from benchmarks.gpu_adapters import MIXED_RANKS, add_named, template
from benchmarks.gpu_ceilings import Ceilings, seconds_of
from benchmarks.gpu_engine import SHAPES, GpuEngine, TimedBase, random_prompt
from benchmarks.gpu_engine import Row as Request
from benchmarks.gpu_session import Row

T = TypeVar("T")
GIB = 1 << 30
HEADER = (
    *("rows", "adapters", "context", "step", "on the device", "tokens/s"),
    *("roofline", "share", "on the device", "of the base's"),
)
FEW_HEADER = ("product", *HEADER)
PREFILL_HEADER = ("prompt", "adapters", "step", "TFLOP/s", "of the matrix peak")
FIRST_MIXED = 1000
NUM_ADAPTERS = 64
NUM_STEPS_BEFORE = 4
"""Steps of all rows before one is replayed by itself."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """How large a run is: a GPU's, or a trial's on a CPU."""

    batches: tuple[int, ...] = (1, 8, 32, 64)
    adapters: tuple[int, ...] = (1, 8, 32)
    prompt_tokens: int = 512
    answer_tokens: int = 40
    long_prompt_tokens: int = 3500
    prefill_tokens: int = 2048
    kv_bytes: int = 8 * GIB
    pool_bytes: int = 15 * GIB

    @classmethod
    def trial(cls) -> "Sizes":
        """Return sizes with which every line runs in seconds."""
        return cls((1, 2), (1, 2), 8, 6, 24, 32, GIB // 8, GIB // 8)


@dataclass(frozen=True, slots=True)
class Scenario:
    """So many rows that use adapters in turn: none, several of rank 16, or of mixed ranks."""

    num_rows: int
    num_adapters: int
    prompt_tokens: int
    is_mixed: bool = False

    @property
    def title(self) -> str:
        """The adapters in words."""
        return f"{self.num_adapters} mixed" if self.is_mixed else str(self.num_adapters or "none")

    def requests(self) -> list[Request]:
        """Return the rows of a run."""
        first = FIRST_MIXED if self.is_mixed else 0
        count = max(self.num_adapters, 1)
        own = [((first + row % count, 1.0),) for row in range(self.num_rows)]
        return [
            Request(random_prompt(self.prompt_tokens, row), own[row] if self.num_adapters else ())
            for row in range(self.num_rows)
        ]


@dataclass(slots=True)
class Timed:
    """An engine over a random base, with adapters in host memory, and its ceilings."""

    engine: GpuEngine
    ceilings: Ceilings
    sizes: Sizes
    base_shares: dict[tuple[int, int], float] = field(default_factory=dict)
    product: str = "the library's products"
    _few: dict[bool, list[float]] = field(default_factory=lambda: {True: [], False: []})

    @classmethod
    def of(
        cls, shape: str, ceilings: Ceilings, sizes: Sizes, dtype: str, *, has_kernels: bool
    ) -> "Timed":
        """Make the base on the device, and the adapters; capture all steps."""
        settings = EngineSettings(
            device=str(ceilings.device),
            dtype=dtype,
            kernels="triton" if has_kernels else "plain",
            kv_cache_bytes=sizes.kv_bytes,
            adapter_device_bytes=sizes.pool_bytes,
            adapter_host_bytes=1 << 50,  # names share their numbers
            max_step_tokens=sizes.prefill_tokens,
            max_batch_rows=max(sizes.batches),
            merged_bytes=0,
            skinny_products=has_kernels,
        )
        engine = GpuEngine("llama", SHAPES[shape], settings, TimedBase)
        parts = engine.base.dtype, ceilings.device
        layout = engine.base.layout
        add_named(engine, [template(layout, 16, *parts)], 0, NUM_ADAPTERS)
        mixed = [template(layout, rank, *parts) for rank in MIXED_RANKS]
        add_named(engine, mixed, FIRST_MIXED, NUM_ADAPTERS)
        engine.runner.warm_up()
        return cls(engine, ceilings, sizes)

    def few_rows(self) -> Iterator[Callable[[], Row]]:
        """Time the base's steps of few rows with either product, and keep what is faster."""
        numbers = [n for n in self.sizes.batches if n <= MAX_ROWS]
        for num_rows, is_on in itertools.product(numbers, (False, True)):
            yield partial(self._few_rows, num_rows, is_on)
        is_whole = len(self._few[True]) == len(numbers)  # none of them failed
        self._set_skinny(is_whole and sum(self._few[True]) < sum(self._few[False]))

    def _few_rows(self, num_rows: int, is_on: bool) -> Row:
        self._set_skinny(is_on)
        row = self._decode(Scenario(num_rows, 0, self.sizes.prompt_tokens))
        self._few[is_on].append(row.values["step_s"])
        title = "Triton's product" if is_on else "the library's product"
        return Row((title, *row.cells), {"product": title, **row.values})

    def _set_skinny(self, is_on: bool) -> None:
        """Choose the product of few rows for steps that are captured from now on."""
        base, graphs = self.engine.base, self.engine.runner.graphs
        weights = [group.weight for group in base.groups.values()]
        weights += [] if base.head is None else [base.head.resident]
        for weight in weights:
            if isinstance(weight, SkinnyWeight):
                weight.max_rows = MAX_ROWS if is_on else 0
        if graphs is not None:
            graphs.forget()
        self.product = "Triton's product for few rows" if is_on else "the library's products"

    def decode(self, scenarios: Sequence[Scenario]) -> Iterator[Callable[[], Row]]:
        """Time decode steps; a base's own scenario comes before those that are compared with it."""
        for scenario in scenarios:
            yield partial(self._decode, scenario)

    def prefill(self) -> Iterator[Row]:
        """Time steps of one long prompt, for the base and for an adapter."""
        num_tokens = self.sizes.prefill_tokens
        for adapters in ((), ((0, 1.0),)):
            seconds = []
            for seed in range(5):
                self.engine.run([Request(random_prompt(num_tokens, seed), adapters)], 1, None)
                seconds.append(sum(step.seconds for step in self.engine.recorder.steps))
            rate = self._prefill_operations(num_tokens) / median(seconds[1:])
            share = rate / self.ceilings.matrix
            yield Row(
                (
                    str(num_tokens),
                    "1 of rank 16" if adapters else "none",
                    f"{1e3 * median(seconds[1:]):.1f} ms",
                    f"{rate / 1e12:.0f}",
                    f"{share:.0%}",
                ),
                {"adapters": len(adapters), "seconds": seconds, "per_s": rate, "share": share},
            )

    def _decode(self, scenario: Scenario) -> Row:
        self.engine.run(scenario.requests(), 4, None)  # compiles and captures what is new
        num_before = self.engine.num_ahead
        device_s = self.amid_run(scenario, partial(self._replay_s, scenario))
        step_s = median(self.engine.recorder.decode_periods_s(scenario.num_rows))
        num_bytes = self._read_bytes(scenario)
        roofline_s = sum(num_bytes.values()) / self.ceilings.memory
        share, device_share = roofline_s / step_s, roofline_s / device_s
        key = scenario.num_rows, scenario.prompt_tokens
        if not scenario.num_adapters:
            self.base_shares[key] = share
        relative = share / self.base_shares.get(key, float("nan"))
        cells = (
            str(scenario.num_rows),
            scenario.title,
            str(scenario.prompt_tokens),
            *(f"{1e3 * seconds:.2f} ms" for seconds in (step_s, device_s)),
            f"{scenario.num_rows / step_s:.0f}",
            f"{1e3 * roofline_s:.2f} ms",
            *(f"{each:.0%}" for each in (share, device_share)),
            f"{relative:.2f}",
        )
        values = {
            "rows": scenario.num_rows,
            "adapters": scenario.title,
            "context": scenario.prompt_tokens,
            "step_s": step_s,
            "device_s": device_s,
            "bytes": num_bytes,
            "roofline_s": roofline_s,
            "share": share,
            "device_share": device_share,
            "relative_to_base": relative,
            "steps_ahead": self.engine.num_ahead - num_before,
        }
        return Row(cells, values)

    def captured(self, scenario: Scenario) -> Replay | None:
        """Return the captured step of a scenario, if there is one."""
        graphs, has_adapters = self.engine.runner.graphs, bool(scenario.num_adapters)
        if graphs is None:
            return None
        return graphs.captured(scenario.num_rows, has_adapters=has_adapters)

    def amid_run(self, scenario: Scenario, measure: Callable[[], T]) -> T:
        """Answer a scenario's requests; return what is measured once while all rows decode.

        A captured step that is replayed then computes once more what it computed.
        """
        steps, found = self.engine.recorder.steps, list[T]()

        def measure_once() -> None:
            is_full = [s.kind == "decode" and s.num_rows == scenario.num_rows for s in steps]
            if not found and sum(is_full) >= NUM_STEPS_BEFORE:
                found.append(measure())

        self.engine.run(scenario.requests(), self.sizes.answer_tokens, None, on_step=measure_once)
        if not found:
            raise RuntimeError("the rows never decoded all at once")
        return found[0]

    def _replay_s(self, scenario: Scenario) -> float:
        replay = self.captured(scenario)
        return seconds_of(replay, self.ceilings.device) if replay else float("nan")

    def _read_bytes(self, scenario: Scenario) -> dict[str, int]:
        base, runner = self.engine.base, self.engine.runner
        weights = sum(group.weight.num_bytes for group in base.groups.values())
        head = base.head.resident.num_bytes if base.head is not None else 0
        per_token = sum(s.num_heads * (s.key_dim + s.value_dim) for s in runner.kv_shapes)
        context = scenario.prompt_tokens + self.sizes.answer_tokens // 2
        digests = {f"adapter-{n}" for request in scenario.requests() for n, _ in request.adapters}
        slots = [self.engine.pool.get(digest) for digest in digests]
        return {
            "base": weights + head,
            "kv": scenario.num_rows * context * per_token * base.dtype.itemsize,
            "adapters": sum(slot.num_bytes for slot in slots if slot is not None),
        }

    def _prefill_operations(self, num_tokens: int) -> float:
        """Multiply and add, two for each weight and token; the head for one token alone."""
        base, runner = self.engine.base, self.engine.runner
        shapes = [group.shape for group in base.groups.values()]
        weights = sum(shape.in_features * shape.out_features for shape in shapes)
        heads = [s.num_heads * s.num_groups * (s.key_dim + s.value_dim) for s in runner.kv_shapes]
        return 2.0 * weights * num_tokens + sum(heads) * float(num_tokens) ** 2


def scenarios_of(sizes: Sizes) -> list[Scenario]:
    """Return every number of rows with no adapter, with those it can use, and with mixed ranks."""
    found = []
    for num_rows in sizes.batches:
        counts = [0, *(count for count in sizes.adapters if count <= num_rows)]
        found += [Scenario(num_rows, count, sizes.prompt_tokens) for count in counts]
        mixed = min(NUM_ADAPTERS, num_rows)
        found.append(Scenario(num_rows, mixed, sizes.prompt_tokens, is_mixed=True))
    return found


def long_scenarios_of(sizes: Sizes) -> list[Scenario]:
    """Return few rows with long contexts, where KV is cut into pieces."""
    pairs = itertools.product(sizes.batches[:2], (0, 1))
    return [Scenario(rows, count, sizes.long_prompt_tokens) for rows, count in pairs]
