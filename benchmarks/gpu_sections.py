"""What a run on a GPU measures, in which order, and how long each part takes at most."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial

import torch

from benchmarks.gpu_ceilings import HEADER as CEILINGS_HEADER
from benchmarks.gpu_ceilings import Ceilings
from benchmarks.gpu_checks import run_checks
from benchmarks.gpu_decode import (
    FEW_HEADER,
    PREFILL_HEADER,
    Sizes,
    Timed,
    long_scenarios_of,
    scenarios_of,
)
from benchmarks.gpu_decode import HEADER as DECODE_HEADER
from benchmarks.gpu_loads import GAP_HEADER, LOAD_HEADER, MANY_HEADER, Counts, Loads
from benchmarks.gpu_peers import HEADER as PEERS_HEADER
from benchmarks.gpu_peers import Peers, Work, ours
from benchmarks.gpu_profile import DRIVER_HEADER, HOST_HEADER, Profile, profiled_scenarios
from benchmarks.gpu_profile import KERNELS_HEADER as STEP_KERNELS_HEADER
from benchmarks.gpu_session import Row, Section, Session
from benchmarks.gpu_timings import attention_timings, delta_timings

KINDS = ("checks", "ceilings", "decode", "profile", "loads", "peers", "many", "kernels")
MAX_PEFT_ADAPTERS = 8
CHECKS_HEADER = ("comparison", "error", "limit", "verdict")
KERNELS_HEADER = ("kernel", "median", "")
PRODUCTS_HEADER = ("matrix", "rows", "the library's, of the memory's bandwidth", "Triton's")


class WrongResult(RuntimeError):
    """Comparisons were bad; the message counts them."""


class Plan:
    """One run over one device and base; what several sections need is made once."""

    def __init__(
        self, device: torch.device, shape: str, session: Session, checks: Sequence[str] = ("",)
    ) -> None:
        self._wanted_checks = checks
        self._device = device
        self._shape = shape
        self._session = session
        is_trial = device.type != "cuda"
        self._sizes = Sizes.trial() if is_trial else Sizes()
        self._counts = Counts.trial() if is_trial else Counts()
        is_interpreted = os.environ.get("TRITON_INTERPRET") == "1"
        self._has_kernels = is_interpreted or not is_trial
        self._dtype = torch.float32 if is_trial else torch.bfloat16
        self._ceilings = Ceilings(device)
        self._timed: Timed | None = None

    def run(self, kinds: Iterable[str]) -> None:
        """Run all sections of these kinds, in the order of `KINDS`."""
        wanted = set(kinds)
        sections: dict[str, Callable[[], None]] = {
            "checks": self._checks,
            "ceilings": self._measure_ceilings,
            "decode": self._decode,
            "profile": self._profile,
            "loads": self._loads,
            "peers": self._peers,
            "many": self._many,
            "kernels": self._kernels,
        }
        for kind in KINDS:
            if kind in wanted:
                try:
                    sections[kind]()
                except Exception as error:
                    self._session.fail(kind, error)

    def _section(
        self,
        name: str,
        header: tuple[str, ...],
        needs_s: float,
        rows: Callable[[], Iterable[Row | Callable[[], Row]]],
    ) -> list[Row]:
        return self._session.run(Section(name, header, needs_s, rows))

    def _checks(self) -> None:
        if self._has_kernels:
            self._section("Comparisons", CHECKS_HEADER, 60, self._checked)

    def _checked(self) -> Iterator[Row]:
        half = torch.bfloat16 if self._device.type == "cuda" else torch.float16
        num_bad = 0
        for check in run_checks(self._device, half, self._wanted_checks):
            verdict = "good" if check.is_good else "BAD"
            num_bad += not check.is_good
            yield Row(
                (check.name, f"{check.error:.2e}", f"{check.limit:.0e}", verdict),
                {"check": check.name, "error": check.error, "limit": check.limit, "is": verdict},
            )
        if num_bad:
            raise WrongResult(f"{num_bad} comparisons are bad: timings below may be of wrong sums")

    def _measure_ceilings(self) -> None:
        self._section("Ceilings", CEILINGS_HEADER, 10, self._ceilings.measure)

    def _engine(self) -> Timed:
        if not self._ceilings.bus:
            self._measure_ceilings()
        if self._timed is None:
            name = str(self._dtype).removeprefix("torch.")
            parts = self._ceilings, self._sizes, name
            self._timed = Timed.of(self._shape, *parts, has_kernels=self._has_kernels)
            print(f"base and adapters are there: {self._session.left_s:.0f} s left", flush=True)
        return self._timed

    def _decode(self) -> None:
        timed = self._engine()
        short, long = scenarios_of(self._sizes), long_scenarios_of(self._sizes)
        if self._has_kernels:
            self._section("Products of few rows", FEW_HEADER, 15, timed.few_rows)
            print(f"from here on: {timed.product}", flush=True)
            self._session.note("product", timed.product)
        self._section("Decode steps", DECODE_HEADER, 60, lambda: timed.decode(short))
        self._section("Prefill", PREFILL_HEADER, 10, timed.prefill)
        self._section("Long contexts", DECODE_HEADER, 15, lambda: timed.decode(long))

    def _profile(self) -> None:
        timed = self._engine()
        found = Profile(timed)
        sizes = self._sizes
        scenarios = profiled_scenarios(sizes.batches, sizes.prompt_tokens)
        if self._has_kernels:
            parts = STEP_KERNELS_HEADER, 15.0
            self._section("Kernels of a step", *parts, lambda: found.kernels(scenarios))
        ends = [scenarios[0], scenarios[-1]]
        self._section("The host's time", HOST_HEADER, 10, lambda: found.host(ends))
        self._section("The driver's calls", DRIVER_HEADER, 10, lambda: found.driver(ends))

    def _loads(self) -> None:
        loads = Loads(self._engine(), self._counts)
        self._section("Host to pool", LOAD_HEADER, 15, loads.to_the_pool)
        self._section("Gaps", GAP_HEADER, 20, loads.gaps)

    def _many(self) -> None:
        loads = Loads(self._engine(), self._counts)
        self._section("Thousands of adapters", MANY_HEADER, 30, loads.many)

    def _peers(self) -> None:
        timed = self._engine()
        prompt, answer = self._sizes.prompt_tokens, self._sizes.answer_tokens
        few, many = self._sizes.batches[1], self._sizes.batches[-2]
        base = [Work(rows, 0, prompt, answer) for rows in (1, few, many)]
        adapted = [
            Work(rows, min(rows, MAX_PEFT_ADAPTERS), prompt, answer) for rows in (1, few, many)
        ]
        self._section("Quickchange", PEERS_HEADER, 10, lambda: ours(timed, [*base, *adapted]))
        peers = Peers(self._shape, self._dtype, self._device)
        for name, needs_s, measure, works in (
            ("transformers, static batches", 15, peers.static, base),
            ("transformers, continuous batching", 30, peers.continuous, base),
            ("PEFT", 30, peers.peft, adapted),
        ):
            self._section(name, PEERS_HEADER, needs_s, partial(measure, works))

    def _kernels(self) -> None:
        if not self._has_kernels:
            return
        if not self._ceilings.bus:
            self._measure_ceilings()
        scale = 1 if self._device.type == "cuda" else 16
        parts = self._device, self._dtype, scale
        self._section("Products", PRODUCTS_HEADER, 10, self._products)
        self._section("Deltas", KERNELS_HEADER, 20, lambda: map(_row, delta_timings(*parts)))
        self._section("Attention", KERNELS_HEADER, 15, lambda: map(_row, attention_timings(*parts)))

    def _products(self) -> Iterator[Callable[[], Row]]:
        base = self._engine().engine.base
        shapes = {
            kind: (shape.out_features, shape.in_features)
            for kind, shape in base.layout.groups.items()
        }
        return self._ceilings.products(shapes, [1, 2, *self._sizes.batches[1:]])


def _row(timing: tuple[str, str, str]) -> Row:
    what, value, note = timing
    return Row(timing, {"kernel": what, "median": value, "note": note})
