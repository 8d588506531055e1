"""Draws the engine's state after a step, for those who may not wait. Runs on the engine thread."""

import time
from dataclasses import dataclass

from quickchange_server.engine.interface import EngineSnapshot
from quickchange_server.engine.model_runner import ModelRunner
from quickchange_server.engine.residency import AdapterResidency
from quickchange_server.engine.scheduler import Scheduler


@dataclass(frozen=True, slots=True)
class StepClock:
    """How many steps there were, when the last one was, and whether there will be more."""

    num_steps: int
    last_step_s: float
    is_alive: bool


class SnapshotMaker:
    """Knows whose state is drawn."""

    def __init__(
        self, scheduler: Scheduler, runner: ModelRunner, residency: AdapterResidency
    ) -> None:
        self._scheduler = scheduler
        self._runner = runner
        self._residency = residency
        self._base_bytes = runner.base.num_bytes

    def make(self, clock: StepClock) -> EngineSnapshot:
        """Return the state as it is now."""
        scheduler, pool = self._scheduler, self._runner.pool
        return EngineSnapshot(
            num_running=len(scheduler.running),
            num_waiting=len(scheduler.waiting),
            kv_blocks_total=scheduler.blocks.num_blocks,
            kv_blocks_used=scheduler.blocks.num_used,
            kv_block_size=scheduler.blocks.block_size,
            num_steps=clock.num_steps,
            last_step_monotonic_s=clock.last_step_s,
            heartbeat_monotonic_s=time.monotonic(),
            is_alive=clock.is_alive,
            memory_bytes=self._memory_bytes(),
            adapters=self._residency.describe_all(),
            quarantined=frozenset(self._residency.quarantined),
            num_evictions={
                "device": pool.num_evictions,
                "host": self._residency.num_host_evictions,
            },
            adapter_row_bytes=pool.row_bytes,
        )

    def _memory_bytes(self) -> dict[str, int]:
        pool, storage = self._runner.pool, self._runner.storage
        block_bytes = storage.num_bytes // max(storage.num_blocks, 1)
        return {
            "base": self._base_bytes,
            "merged": self._residency.merged_bytes,
            "adapter_pool_used": pool.used_bytes,
            "adapter_pool_total": pool.total_bytes,
            "adapter_host": self._residency.host_bytes,
            "kv_used": self._scheduler.blocks.num_used * block_bytes,
            "kv_total": storage.num_bytes,
        }
