"""The engine as the rest of the server sees it: one protocol, asyncio's side.

The HTTP edge and the adapter service know only this; tests may drive them with a scripted engine.
"""

from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from quickchange_adapters.base_spec import BaseSpec
from quickchange_adapters.packed_size import PackedSize
from quickchange_adapters.weights import AdapterWeights

from quickchange_server.engine.request import GenerationRequest, TokenOutput

if TYPE_CHECKING:
    from quickchange_adapters.structure import Structure


@dataclass(frozen=True, slots=True)
class ResidentAdapter:
    """Where one adapter's bytes are in the engine."""

    digest: str
    host_bytes: int
    device_bytes: int
    merged_bytes: int
    num_running: int
    is_pinned: bool = False


@dataclass(frozen=True, slots=True)
class EngineSnapshot:
    """The engine's state after its last step. Immutable; reading it never waits.

    `quarantined` are digests that produced non-finite values twice; their requests are refused.
    The heartbeat is at most about a second old while the engine thread lives, idle or not.
    `memory_bytes` has parts: base, merged, adapter_pool_used, adapter_pool_total, adapter_host,
    kv_used, kv_total. `num_evictions`: by tier, versions that made room for others since the start.
    `adapter_row_bytes`: one rank of an adapter on every linear, in the pool.
    """

    num_running: int = 0
    num_waiting: int = 0
    kv_blocks_total: int = 0
    kv_blocks_used: int = 0
    kv_block_size: int = 0
    num_steps: int = 0
    last_step_monotonic_s: float = 0.0
    heartbeat_monotonic_s: float = 0.0
    is_alive: bool = False
    memory_bytes: dict[str, int] = field(default_factory=dict)
    adapters: dict[str, ResidentAdapter] = field(default_factory=dict)
    quarantined: frozenset[str] = frozenset()
    num_evictions: dict[str, int] = field(default_factory=dict)
    adapter_row_bytes: int = 0


@dataclass(frozen=True, slots=True)
class MergeResult:
    """What a merge made, or an unmerge gave back."""

    digest: str
    merged_bytes: int
    seconds: float


class GenerationEngine(Protocol):
    """Generate tokens; hold, merge and drop adapters. All methods run on the event loop."""

    base: BaseSpec
    max_model_len: int
    max_requests: int  # that run and wait together; more in one call are never admitted
    eos_token_ids: frozenset[int]

    async def start(self) -> None:
        """Start the engine thread; returns when the first step can run."""

    async def stop(self) -> None:
        """Abort what runs, join the thread and give memory back."""

    def check_admission(self, num_requests: int = 1) -> None:
        """Say now whether so many more requests may wait.

        Raises: QueueFull, Unavailable.
        """

    def generate(self, request: GenerationRequest) -> AsyncIterator[TokenOutput]:
        """Submit, and yield outputs until one has a finish_reason.

        Closing the iterator early (or cancelling the task in it) aborts the request within one
        step. Every adapter of the request must have been loaded with `load_adapter`.

        Raises: QueueFull, Unavailable, at the first `__anext__`.
        """

    def packed_size(self, structure: "Structure") -> PackedSize:
        """Return what a version whose files fit the base will take."""

    def size_of(self, digest: str) -> PackedSize | None:
        """Return what a loaded version takes; None: it is not loaded."""

    async def book_room(self, owner: str, sizes: Mapping[str, PackedSize]) -> None:
        """Keep room in host memory for versions (by digest), all of them or none, and wait for it.

        They stay until `end_booking(owner)`, which is to be called whatever happens here. No two
        bookings have the same owner.

        Raises: InvalidRequest (never, not even alone: mix_too_large, rank_too_large), Unavailable
        (pinned and merged ones leave no room).
        """

    def end_booking(self, owner: str) -> None:
        """Give booked room back; a repeat is a no-op."""

    async def load_adapter(self, weights: AdapterWeights) -> None:
        """Put a version into host memory, when those in use leave room; a repeat is a no-op.

        Raises: Unavailable when it could have no room even if nobody used anything.
        """

    async def load_guest(self, weights: AdapterWeights) -> bool:
        """Bring a version to host memory and device, if nothing runs and no other has to go."""

    def is_loaded(self, digest: str) -> bool:
        """Whether a request for this digest can be submitted now."""

    async def unload_adapter(self, digest: str, timeout_s: float = 30.0) -> ResidentAdapter | None:
        """Refuse new requests for it, wait for running ones, free slot, host and merged bytes.

        Returns what was freed, or None when it was not loaded.
        Raises: TimeoutError when requests still run after `timeout_s`; it then unloads when they
        end.
        """

    async def pin(self, digest: str) -> None:
        """Keep a loaded version in host memory, and on the device as long as that is possible.

        Raises: PinBudgetExceeded; NotFound when it is not loaded.
        """

    async def unpin(self, digest: str) -> None:
        """Let it go like any other when room is needed."""

    async def activate(self, digest: str) -> bool:
        """Bring a loaded version to the device; False: running requests hold all the room.

        Raises: NotFound when it is not loaded.
        """

    async def merge(self, digest: str) -> MergeResult:
        """Make a merged copy of a loaded adapter beside the untouched base; a repeat is a no-op.

        Raises: MergeBudgetExceeded.
        """

    async def unmerge(self, digest: str) -> MergeResult:
        """Drop the merged copy; zero bytes when there was none."""

    def process_bytes(self) -> dict[str, int]:
        """Return what of this process's memory the engine holds, by part; from any thread.

        Takes milliseconds. KV blocks and pool rows count once something was written to them.
        """

    def device_bytes(self) -> dict[str, int]:
        """Return what is held of a GPU's memory, and for it on the host, by part.

        `device_allocated`, `device_reserved`, `host_pinned`; from any thread; nothing on a CPU.
        """

    def snapshot(self) -> EngineSnapshot:
        """Return the state after the last step; never waits."""
