"""Which settings there are, and what follows from their values. Knows not where they come from."""

import hashlib
import ipaddress
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quickchange_server import option as o
from quickchange_server.option import StaticAdapter, option

BASE, ADAPTERS, MEMORY, LIMITS, HTTP, LOGS, VLLM = (
    "Base",
    "Adapters",
    "Memory",
    "Limits",
    "HTTP",
    "Logs and traces",
    "Names that vLLM's callers pass",
)
_AUTO_BYTES = o.read_auto_or(o.read_bytes)
_BYTES_LOOK: dict[str, Any] = {"metavar": "BYTES|auto"}


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """All settings. A byte value of None means `auto`: a share of what is free at start."""

    model: str = option(
        "builtin:smollm2-135m",
        o.read_text,
        "The base: a folder, a Hub id, or builtin:smollm2-135m.",
        BASE,
        metavar="FOLDER|ID",
    )
    served_model_name: str | None = option(
        None,
        o.read_text,
        "What requests call the base. Default: the last path part of --model.",
        BASE,
        metavar="NAME",
    )
    revision: str | None = option(
        None, o.read_text, "Branch, tag or commit of a Hub id.", BASE, metavar="REVISION"
    )
    device: str = option(
        "auto",
        o.read_pattern(r"auto|cpu|cuda(:\d{1,3})?", "auto, cpu, cuda or cuda:N"),
        "Where the base lives; auto takes a GPU if torch can use one.",
        BASE,
        metavar="auto|cpu|cuda[:N]",
    )
    dtype: str = option(
        "auto",
        o.read_choice("auto", "float32", "bfloat16", "float16"),
        "Number format of the weights; auto keeps the checkpoint's.",
        BASE,
        metavar="auto|float32|bfloat16|float16",
    )
    kernels: str = option(
        "auto",
        o.read_choice("auto", "native", "plain"),
        "What computes the steps: auto takes Triton's kernels on a GPU, native ones on a CPU that "
        "has AVX-512 BF16, plain ones elsewhere.",
        BASE,
        metavar="auto|native|plain",
    )
    amx: str = option(
        "auto",
        o.read_choice("auto", "off"),
        "Whether native kernels compute products and attention by AMX: auto does on a CPU that has "
        "AMX-BF16. Off gives the same bits on CPUs with and without it.",
        BASE,
        metavar="auto|off",
    )
    quantize: str | None = option(
        None,
        o.read_choice("int8"),
        "Keep the base's matrices in int8, with a scale for each output: half the bytes.",
        BASE,
        metavar="int8",
    )
    max_model_len: int | None = option(
        None,
        o.read_auto_or(o.read_count(1)),
        "Most tokens of prompt and answer together; auto is the model's own limit.",
        BASE,
        metavar="TOKENS|auto",
    )
    cache: Path | None = option(
        None,
        lambda value: Path(o.read_text(value)).expanduser(),
        "Folder for what can be fetched again. Default: ~/.cache/quickchange.",
        BASE,
        metavar="FOLDER",
    )
    adapter: tuple[StaticAdapter, ...] = option(
        (),
        o.read_adapters,
        "Serve the adapter in FOLDER as NAME while this process runs; may be repeated.",
        ADAPTERS,
        metavar="NAME=FOLDER",
        kind="list",
    )
    lora_root: tuple[Path, ...] = option(
        (),
        o.read_folders,
        "Let callers load adapters by path from this folder (vLLM's /v1/load_lora_adapter); may be "
        "repeated.",
        ADAPTERS,
        metavar="FOLDER",
        kind="list",
    )
    store: Path | str | None = option(
        None,
        o.read_store,
        "Where uploaded adapters are kept: a folder, or s3://BUCKET/PREFIX. "
        "Default: ~/.local/share/quickchange.",
        ADAPTERS,
        metavar="FOLDER|URL",
    )
    store_cache_bytes: int = option(
        10 << 30,
        o.read_bytes,
        "Ceiling of local copies of what an object store keeps. Default: 10GiB.",
        ADAPTERS,
        metavar="BYTES",
    )
    catalog: str | None = option(
        None,
        o.read_catalog,
        "Database of names and versions: sqlite:///PATH or postgresql://USER:PASSWORD@HOST/NAME. "
        "Default: catalog.sqlite in the store's folder, or a file of its own for each URL in "
        "~/.local/share/quickchange.",
        ADAPTERS,
        metavar="URL",
        is_secret=True,
    )
    max_lora_rank: int = option(
        256, o.read_count(1, 4096), "Largest rank that is served.", ADAPTERS, metavar="RANK"
    )
    event_days: int = option(
        400,
        o.read_count(0),
        "How long the audit log of a name is kept, but for its newest 100 events; 0: for ever.",
        ADAPTERS,
        metavar="DAYS",
    )
    events_per_adapter: int = option(
        10_000,
        o.read_count(100),
        "Most events of a name that the audit log keeps, the newest.",
        ADAPTERS,
        metavar="N",
    )
    kv_cache_bytes: int | None = option(
        None, _AUTO_BYTES, "Ceiling of the KV cache. Default: auto.", MEMORY, **_BYTES_LOOK
    )
    adapter_device_bytes: int | None = option(
        None,
        _AUTO_BYTES,
        "Ceiling of adapters on the device. Default: auto.",
        MEMORY,
        **_BYTES_LOOK,
    )
    adapter_host_bytes: int | None = option(
        None,
        _AUTO_BYTES,
        "Ceiling of adapters in host memory. Default: auto.",
        MEMORY,
        **_BYTES_LOOK,
    )
    merged_bytes: int | None = option(
        None,
        _AUTO_BYTES,
        "Ceiling of merged copies of the base. Default: auto.",
        MEMORY,
        **_BYTES_LOOK,
    )
    auto_merge: bool = option(
        False,
        o.read_switch,
        "Merge adapters by themselves while their traffic makes a copy pay, under --merged-bytes.",
        ADAPTERS,
        kind="switch",
    )
    max_batch_rows: int = option(
        32, o.read_count(1, 4096), "Most requests in one step.", LIMITS, metavar="N"
    )
    max_step_tokens: int | None = option(
        None,
        o.read_count(1, 262_144),
        "Most tokens in one step; longer prompts are prefilled in chunks. Default: 4 for each of "
        "--max-batch-rows, at least 128 on a CPU and 2048 on a GPU.",
        LIMITS,
        metavar="TOKENS",
    )
    max_queue: int = option(
        256,
        o.read_count(0),
        "Most requests that wait; more are refused with 429.",
        LIMITS,
        metavar="N",
    )
    tenant_max_bytes: int | None = option(
        None,
        o.read_bytes,
        "Most bytes that a tenant may have in the store. Default: no limit.",
        LIMITS,
        metavar="BYTES",
    )
    tenant_max_versions: int | None = option(
        None,
        o.read_count(0),
        "Most versions that a tenant may have in the store. Default: no limit.",
        LIMITS,
        metavar="N",
    )
    tenant_uploads_per_minute: int | None = option(
        None,
        o.read_count(1),
        "How often a tenant may upload, per server. Default: no limit.",
        LIMITS,
        metavar="N",
    )
    tenant_max_uploads: int = option(
        4,
        o.read_count(1),
        "How many uploads a tenant may have under way at once, per server.",
        LIMITS,
        metavar="N",
    )
    tenant_max_requests: int | None = option(
        None,
        o.read_count(1),
        "How many requests a tenant may have running and waiting, per server. Default: no limit; "
        "three quarters of all places once there are several tenants.",
        LIMITS,
        metavar="N",
    )
    tenant_loads_per_minute: int | None = option(
        None,
        o.read_count(1),
        "How many adapters a tenant may have loaded in a minute, per server. Default: no limit.",
        LIMITS,
        metavar="N",
    )
    host: str = option("127.0.0.1", o.read_text, "Address to listen on.", HTTP, metavar="ADDRESS")
    port: int = option(8000, o.read_count(0, 65535), "Port to listen on.", HTTP, metavar="PORT")
    admin_port: int | None = option(
        None,
        o.read_count(0, 65535),
        "A second port, for probes and metrics alone, which asks for no key.",
        HTTP,
        metavar="PORT",
    )
    drain_delay: float = option(
        0.0,
        o.read_seconds,
        "How long a server that got SIGTERM goes on answering, not ready and 503 to new work, so "
        "that balancers notice before its port closes.",
        HTTP,
        metavar="SECONDS",
    )
    drain_timeout: float = option(
        30.0,
        o.read_seconds,
        "How long running requests may take to finish when the server is asked to stop.",
        HTTP,
        metavar="SECONDS",
    )
    strict_fields: bool = option(
        False, o.read_switch, "Refuse unknown request fields with 400.", HTTP, kind="switch"
    )
    cors_origin: tuple[str, ...] = option(
        (),
        o.read_origins,
        "Origin whose pages may call this server; may be repeated.",
        HTTP,
        metavar="ORIGIN",
        kind="list",
    )
    admin_key_file: Path | None = option(
        None,
        lambda value: Path(o.read_text(value)).expanduser(),
        "File that holds the first key: an admin's, 32 or more random characters.",
        HTTP,
        metavar="FILE",
    )
    insecure: bool = option(
        False,
        o.read_switch,
        "Listen on a public address although there is no key to ask callers for.",
        HTTP,
        kind="switch",
    )
    log_level: str = option(
        "info",
        o.read_choice("debug", "info", "warning", "error"),
        "Least severity that is logged; `info` has a line for each request.",
        LOGS,
        metavar="LEVEL",
    )
    log_format: str = option(
        "text",
        o.read_choice("text", "json"),
        "Lines for people, or one JSON object a line.",
        LOGS,
        metavar="FORMAT",
    )
    log_prompts: bool = option(
        False,
        o.read_switch,
        "Write the texts of prompts into the log. They may be confidential.",
        LOGS,
        kind="switch",
    )
    otlp_endpoint: str | None = option(
        None,
        o.read_text,
        "Send traces by OTLP over HTTP to this collector, such as http://127.0.0.1:4318.",
        LOGS,
        metavar="URL",
    )
    enable_lora: bool = option(
        True, o.read_always_on, "Accepted; adapters are always served.", VLLM, kind="switch"
    )
    lora_modules: tuple[StaticAdapter, ...] = option(
        (), o.read_adapters, "The same as --adapter.", VLLM, metavar="NAME=FOLDER", kind="list"
    )
    max_loras: int | None = option(
        None,
        o.read_count(1),
        "Size --adapter-device-bytes for so many adapters of the largest rank.",
        VLLM,
        metavar="N",
    )
    max_cpu_loras: int | None = option(
        None,
        o.read_count(1),
        "Size --adapter-host-bytes for so many adapters of the largest rank.",
        VLLM,
        metavar="N",
    )

    @property
    def base_name(self) -> str:
        """What requests call the base."""
        return self.served_model_name or re.split(r"[/:]", self.model.rstrip("/"))[-1]

    @property
    def static_adapters(self) -> tuple[StaticAdapter, ...]:
        """The adapters named at start, by either flag."""
        return self.adapter + self.lora_modules

    @property
    def cache_folder(self) -> Path:
        """Folder for what can be fetched or made again."""
        return self.cache or Path("~/.cache/quickchange").expanduser()

    @property
    def store_url(self) -> str | None:
        """The object store that keeps uploaded adapters; None when a folder does."""
        return self.store if isinstance(self.store, str) else None

    @property
    def store_folder(self) -> Path:
        """Folder for what must not be lost: uploaded adapters, unless a URL keeps them."""
        if isinstance(self.store, Path):
            return self.store
        return Path("~/.local/share/quickchange").expanduser()

    @property
    def store_cache_folder(self) -> Path:
        """Folder for copies of what the object store keeps: each URL has its own."""
        return self.cache_folder / "store" / self._store_id

    @property
    def catalog_url(self) -> str:
        """Database of names and versions. Two stores never share one unless it is named."""
        name = f"catalog-{self._store_id}.sqlite" if self.store_url else "catalog.sqlite"
        return self.catalog or f"sqlite:///{self.store_folder / name}"

    @property
    def _store_id(self) -> str:
        return hashlib.sha256((self.store_url or "").encode()).hexdigest()[:12]

    @property
    def is_public(self) -> bool:
        """Whether others than this machine can reach `host`."""
        try:
            return not ipaddress.ip_address(self.host.strip("[]")).is_loopback
        except ValueError:
            return self.host != "localhost"
