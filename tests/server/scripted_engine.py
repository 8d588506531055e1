"""A deterministic engine that says what a test tells it to; no model, no thread."""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from time import monotonic

from quickchange_adapters.base_spec import BaseSpec, ModuleSpec
from quickchange_adapters.packed_size import PackedSize
from quickchange_adapters.structure import Structure
from quickchange_adapters.weights import AdapterWeights
from quickchange_server.engine.interface import EngineSnapshot, MergeResult, ResidentAdapter
from quickchange_server.engine.request import (
    GenerationRequest,
    RequestFailure,
    TokenLogprobs,
    TokenOutput,
)
from quickchange_server.errors import QueueFull, Unavailable

Answer = Callable[[GenerationRequest], Sequence[int]]


def scripted_base(name: str = "tiny") -> BaseSpec:
    """Return a small base: one block with one square projection."""
    modules = {"model.layers.0.self_attn.q_proj": ModuleSpec("linear", 64, 64)}
    return BaseSpec(name, "ba5e" * 16, "llama", 1, modules)


def repeat_prompt(request: GenerationRequest) -> Sequence[int]:
    """Answer with the prompt."""
    return request.prompt_ids


def scripted_logprobs(token_id: int, num_top: int) -> TokenLogprobs:
    """Return log probabilities that can be told apart: the token at -0.5, then -1, -2, …"""
    others = tuple((token_id + 1 + place, -1.0 - place) for place in range(num_top - 1))
    return TokenLogprobs(token_id, -0.5, ((token_id, -0.5), *others)[:num_top])


