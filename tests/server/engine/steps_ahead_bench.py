"""An engine that is stepped by hand, whose decode steps are replayed from plain graphs."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quickchange_adapters.host_adapter import pack_adapter
from quickchange_adapters.pool import AdapterPool
from quickchange_adapters.weights import AdapterWeights
from quickchange_server.engine.base_model import load_base
from quickchange_server.engine.decode_launch import DecodeLaunch
from quickchange_server.engine.engine import Engine
from quickchange_server.engine.model_runner import ModelRunner
from quickchange_server.engine.request import GenerationRequest, SamplingParams, TokenOutput
from quickchange_server.engine.scheduler import ScheduledRow
from quickchange_server.engine.settings import EngineSettings

from tests.server.engine.conftest import MIB, Recorder
from tests.server.engine.plain_graphs import use_plain_graphs
from tests.server.engine.test_engine import greedy, tokens_of


class FaultyRunner(ModelRunner):
    """Raises `error` when a step is launched ahead for the `fails_at`th time."""

    error: Exception | None = None
    fails_at = 3
    num_calls = 0

    def run_after(self, launch: DecodeLaunch, rows: Sequence[ScheduledRow]) -> DecodeLaunch | None:
        self.num_calls += 1
        if self.error is not None and self.num_calls == self.fails_at:
            raise self.error
        return super().run_after(launch, rows)


@dataclass
class Bench:
    """An engine that is stepped by hand, with all that it said."""

    engine: Engine
    runner: FaultyRunner
    outputs: list[TokenOutput] = field(default_factory=list)
    recorder: Recorder = field(default_factory=Recorder)

    @classmethod
    def of(cls, folder: Path, *, is_ahead: bool = True, **changes: Any) -> "Bench":
        values = {"dtype": "float32", "max_step_tokens": 256, "kv_cache_bytes": MIB, **changes}
        settings = EngineSettings(**values)
        base = load_base(folder, settings)
        pool = AdapterPool(base.layout, settings.adapter_device_bytes, base.dtype, base.device)
        runner = FaultyRunner(base, pool, settings.kv_cache_bytes, 16)
        use_plain_graphs(runner, settings.max_batch_rows, is_ahead=is_ahead)
        outputs: list[TokenOutput] = []
        recorder = Recorder()
        engine = Engine(runner, settings, frozenset(), recorder, outputs.extend)
        return cls(engine, runner, outputs, recorder)

    def hold(self, *weights: AdapterWeights) -> None:
        base = self.runner.base
        for each in weights:
            self.engine.residency.add_host(pack_adapter(each, base.layout, base.dtype))

    def add(self, *requests: GenerationRequest) -> None:
        for request in requests:
            assert self.engine.residency.claim(request) is None
            self.engine.add(request)

    def step(self) -> None:
        """Do what the engine's thread does in one round."""
        self.engine._inbox.run_waiting()
        self.engine.step()
        self.engine.scheduler.check_integrity()
        self.runner.pool.check_integrity()
        if not self.engine.scheduler.running:
            time.sleep(0.0005)

    def run_to_end(self) -> None:
        deadline_s = time.monotonic() + 120
        while not self.engine.is_idle:
            assert time.monotonic() < deadline_s, "requests did not end"
            self.step()

    def tokens(self, name: str) -> list[int]:
        return tokens_of(self.outputs, name)

    def ends(self) -> dict[str, str]:
        return {o.request_id: o.finish_reason for o in self.outputs if o.finish_reason}

    @property
    def num_ahead(self) -> int:
        return self.engine.ahead.num_launched


def sampled(name: str, num: int = 12, **params: Any) -> GenerationRequest:
    """Ask for drawn tokens: those of a tiny random base vary."""
    return greedy(name, num=num, sampling=SamplingParams(**{"seed": 5, **params}))
