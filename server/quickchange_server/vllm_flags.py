"""vLLM's flags on `serve`: which setting of ours one means, which do nothing, which are refused.

Whoever starts this server with the command line of vLLM is told what became of each flag. They are
flags alone: the settings they stand for have the variables and keys. Knows no command line.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from quickchange_server.errors import ConfigInvalid


@dataclass(frozen=True, slots=True)
class Values:
    """Which values of a flag ask for what is so anyway; `text` says it in the documentation."""

    text: str
    holds: Callable[[object], bool]


ANYTHING = Values("any value", lambda value: True)
NOTHING = Values("no value", lambda value: False)


def one_of(*values: object) -> Values:
    """Return the values that are named."""
    return Values(" or ".join(f"`{value}`" for value in values), lambda value: value in values)


def at_least(minimum: float) -> Values:
    """Return the numbers from a minimum on."""

    def holds(value: object) -> bool:
        try:
            return float(str(value)) >= minimum
        except ValueError:
            return False

    return Values(f"from `{minimum}` on", holds)


@dataclass(frozen=True, slots=True)
class VllmFlag:
    """One flag of vLLM's.

    Attributes:
        name: with underscores.
        ours: the setting that it means; None: there is none.
        accepts: whether a value is accepted, without effect, when it means no setting.
        note: what is said then.
        instead: what is said of a value that is refused.
        is_switch: takes no value on the command line.
    """

    name: str
    ours: str | None = None
    accepts: Values = NOTHING
    note: str = ""
    instead: str = ""
    is_switch: bool = False

    @property
    def flag(self) -> str:
        """The spelling on the command line."""
        return "--" + self.name.replace("_", "-")


def _switch(name: str, note: str, instead: str = "", *, is_on: bool = True) -> VllmFlag:
    """Return a switch that is accepted in one position; `instead` refuses the other."""
    accepts = one_of(is_on) if instead else ANYTHING
    return VllmFlag(name, accepts=accepts, note=note, instead=instead, is_switch=True)


def _refused(name: str, instead: str, *, is_switch: bool = False) -> VllmFlag:
    return VllmFlag(name, instead=instead, is_switch=is_switch)


_ONE_DEVICE = "one device computes the steps; start more servers on one --catalog and --store"
_LOGS = "--log-level says what is logged: at info a line for each request, never its text"
_TOOLS = "tool calls are not served: requests that ask for them are refused by name"
_PROXY = "TLS and paths belong to the proxy in front; this server speaks plain HTTP"

VLLM_FLAGS: tuple[VllmFlag, ...] = (
    VllmFlag("max_num_seqs", ours="max_batch_rows"),
    VllmFlag("max_num_batched_tokens", ours="max_step_tokens"),
    VllmFlag("download_dir", ours="cache"),
    _refused(
        "api_key",
        "a key on the command line is shown to everybody who may list processes; put it into a "
        "file and give --admin-key-file FILE, then make keys with `quickchange keys create`",
    ),
    VllmFlag(
        "gpu_memory_utilization",
        accepts=at_least(0.9),
        note="memory is taken by part, up to nine tenths of what is free, unless "
        "--kv-cache-bytes, --adapter-device-bytes and --merged-bytes say otherwise",
        instead="shares of a device are not served; give the parts in bytes: --kv-cache-bytes, "
        "--adapter-device-bytes, --merged-bytes",
    ),
    _refused(
        "quantization", "quantised checkpoints are not served; --quantize int8 makes one at load"
    ),
    VllmFlag(
        "kv_cache_dtype",
        accepts=one_of("auto"),
        note="KV blocks have the dtype of the base",
        instead="KV blocks have the dtype of the base (--dtype); leave it out",
    ),
    VllmFlag(
        "lora_dtype",
        accepts=one_of("auto"),
        note="adapters have the dtype of the base",
        instead="adapters have the dtype of the base (--dtype); leave it out",
    ),
    VllmFlag(
        "load_format",
        accepts=one_of("auto", "safetensors"),
        note="bases are read from safetensors",
        instead="bases are read from safetensors; leave it out",
    ),
    VllmFlag(
        "block_size", accepts=one_of("16"), note="KV blocks hold 16 tokens", instead="it is 16"
    ),
    VllmFlag(
        "max_logprobs",
        accepts=at_least(0),
        note="requests may ask for up to 20 alternatives",
        instead="requests may ask for up to 20 alternatives; leave it out",
    ),
    VllmFlag("seed", accepts=ANYTHING, note="seeds belong to requests (`seed`); others are drawn"),
    VllmFlag(
        "tensor_parallel_size", accepts=one_of("1"), note="one device is used", instead=_ONE_DEVICE
    ),
    VllmFlag(
        "pipeline_parallel_size",
        accepts=one_of("1"),
        note="one device is used",
        instead=_ONE_DEVICE,
    ),
    VllmFlag(
        "data_parallel_size", accepts=one_of("1"), note="one device is used", instead=_ONE_DEVICE
    ),
    VllmFlag(
        "cpu_offload_gb",
        accepts=one_of("0"),
        note="the base is on the device as a whole",
        instead="the base is on the device as a whole; take a smaller one, or --quantize int8",
    ),
    VllmFlag("swap_space", accepts=ANYTHING, note="preempted requests are computed again"),
    VllmFlag(
        "generation_config",
        accepts=one_of("vllm"),
        note="defaults of sampling are OpenAI's",
        instead="defaults of sampling are OpenAI's, or a task's (task.json); leave it out",
    ),
    VllmFlag(
        "runner",
        accepts=one_of("auto", "generate"),
        note="bases generate text",
        instead="bases generate text; embedding and pooling are not served",
    ),
    VllmFlag("uvicorn_log_level", accepts=ANYTHING, note=_LOGS),
    _refused(
        "otlp_traces_endpoint", "give --otlp-endpoint URL: OTLP over HTTP, port 4318 as a rule"
    ),
    _switch(
        "enable_prefix_caching",
        "prefixes are always shared",
        "prefixes are always shared; a request's `cache_salt` keeps it to itself",
    ),
    _switch(
        "enable_chunked_prefill",
        "prompts are always prefilled in chunks",
        "prompts are always prefilled in chunks; raise --max-step-tokens for longer ones",
    ),
    _switch("enforce_eager", "there is nothing to compile on a CPU; GPUs replay graphs"),
    _switch("enable_lora_bias", "adapters' biases are always served"),
    _switch("fully_sharded_loras", "one device is used"),
    _switch("disable_log_requests", _LOGS),
    _switch("disable_log_stats", "/metrics has them, and no log"),
    _switch(
        "enable_log_requests",
        _LOGS,
        "--log-prompts writes the texts of prompts into the log",
        is_on=False,
    ),
    _switch("disable_frontend_multiprocessing", "one process serves"),
    _switch(
        "trust_remote_code",
        "code of a model's folder is never run; the base's family must be known",
    ),
    _refused("enable_auto_tool_choice", _TOOLS, is_switch=True),
    _refused("tool_call_parser", _TOOLS),
    _refused("reasoning_parser", "reasoning is not split off; it is part of the answer"),
    _refused("chat_template", "the base's own chat template is used; tasks (task.json) add theirs"),
    _refused("tokenizer", "the base's own tokenizer is used"),
    _refused("override_generation_config", "give defaults in an adapter's task.json"),
    _refused("allowed_origins", "name each origin with --cors-origin; a star is not accepted"),
    _refused("ssl_keyfile", _PROXY),
    _refused("ssl_certfile", _PROXY),
    _refused("root_path", _PROXY),
    _refused("speculative_config", "speculative decoding is not served"),
)
_DTYPES = {"half": "float16", "float": "float32"}
_KEY_VARIABLE = "VLLM_API_KEY"
_LOAD_VARIABLE = "VLLM_ALLOW_RUNTIME_LORA_UPDATING"


def translate(flags: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return the settings that are meant, by name, and a sentence on each flag without effect.

    Raises: ConfigInvalid for a flag that is refused, or that contradicts ours.
    """
    meant, notes = dict(flags), []
    for each in VLLM_FLAGS:
        value = meant.pop(each.name, None)
        if value is None:
            continue
        if each.ours is not None:
            if meant.get(each.ours) is not None:
                ours = each.ours.replace("_", "-")
                raise ConfigInvalid(f"{each.flag} and --{ours} are the same; give one of them")
            meant[each.ours] = value
        elif each.accepts.holds(value):
            notes.append(f"{_shown(each, value)} has no effect here: {each.note}")
        else:
            raise ConfigInvalid(f"{_shown(each, value)} is not available: {each.instead}")
    meant["dtype"] = _DTYPES.get(str(meant.get("dtype")), meant.get("dtype"))
    return meant, notes


def _shown(flag: VllmFlag, value: object) -> str:
    """Spell a flag as it was given; a key is not repeated."""
    if flag.is_switch:
        return flag.flag if value else flag.flag.replace("--", "--no-", 1)
    return flag.flag if flag.accepts is NOTHING else f"{flag.flag} {value}"


def unread_variables(environ: Mapping[str, str]) -> list[str]:
    """Return a sentence for each of vLLM's variables that callers rely on and that is not read."""
    found = []
    if environ.get(_KEY_VARIABLE):
        found.append(f"{_KEY_VARIABLE} is not read: give the first key with --admin-key-file FILE")
    if environ.get(_LOAD_VARIABLE):
        found.append(f"{_LOAD_VARIABLE} is not read: name the folders with --lora-root FOLDER")
    return found
