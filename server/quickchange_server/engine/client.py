"""asyncio's side of the engine: submits, waits, cancels. Implements `GenerationEngine`.

One `call_soon_threadsafe` a step brings the tokens of all requests over to the event loop.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
from quickchange_adapters.errors import NotFinite
from quickchange_adapters.host_adapter import HostAdapter, pack_adapter, pin_adapter
from quickchange_adapters.merge import MergedCopy, merge_adapter, merged_bytes_of
from quickchange_adapters.packed_size import PackedSize, packed_size
from quickchange_adapters.pool import AdapterPool
from quickchange_adapters.weights import AdapterWeights

from quickchange_server.engine.base_model import check_config, end_token_ids, load_base
from quickchange_server.engine.copy_demand import Demand
from quickchange_server.engine.device_memory import held_bytes
from quickchange_server.engine.engine import Engine
from quickchange_server.engine.interface import EngineSnapshot, MergeResult, ResidentAdapter
from quickchange_server.engine.model_runner import ModelRunner
from quickchange_server.engine.observer import EngineObserver, NoObserver
from quickchange_server.engine.output_line import OutputLine
from quickchange_server.engine.request import GenerationRequest, RequestFailure, TokenOutput
from quickchange_server.engine.room_checks import check_fits, check_together
from quickchange_server.engine.rope import freeze_rope
from quickchange_server.engine.self_check import check_architecture
from quickchange_server.engine.settings import EngineSettings
from quickchange_server.engine.step_budget import is_out_of_memory
from quickchange_server.engine.torch_threads import claim_threads, use_one_thread
from quickchange_server.errors import (
    Conflict,
    InvalidRequest,
    NotFound,
    QueueFull,
    QuickchangeError,
    Unavailable,
)

if TYPE_CHECKING:
    from quickchange_adapters.structure import Structure

T = TypeVar("T")


class EngineClient:
    """The engine behind its protocol. The constructor loads the base and blocks meanwhile."""

    def __init__(
        self,
        model_folder: Path,
        settings: EngineSettings,
        observer: EngineObserver | None = None,
    ) -> None:
        settings = replace(settings, num_threads=settings.num_threads or claim_threads())
        check_config(model_folder)
        check_architecture(model_folder)
        base = load_base(model_folder, settings)
        pool = AdapterPool(base.layout, settings.adapter_device_bytes, base.dtype, base.device)
        runner = ModelRunner(base, pool, settings.kv_cache_bytes, settings.kv_block_size, settings)
        self.base = base.spec
        self.dtype = base.dtype
        self.eos_token_ids = end_token_ids(base.model)
        self.max_model_len = _context_limit(runner, settings)
        freeze_rope(base.model, self.max_model_len)
        runner.start_native(self.max_model_len)
        if base.device.type == "cuda":
            runner.warm_up()
        self.native_refusal, self.amx_refusal = base.native_refusal, base.amx_refusal
        self.max_requests = settings.max_queue + settings.max_batch_rows
        self._settings = settings
        self._base_model = base
        self._engine = Engine(
            runner,
            settings,
            self.eos_token_ids,
            observer or NoObserver(),
            self._publish,
            self._on_engine_exit,
        )
        self._loader = ThreadPoolExecutor(1, "quickchange-loader", use_one_thread)
        self._merger = ThreadPoolExecutor(1, "quickchange-merger", use_one_thread)
        self._queues: dict[str, asyncio.Queue[TokenOutput]] = {}
        self._outputs = OutputLine(self._deliver)
        self._loop: asyncio.AbstractEventLoop | None = None

    async def start(self) -> None:
        """Start the engine thread."""
        self._loop = asyncio.get_running_loop()
        self._engine.start()

    async def stop(self) -> None:
        """Abort what runs and join the threads."""
        await asyncio.to_thread(self._engine.stop)
        for threads in (self._loader, self._merger):
            threads.shutdown(wait=False, cancel_futures=True)

    def check_admission(self, num_requests: int = 1) -> None:
        """Say now whether so many more requests may wait. Raises: QueueFull, Unavailable."""
        if not self._engine.snapshot.is_alive:
            raise Unavailable("the engine is not running")
        limit = self.max_requests
        if len(self._queues) + num_requests > limit:
            raise QueueFull(
                f"{len(self._queues)} requests are running or waiting; the limit is {limit} "
                "(--max-queue and --max-batch-rows): try again soon"
            )

    async def generate(self, request: GenerationRequest) -> AsyncIterator[TokenOutput]:
        """Submit, and yield outputs until one has a finish_reason; leaving early aborts."""
        self.check_admission()
        self._check_request(request)
        outputs: asyncio.Queue[TokenOutput] = asyncio.Queue()
        self._queues[request.request_id] = outputs
        is_done = False
        try:
            refusal = self._engine.submit(request)
            if refusal is not None:
                is_done = True
                raise _as_error(refusal)
            while not is_done:
                output = await outputs.get()
                is_done = output.finish_reason is not None
                yield output
        finally:
            if not is_done:
                self._engine.abort(request.request_id)
            self._queues.pop(request.request_id, None)

    def is_loaded(self, digest: str) -> bool:
        """Whether a request for this digest can be submitted now."""
        return self._engine.residency.host_copy(digest) is not None

    def packed_size(self, structure: "Structure") -> PackedSize:
        """Return what a version will take, by its files' headers."""
        return packed_size(structure, self._base_model.layout, self.dtype.itemsize)

    def size_of(self, digest: str) -> PackedSize | None:
        """Return what a loaded version takes."""
        adapter = self._engine.residency.host_copy(digest)
        return None if adapter is None else adapter.size

    async def book_room(self, owner: str, sizes: Mapping[str, PackedSize]) -> None:
        """Keep room for versions, all of them or none. Raises: InvalidRequest, Unavailable."""
        for size in sizes.values():
            check_fits(size, self._engine.runner.pool)
        self._check_together(sizes.values())
        num_bytes = {digest: size.num_bytes for digest, size in sizes.items()}
        residency = self._engine.residency
        if residency.book_free_room(owner, num_bytes):
            return
        try:
            coming = await self._on_engine(lambda: residency.book_room(owner, num_bytes))
            await asyncio.wrap_future(coming)
        except MemoryError as error:
            raise Unavailable(str(error), code="adapter_memory") from error

    def end_booking(self, owner: str) -> None:
        """Give booked room back."""
        self._engine.call(lambda: self._engine.residency.end_booking(owner))

    async def load_adapter(self, weights: AdapterWeights) -> None:
        """Pack a version on the loader thread and keep it in host memory, as soon as there is room.

        Raises: InvalidRequest; Unavailable when pinned and merged ones leave no room for it.
        """
        if self.is_loaded(weights.digest):
            return
        adapter = await self._in_loader(lambda: self._pack(weights))
        check_fits(adapter.size, self._engine.runner.pool)
        try:
            coming = await self._on_engine(lambda: self._engine.residency.add_host(adapter))
            await asyncio.wrap_future(coming)
        except MemoryError as error:
            raise Unavailable(str(error), code="adapter_memory") from error

    async def load_guest(self, weights: AdapterWeights) -> bool:
        """Pack a version on the loader thread and keep it where there is room that nobody has."""
        adapter = await self._in_loader(lambda: self._pack(weights))
        engine = self._engine
        try:
            coming = await self._on_engine(
                lambda: engine.residency.add_guest(adapter) if engine.is_idle else None
            )
        except MemoryError:
            return False
        return coming is not None and await asyncio.wrap_future(coming)

    async def unload_adapter(self, digest: str, timeout_s: float = 30.0) -> ResidentAdapter | None:
        """Drain and free a version. Raises: TimeoutError; it then goes when its requests end."""
        done = asyncio.wrap_future(self._engine.unload(digest))
        return await asyncio.wait_for(asyncio.shield(done), timeout_s)

    async def pin(self, digest: str) -> None:
        """Keep a version. Raises: PinBudgetExceeded, NotFound."""

        def pin() -> None:
            self._loaded(digest)
            self._engine.residency.pin(digest)

        await self._on_engine(pin)

    async def unpin(self, digest: str) -> None:
        """Let a version go like any other."""
        await self._on_engine(lambda: self._engine.residency.unpin(digest))

    async def activate(self, digest: str) -> bool:
        """Bring a version to the device while steps run. Raises: NotFound, Unavailable."""

        def activate() -> Future[bool]:
            self._loaded(digest)
            return self._engine.residency.activate(digest)

        coming = await self._on_engine(activate)
        try:
            return await asyncio.wrap_future(coming)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            message = f"the device has no memory for adapter {digest[:12]} now: try again"
            raise Unavailable(message, code="adapter_memory") from error

    async def merge(self, digest: str) -> MergeResult:
        """Compute a merged copy on a thread of its own, where it holds up no load.

        Raises: MergeBudgetExceeded.
        """
        started = time.monotonic()
        residency = self._engine.residency
        copy = residency.merged.get(digest)
        if copy is None:
            adapter = self._loaded(digest)
            needed = merged_bytes_of(adapter, self._base_model.layout, self.dtype.itemsize)
            await self._on_engine(lambda: residency.reserve_merge(digest, needed))
            try:
                made = await self._in_merger(lambda: self._merge(adapter))
                copy = await self._on_engine(lambda: self._add_merged(made))
            except NotFinite as error:
                raise Conflict(str(error), code="not_finite") from error
            finally:
                self._engine.call(lambda: residency.end_merge(digest))
        return MergeResult(digest, copy.num_bytes, time.monotonic() - started)

    async def unmerge(self, digest: str) -> MergeResult:
        """Drop the merged copy."""
        started = time.monotonic()
        freed = await self._on_engine(lambda: self._engine.residency.drop_merged(digest))
        return MergeResult(digest, freed, time.monotonic() - started)

    async def base_checksum(self) -> str:
        """Compute sha256 over the resident base weights, between two steps."""
        return await self._on_engine(self._base_model.checksum)

    def take_demand(self) -> Demand:
        """Return what merged copies would have brought since the last call; from any thread."""
        demand = self._engine.demand
        return Demand() if demand is None else demand.take()

    def process_bytes(self) -> dict[str, int]:
        """Return what of this process's memory is held, by part."""
        runner, parts = self._engine.runner, self.snapshot().memory_bytes
        if self._base_model.device.type != "cpu":
            return {"adapter_host": parts["adapter_host"]}
        return {
            "base": parts["base"],
            "merged": parts["merged"],
            "adapter_host": parts["adapter_host"],
            "adapter_pool": runner.pool.resident_bytes(),
            "kv": runner.storage.resident_bytes(),
        }

    def device_bytes(self) -> dict[str, int]:
        """Return what PyTorch holds of a GPU's memory; nothing on a CPU."""
        return held_bytes(self._base_model.device)

    def snapshot(self) -> EngineSnapshot:
        """Return the state after the last step."""
        return self._engine.snapshot

    def _pack(self, weights: AdapterWeights) -> HostAdapter:
        base = self._base_model
        adapter = pack_adapter(weights, base.layout, self.dtype, base.bias_of)
        return pin_adapter(adapter) if base.device.type == "cuda" else adapter

    def _merge(self, adapter: HostAdapter) -> MergedCopy:
        with torch.inference_mode():
            return merge_adapter(adapter, self._base_model.layout, self._base_model)

    def _add_merged(self, copy: MergedCopy) -> MergedCopy:
        self._loaded(copy.digest)
        return self._engine.residency.add_merged(copy)

    def _loaded(self, digest: str) -> HostAdapter:
        adapter = self._engine.residency.host_copy(digest)
        if adapter is None:
            raise NotFound(f"adapter {digest[:12]} is not loaded", code="model_not_found")
        return adapter

    def _check_request(self, request: GenerationRequest) -> None:
        highest = self._base_model.vocab_size - 1
        biased = (token for token, _ in request.sampling.logit_bias)
        wanted = (*request.prompt_ids, *biased, *request.stop_token_ids)
        if wanted and not (min(wanted) >= 0 and max(wanted) <= highest):
            raise InvalidRequest(f"token ids must be from 0 to {highest}", code="invalid_token_id")
        self._check_mix(request)
        total = len(request.prompt_ids) + request.max_tokens
        if not request.prompt_ids or total > self.max_model_len:
            raise InvalidRequest(
                f"{len(request.prompt_ids)} prompt tokens and max_tokens {request.max_tokens} "
                f"must be at least 1 and at most {self.max_model_len} together",
                code="context_length_exceeded",
            )

    def _check_mix(self, request: GenerationRequest) -> None:
        digests = {adapter.digest for adapter in request.adapters}
        held = [self._engine.residency.host_copy(digest) for digest in digests]
        self._check_together([adapter.size for adapter in held if adapter is not None])

    def _check_together(self, sizes: Collection[PackedSize]) -> None:
        pool = self._engine.runner.pool
        check_together(sizes, pool, self._settings.adapter_host_bytes)

    async def _on_engine(self, function: Callable[[], T]) -> T:
        return await asyncio.wrap_future(self._engine.call(function))

    async def _in_loader(self, function: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._loader, function)

    async def _in_merger(self, function: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._merger, function)

    def _publish(self, outputs: list[TokenOutput]) -> None:
        """Engine thread: hand a step's outputs to the event loop in one call."""
        if outputs and self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._outputs.put, outputs)

    def _on_engine_exit(self) -> None:
        """Engine thread, last act: no request may go on waiting for it."""
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._end_all)

    def _end_all(self) -> None:
        self._outputs.put([TokenOutput(request_id, (), "abort") for request_id in self._queues])

    def _deliver(self, output: TokenOutput) -> None:
        waiting = self._queues.get(output.request_id)
        if waiting is not None:
            waiting.put_nowait(output)


def _context_limit(runner: ModelRunner, settings: EngineSettings) -> int:
    """The model's limit, the operator's, or what the KV blocks hold: whichever is least."""
    capacity = (runner.storage.num_blocks - 1) * runner.storage.block_size
    limit = min(runner.base.max_model_len, settings.max_model_len or capacity, capacity)
    if limit < 2:
        raise InvalidRequest(
            f"--kv-cache-bytes {settings.kv_cache_bytes} holds {capacity} tokens: raise it"
        )
    return limit


def _as_error(refusal: RequestFailure) -> QuickchangeError:
    if refusal.code == "adapter_quarantined":
        return Conflict(refusal.message, code=refusal.code)
    return Unavailable(refusal.message, code=refusal.code, retry_after_s=1)
