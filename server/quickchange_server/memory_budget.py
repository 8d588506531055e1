"""Who may use how much memory: turns `auto` into bytes, and says so in a table.

Shares of `auto`, of what the base and the explicit values leave under the limit (10 % of which,
and on the host half a GiB for the process itself, stay free):

| part                 | share | at most                                   |
|----------------------|-------|-------------------------------------------|
| merged copies        | 25 %  | the base's own size; none if that is more |
| KV cache             | 50 %  | max_batch_rows requests of 2,048 tokens   |
|                      |       | (but one request of full length)          |
| adapters on device   | 10 %  | the base's own size, from 512 MiB to 2 GiB|
| adapters in host RAM | 10 %  | 4 GiB                                     |

Knows nothing of how the parts are used.
"""

from dataclasses import dataclass

from quickchange_server.base_footprint import BaseFootprint
from quickchange_server.config import ServerConfig
from quickchange_server.errors import ConfigInvalid
from quickchange_server.memory_limit import MemoryLimit

MIB = 1 << 20
GIB = 1 << 30
USABLE_SHARE = 0.9
PROCESS_BYTES = GIB // 2
GPU_WORK_BYTES = GIB // 2
"""Of a GPU, whatever the number of rows: activations of prompts, sums of deltas, cuBLAS."""
TOKENS_PER_ROW = 2048


@dataclass(frozen=True, slots=True)
class MemoryBudget:
    """The resolved ceilings, with what they were resolved from."""

    base_bytes: int
    kv_cache_bytes: int
    adapter_device_bytes: int
    adapter_host_bytes: int
    merged_bytes: int
    work_bytes: int
    device: str
    device_limit: MemoryLimit
    host_limit: MemoryLimit
    footprint: BaseFootprint

    def render(self) -> str:
        """Return the table that is printed at start."""
        base = self.footprint
        kv_note = f"{self.kv_cache_bytes // base.kv_bytes_per_token:,} tokens"
        merged_note = f"{self.merged_bytes / base.weight_bytes:.1f} times the base"
        lines = [
            _line("base", self.base_bytes, self.device, "never changed"),
            _line("KV cache", self.kv_cache_bytes, self.device, kv_note),
            _line("adapters", self.adapter_device_bytes, self.device, self._adapters_note),
            _line("adapters", self.adapter_host_bytes, "host", ""),
            _line("merged copies", self.merged_bytes, self.device, merged_note),
        ]
        if self.work_bytes:
            note = "of steps: --max-batch-rows"
            lines.append(_line("working", self.work_bytes, self.device, note))
        return "\n".join([f"Memory: {self._limits}", *lines])

    @property
    def _adapters_note(self) -> str:
        per_adapter = 16 * self.footprint.adapter_bytes_per_rank
        return f"{self.adapter_device_bytes // max(per_adapter, 1)} of rank 16 on every linear"

    @property
    def _limits(self) -> str:
        limits = dict.fromkeys((self.device_limit, self.host_limit))
        return ", ".join(f"{format_bytes(each.free_bytes)} ({each.source})" for each in limits)


@dataclass(frozen=True, slots=True)
class _Part:
    """One ceiling: the explicit value, or the share and the most that `auto` takes."""

    name: str
    explicit: int | None
    share: float
    most: int
    is_whole: bool = False

    def resolve(self, rest: int) -> int:
        """Return the explicit value, or the share of `rest`."""
        if self.explicit is not None:
            return self.explicit
        if self.is_whole:
            return self.most if self.most <= self.share * rest else 0
        return int(min(self.share * rest, self.most))


@dataclass(frozen=True, slots=True)
class _Reserve:
    """What nobody chooses and has to fit as well."""

    name: str
    num_bytes: int