@dataclass
class ScriptedEngine:
    """Yield `answer(request)` one token a step, then the end token.

    Attributes:
        answer: what to say; may be replaced at any time.
        step_s: pause before each token.
        pause_after: tokens after which every request waits for `resume`.
        fail_after: tokens after which every request fails with `failure`.
        max_requests: choices that one API request may have.
        max_queue: requests that may live at once; 0 refuses all.
        max_queue_at_submit: the same, but noticed only when a request is submitted.
        requests: all that were submitted.
        quarantined: digests shown as out of service.
        aborted: ids of requests whose iterator was closed before their end.
        on_device: what it says it holds of a GPU.
    """

    answer: Answer = repeat_prompt
    base: BaseSpec = field(default_factory=scripted_base)
    max_model_len: int = 512
    max_requests: int = 10_000
    eos_token_ids: frozenset[int] = frozenset({2})
    step_s: float = 0.0
    pause_after: int | None = None
    resume: asyncio.Event = field(default_factory=asyncio.Event)
    fail_after: int | None = None
    failure: RequestFailure = RequestFailure("not_finite", "the logits of this row are not finite")
    max_queue: int = 10_000
    max_queue_at_submit: int = 10_000
    num_cached_tokens: int = 0
    is_running: bool = False
    requests: list[GenerationRequest] = field(default_factory=list)
    aborted: list[str] = field(default_factory=list)
    on_device: dict[str, int] = field(default_factory=dict)
    live: set[str] = field(default_factory=set)
    loaded: dict[str, AdapterWeights] = field(default_factory=dict)
    merged: dict[str, int] = field(default_factory=dict)
    booked: dict[str, tuple[str, ...]] = field(default_factory=dict)
    quarantined: set[str] = field(default_factory=set)
    pinned: set[str] = field(default_factory=set)

    async def start(self) -> None:
        """Become alive."""
        self.is_running = True

    async def stop(self) -> None:
        """Stop being alive."""
        self.is_running = False

    def check_admission(self, num_requests: int = 1) -> None:
        """Refuse what would pass `max_queue`."""
        if not self.is_running:
            raise Unavailable("the engine is not running")
        self._check_room(num_requests, self.max_queue)

    def _check_room(self, num_requests: int, limit: int) -> None:
        if len(self.live) + num_requests > limit:
            raise QueueFull(f"{limit} requests wait already; try again later")

    async def generate(self, request: GenerationRequest) -> AsyncIterator[TokenOutput]:
        """Yield the script of one request."""
        self.check_admission()
        self._check_room(1, self.max_queue_at_submit)
        if request.request_id in self.live:
            raise AssertionError(f"request id {request.request_id!r} is in use")
        self.requests.append(request)
        self.live.add(request.request_id)
        is_finished = False
        try:
            for output in self._outputs(request):
                await self._pace(len(request.prompt_ids), output)
                is_finished = output.finish_reason is not None
                yield output
        finally:
            self.live.discard(request.request_id)
            if not is_finished:
                self.aborted.append(request.request_id)

    async def _pace(self, num_prompt: int, output: TokenOutput) -> None:
        await asyncio.sleep(self.step_s)
        place = self._places.get(output.request_id, 0)
        self._places[output.request_id] = place + 1
        if self.pause_after is not None and place == self.pause_after:
            await self.resume.wait()

    _places: dict[str, int] = field(default_factory=dict)

    def _outputs(self, request: GenerationRequest) -> list[TokenOutput]:
        """Return everything this request will yield, in order."""
        ends = request.stop_token_ids | (frozenset() if request.ignore_eos else self.eos_token_ids)
        tokens = [*self.answer(request), *sorted(self.eos_token_ids)[:1]]
        outputs: list[TokenOutput] = []
        for place, token_id in enumerate(tokens):
            if self.fail_after == place:
                return [*outputs, self._failure(request)]
            is_stop = token_id in ends and place >= request.min_tokens
            is_last = place + 1 == request.max_tokens
            outputs.append(self._output(request, place, token_id, is_stop, is_last))
            if is_stop or is_last:
                return outputs
        outputs.append(TokenOutput(request.request_id, (), finish_reason="length"))
        return outputs

    def _failure(self, request: GenerationRequest) -> TokenOutput:
        return TokenOutput(request.request_id, (), finish_reason="error", failure=self.failure)

    def _output(
        self, request: GenerationRequest, place: int, token_id: int, is_stop: bool, is_last: bool
    ) -> TokenOutput:
        num_top = request.sampling.logprobs
        is_first = place == 0
        return TokenOutput(
            request_id=request.request_id,
            token_ids=(token_id,),
            finish_reason="stop" if is_stop else "length" if is_last else None,
            stop_token_id=token_id if is_stop else None,
            logprobs=None if num_top is None else (scripted_logprobs(token_id, num_top),),
            prompt_logprobs=self._prompt_logprobs(request) if is_first else None,
            num_cached_tokens=self.num_cached_tokens,
            queue_s=0.002 if is_first else None,
            ttft_s=0.005 if is_first else None,
        )

    @staticmethod
    def _prompt_logprobs(request: GenerationRequest) -> tuple[TokenLogprobs | None, ...] | None:
        if request.prompt_logprobs is None:
            return None
        num_top = request.prompt_logprobs
        return (None, *(scripted_logprobs(i, num_top) for i in request.prompt_ids[1:]))

    def packed_size(self, structure: Structure) -> PackedSize:
        """Weigh nothing."""
        return PackedSize({}, 0)

    def size_of(self, digest: str) -> PackedSize | None:
        """Weigh nothing."""
        return PackedSize({}, 0) if digest in self.loaded else None

    async def book_room(self, owner: str, sizes: Mapping[str, PackedSize]) -> None:
        """Remember it; there is always room."""
        self.booked[owner] = tuple(sizes)

    def end_booking(self, owner: str) -> None:
        """Forget it."""
        self.booked.pop(owner, None)

    async def load_adapter(self, weights: AdapterWeights) -> None:
        """Keep the weights."""
        self.loaded[weights.digest] = weights

    async def load_guest(self, weights: AdapterWeights) -> bool:
        """Keep the weights; there is always room."""
        self.loaded[weights.digest] = weights
        return True

    def is_loaded(self, digest: str) -> bool:
        """Say whether a digest was loaded."""
        return digest in self.loaded

    async def unload_adapter(self, digest: str, timeout_s: float = 30.0) -> ResidentAdapter | None:
        """Forget the weights; wait for running requests first."""
        async with asyncio.timeout(timeout_s):
            while self._num_running(digest):
                await asyncio.sleep(0.005)
        resident = self.snapshot().adapters.get(digest)
        self.loaded.pop(digest, None)
        self.merged.pop(digest, None)
        self.pinned.discard(digest)
        return resident

    def _num_running(self, digest: str) -> int:
        live = [request for request in self.requests if request.request_id in self.live]
        return sum(any(ref.digest == digest for ref in request.adapters) for request in live)

    async def pin(self, digest: str) -> None:
        """Remember it."""
        assert digest in self.loaded
        self.pinned.add(digest)

    async def unpin(self, digest: str) -> None:
        """Forget it."""
        self.pinned.discard(digest)

    async def activate(self, digest: str) -> bool:
        """Do nothing: what is loaded is on the device."""
        return digest in self.loaded

    async def merge(self, digest: str) -> MergeResult:
        """Count a merged copy of the base's one projection."""
        self.merged[digest] = 64 * 64 * 4
        return MergeResult(digest, self.merged[digest], 0.001)

    async def unmerge(self, digest: str) -> MergeResult:
        """Drop it."""
        return MergeResult(digest, self.merged.pop(digest, 0), 0.001)

    def process_bytes(self) -> dict[str, int]:
        """Hold nothing."""
        return {}

    def device_bytes(self) -> dict[str, int]:
        """Return what was scripted."""
        return self.on_device

    def snapshot(self) -> EngineSnapshot:
        """Return what is live, loaded and merged."""
        adapters = {
            digest: ResidentAdapter(
                digest,
                weights.num_bytes,
                weights.num_bytes,
                self.merged.get(digest, 0),
                self._num_running(digest),
                digest in self.pinned,
            )
            for digest, weights in self.loaded.items()
        }
        return EngineSnapshot(
            num_running=len(self.live),
            kv_blocks_total=100,
            kv_blocks_used=len(self.live),
            kv_block_size=16,
            num_steps=len(self.requests),
            last_step_monotonic_s=monotonic(),
            heartbeat_monotonic_s=monotonic(),
            quarantined=frozenset(self.quarantined),
            is_alive=self.is_running,
            memory_bytes={"base": 1000, "merged": sum(self.merged.values()), "kv_total": 6400},
            adapters=adapters,
        )