def resolve_budget(
    config: ServerConfig,
    footprint: BaseFootprint,
    device: str,
    device_limit: MemoryLimit,
    host_limit: MemoryLimit,
) -> MemoryBudget:
    """Turn the byte settings into numbers that fit under the limits together.

    Raises: ConfigInvalid when the base or the explicit values do not fit.
    """
    device_parts = _device_parts(config, footprint)
    host_parts = _host_parts(config, footprint)
    work_bytes = 0
    if device == "cpu":
        parts, reserve = device_parts + host_parts, _Reserve("the process", PROCESS_BYTES)
        sizes = _resolve(parts, host_limit, footprint.weight_bytes, reserve)
    else:
        work_bytes = GPU_WORK_BYTES + config.max_batch_rows * footprint.gpu_bytes_per_row
        reserve = _Reserve("working memory for --max-batch-rows", work_bytes)
        sizes = _resolve(device_parts, device_limit, footprint.weight_bytes, reserve)
        reserve = _Reserve("the process", PROCESS_BYTES)
        sizes |= _resolve(host_parts, host_limit, 0, reserve)
    return MemoryBudget(
        base_bytes=footprint.weight_bytes,
        **sizes,
        work_bytes=work_bytes,
        device=device,
        device_limit=device_limit,
        host_limit=host_limit,
        footprint=footprint,
    )


def format_bytes(size: int) -> str:
    """Return a size for people: `512.0 MiB`, `2.0 GiB`."""
    return f"{size / GIB:.1f} GiB" if size >= GIB else f"{size / MIB:.1f} MiB"


def _device_parts(config: ServerConfig, base: BaseFootprint) -> list[_Part]:
    max_tokens = min(config.max_model_len or base.max_model_len, base.max_model_len)
    kv_tokens = max(config.max_batch_rows * min(TOKENS_PER_ROW, max_tokens), max_tokens)
    most_kv = kv_tokens * base.kv_bytes_per_token
    most_pool = min(max(base.weight_bytes, GIB // 2), 2 * GIB)
    pool_bytes = _explicit(config.adapter_device_bytes, config.max_loras, config, base)
    return [
        _Part("merged_bytes", config.merged_bytes, 0.25, base.weight_bytes, is_whole=True),
        _Part("kv_cache_bytes", config.kv_cache_bytes, 0.5, most_kv),
        _Part("adapter_device_bytes", pool_bytes, 0.1, most_pool),
    ]


def _host_parts(config: ServerConfig, base: BaseFootprint) -> list[_Part]:
    host_bytes = _explicit(config.adapter_host_bytes, config.max_cpu_loras, config, base)
    return [_Part("adapter_host_bytes", host_bytes, 0.1, 4 * GIB)]


def _explicit(
    size: int | None, num_adapters: int | None, config: ServerConfig, base: BaseFootprint
) -> int | None:
    """Return the bytes that were asked for, directly or as a number of the largest adapters."""
    if size is None and num_adapters is not None:
        return num_adapters * config.max_lora_rank * base.adapter_bytes_per_rank
    return size


def _resolve(
    parts: list[_Part], limit: MemoryLimit, base_bytes: int, reserve: _Reserve
) -> dict[str, int]:
    """Resolve the parts that live in one memory."""
    fixed = sum(part.explicit or 0 for part in parts)
    rest = int(USABLE_SHARE * limit.free_bytes) - reserve.num_bytes - base_bytes - fixed
    if rest < 0:
        raise ConfigInvalid(_does_not_fit(parts, limit, base_bytes, reserve))
    return {part.name: part.resolve(rest) for part in parts}


def _does_not_fit(
    parts: list[_Part], limit: MemoryLimit, base_bytes: int, reserve: _Reserve
) -> str:
    asked = [
        f"--{part.name.replace('_', '-')} {format_bytes(part.explicit)}"
        for part in parts
        if part.explicit is not None
    ]
    base = [f"the base {format_bytes(base_bytes)}"] if base_bytes else []
    process = [f"{reserve.name} {format_bytes(reserve.num_bytes)}"]
    return (
        f"not enough memory: {' + '.join(base + process + asked)} is more than "
        f"{USABLE_SHARE:.0%} of {format_bytes(limit.free_bytes)} ({limit.source}); "
        "lower these values, use a smaller base, or raise the limit"
    )


def _line(name: str, size: int, place: str, note: str) -> str:
    return f"  {name:<14}{format_bytes(size):>11}  {place:<7} {note}".rstrip()
