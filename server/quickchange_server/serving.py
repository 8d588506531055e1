"""Build one server from its settings, run it until a signal, and take it down in order.

Start: bind the port (taken ports fail at once), resolve the memory budget, load the base, start
the engine and the adapters, listen, say what to try. Stop (SIGTERM, SIGINT): accept nothing new,
let running requests finish within the drain time, then stop the engine. A second SIGINT stops at
once. The only module that knows all rooms.
"""

import asyncio
import os
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import psutil
import torch
from fastapi import FastAPI
from quickchange_adapters.catalog import Catalog
from quickchange_adapters.event_log import DAY_S, EventRule
from quickchange_adapters.key_catalog import KeyCatalog
from quickchange_adapters.limits import AdapterLimits
from quickchange_adapters.records import Quota
from quickchange_adapters.store import Store
from transformers.utils.logging import disable_progress_bar

from quickchange_server import __version__
from quickchange_server.adapter_probe import PROBE_PROMPT
from quickchange_server.adapter_service import AdapterService
from quickchange_server.api.admin_app import create_admin_app
from quickchange_server.api.app import AppServices, create_app
from quickchange_server.auto_merge import TrafficSource
from quickchange_server.base_footprint import read_footprint
from quickchange_server.builtin import known_names
from quickchange_server.config import ServerConfig
from quickchange_server.engine.client import EngineClient
from quickchange_server.engine.settings import EngineSettings
from quickchange_server.errors import CannotStart, ConfigInvalid, QuickchangeError
from quickchange_server.key_service import KeyService
from quickchange_server.keyring import Keyring
from quickchange_server.listeners import ApiServer, DrainTimes, bind, listening_beside, url_of
from quickchange_server.lora_roots import LoraRoots
from quickchange_server.memory_budget import MemoryBudget, resolve_budget
from quickchange_server.memory_limit import device_memory, host_memory
from quickchange_server.metrics import ServerMetrics
from quickchange_server.option import StaticAdapter
from quickchange_server.process_memory import ProcessMemory
from quickchange_server.request_log import log_request, set_up_logging
from quickchange_server.request_quotas import RequestQuotas
from quickchange_server.request_record import RequestObserver
from quickchange_server.step_size import default_step_tokens
from quickchange_server.storage import open_storage
from quickchange_server.thread_affinity import restore_affinity
from quickchange_server.tokenizer import Tokenizer
from quickchange_server.tracing import open_tracer
from quickchange_server.tried_gpus import untried_note
from quickchange_server.triton_needs import missing_for_triton
from quickchange_server.upload_checker import UploadChecker
from quickchange_server.upload_quotas import UploadQuotas

READY_POLL_S = 0.02
EXIT_S = 10.0
DRAINED_EXIT_S = 30.0
Listeners = tuple[socket.socket, socket.socket | None]
"""The API's, and the operators'."""


def run_server(
    config: ServerConfig,
    base_folder: Path,
    keyring: Keyring,
    when_drained: Callable[[], None] = lambda: None,
) -> None:
    """Serve until a signal asks to stop; `when_drained` is called when the last request ended.

    Raises: CannotStart.
    """
    set_up_logging(config.log_level, config.log_format)
    restore_affinity()
    disable_progress_bar()
    check_adapter_folders(config.static_adapters)
    check_lora_roots(config.lora_root)
    with bind(config.host, config.port) as listener, _bind_admin(config) as admin_listener:
        tracer = open_tracer(config.otlp_endpoint, __version__) if config.otlp_endpoint else None
        observers = (log_request, tracer.on_request) if tracer else (log_request,)
        services = build_services(config, base_folder, keyring, observers)
        app = create_app(services)
        restore_affinity()
        times = DrainTimes(config.drain_delay, config.drain_timeout)
        server = ApiServer(app, app.state.drain, times, services.engine.stop, when_drained)
        with asyncio.Runner(loop_factory=server.config.get_loop_factory()) as runner:
            runner.run(_serve(app, server, (listener, admin_listener), config))
        if tracer is not None:
            tracer.stop()


def _bind_admin(config: ServerConfig) -> AbstractContextManager[socket.socket | None]:
    if config.admin_port is None:
        return nullcontext()
    return bind(config.host, config.admin_port, "--admin-port")


def check_adapter_folders(adapters: Iterable[StaticAdapter]) -> None:
    """Refuse folders that hold no adapter, before seconds are spent on loading the base.

    Raises: CannotStart.
    """
    for each in adapters:
        if not (each.folder / "adapter_config.json").is_file():
            raise CannotStart(
                f"{_spelling(each)}: there is no adapter_config.json in that folder; "
                "give one that PEFT's save_pretrained wrote"
            )


def check_lora_roots(roots: Iterable[Path]) -> None:
    """Refuse roots that are no folders: a wrong name would make every load a 404.

    Raises: CannotStart.
    """
    for root in roots:
        if not root.is_dir():
            raise CannotStart(f"--lora-root {root}: there is no such folder")


def build_services(
    config: ServerConfig,
    base_folder: Path,
    keyring: Keyring,
    observers: tuple[RequestObserver, ...] = (),
) -> AppServices:
    """Load the base and put together what the routes work with. Blocks for seconds.

    Raises: CannotStart.
    """
    store, catalog = open_storage(config)
    checker = UploadChecker()
    checker.warm_up()
    budget = _budget(config, base_folder)
    _say(budget.render())
    metrics = _metrics_of(store, catalog)
    tokenizer = Tokenizer.load(base_folder)
    memory = ProcessMemory()
    engine = EngineClient(base_folder, engine_settings(config, budget), metrics)
    metrics.show_build(__version__, engine.base.name, str(engine.dtype).removeprefix("torch."))
    if budget.device == "cpu":
        _say(kernels_text(engine.native_refusal, engine.amx_refusal))
    limits = AdapterLimits(max_rank=config.max_lora_rank)
    adapters = AdapterService(
        engine,
        store,
        catalog,
        limits,
        engine.dtype,
        checker,
        probe_ids=tokenizer.encode(PROBE_PROMPT),
        event_rule=event_rule(config),
    )
    if config.auto_merge:
        source = TrafficSource(engine.take_demand, metrics.on_auto_merge, _say)
        adapters.merge_by_traffic(source)
    return AppServices(
        engine=engine,
        adapters=adapters,
        tokenizer=tokenizer,
        metrics=metrics,
        is_strict=config.strict_fields,
        keyring=keyring,
        keys=KeyService(KeyCatalog(catalog.database), keyring),
        quotas=_upload_quotas(config, metrics),
        requests=RequestQuotas(
            config.tenant_max_requests, config.tenant_loads_per_minute, metrics.on_quota_refused
        ),
        lora_roots=LoraRoots(config.lora_root),
        is_loopback_only=not config.is_public,
        memory=memory,
        cors_origins=config.cors_origin,
        observers=observers,
        shows_prompts=config.log_prompts,
    )


def _metrics_of(store: Store, catalog: Catalog) -> ServerMetrics:
    metrics = ServerMetrics()
    metrics.watch_catalog(lambda: catalog.database.is_up)
    metrics.watch_store(lambda: store.is_up)
    metrics.watch_cache(store.cache_counts)
    return metrics


def _upload_quotas(config: ServerConfig, metrics: ServerMetrics) -> UploadQuotas:
    return UploadQuotas(
        Quota(config.tenant_max_versions, config.tenant_max_bytes),
        config.tenant_uploads_per_minute,
        config.tenant_max_uploads,
        metrics.on_quota_refused,
    )


def event_rule(config: ServerConfig) -> EventRule:
    """Return how long the audit log is kept."""
    max_age_s = config.event_days * DAY_S if config.event_days else None
    return EventRule(max_age_s, config.events_per_adapter)


def _budget(config: ServerConfig, base_folder: Path) -> MemoryBudget:
    device = pick_device(config.device)
    check_auto_merge(config, device)
    if device.startswith("cuda"):
        if (note := untried_note(device)) is not None:
            _say(note)
        check_triton(config, missing_for_triton())
    footprint = read_footprint(base_folder, config.dtype)
    return resolve_budget(config, footprint, device, device_memory(device), host_memory())


def pick_device(device: str) -> str:
    """Return the device to serve on: `cpu` or `cuda:N`.

    Raises: ConfigInvalid when torch cannot use the one that was asked for.
    """
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "auto":
        return "cuda:0" if num_gpus else "cpu"
    if device == "cpu":
        return device
    index = int(device.partition(":")[2] or 0)
    if index >= num_gpus:
        raise ConfigInvalid(
            f"--device {device}: torch {torch.__version__} can use {num_gpus} GPUs here; "
            "use cpu, or install a build for GPUs: make setup TORCH=cuda"
        )
    return f"cuda:{index}"


def check_auto_merge(config: ServerConfig, device: str) -> None:
    """Refuse to merge by traffic where a copy may make steps slower. Raises: ConfigInvalid."""
    if config.auto_merge and device != "cpu":
        raise ConfigInvalid(
            "--auto-merge is for CPUs: on a GPU, steps on a merged copy are not replayed from "
            "graphs and may be slower; leave it out, and merge by hand where it pays"
        )


def check_triton(config: ServerConfig, missing: str | None) -> None:
    """Refuse a GPU on which Triton's kernels could not be launched. Raises: ConfigInvalid."""
    if missing is not None and config.kernels == "auto":
        raise ConfigInvalid(
            f"Triton's kernels need {missing} on this machine; install it, "
            "or serve without them, slower: --kernels plain"
        )


def engine_settings(config: ServerConfig, budget: MemoryBudget) -> EngineSettings:
    """Translate the settings and the resolved budget for the engine."""
    return EngineSettings(
        served_name=config.base_name,
        known_as=known_names(config.model),
        device=budget.device,
        dtype=config.dtype,
        kernels=config.kernels,
        amx=config.amx == "auto",
        quantize=config.quantize,
        native_folder=config.cache_folder / "native",
        kv_cache_bytes=budget.kv_cache_bytes,
        max_model_len=config.max_model_len,
        max_batch_rows=config.max_batch_rows,
        max_step_tokens=config.max_step_tokens
        or default_step_tokens(budget.device, config.max_batch_rows),
        max_queue=config.max_queue,
        adapter_device_bytes=budget.adapter_device_bytes,
        adapter_host_bytes=budget.adapter_host_bytes,
        merged_bytes=budget.merged_bytes,
        max_lora_rank=config.max_lora_rank,
        auto_merge=config.auto_merge,
    )


async def _serve(
    app: FastAPI, server: ApiServer, listeners: Listeners, config: ServerConfig
) -> None:
    """Run the app's lifespan around the servers. Signals end them with exit code 0."""
    services: AppServices = app.state.services
    async with app.router.lifespan_context(app):
        await add_static_adapters(services.adapters, config.static_adapters)
        for number in (signal.SIGTERM, signal.SIGINT):
            # Also what comes before uvicorn listens to them, and what it raises again at its end.
            signal.signal(number, server.handle_exit)
        announcement = asyncio.create_task(
            _announce(server, listeners, config, not services.keyring.is_open)
        )
        async with listening_beside(create_admin_app(app), listeners[1]):
            await server.serve(sockets=[listeners[0]])
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # from here on a second one ends at once
        announcement.cancel()
    _say("stopped")


async def add_static_adapters(service: AdapterService, adapters: Iterable[StaticAdapter]) -> None:
    """Serve the adapters that were given at start.

    Raises: CannotStart.
    """
    for each in adapters:
        try:
            await service.add_static(each.name, each.folder)
        except QuickchangeError as error:
            raise CannotStart(f"{_spelling(each)}: {error}") from error


def _spelling(adapter: StaticAdapter) -> str:
    return f"--adapter {adapter.name}={adapter.folder}"


def bound_exit(seconds: float = EXIT_S) -> None:
    """End this process with code 0 after so long, whatever threads still wait for.

    A store or catalog that does not answer holds a thread, or a device that hangs the engine's, and
    Python would wait for that.
    """
    timer = threading.Timer(seconds, _leave)
    timer.daemon = True
    timer.start()


def _leave() -> None:
    _say("left what did not answer: a store, a catalog or the engine")
    sys.stdout.flush()
    os._exit(0)


async def _announce(
    server: ApiServer, listeners: Listeners, config: ServerConfig, has_keys: bool
) -> None:
    while not server.started:
        await asyncio.sleep(READY_POLL_S)
    seconds = time.time() - psutil.Process().create_time()
    names = [each.name for each in config.static_adapters]
    api, admin = listeners
    _say(ready_text(url_of(api), config.base_name, names, seconds, has_keys=has_keys))
    if admin is not None:
        _say(f"Probes and measurements, without a key: {url_of(admin)}/metrics")


def kernels_text(native_refusal: str | None, amx_refusal: str | None) -> str:
    """Return what is printed about the kernels that compute the steps on a CPU."""
    if native_refusal is None:
        return "Steps: native kernels" + (", products by AMX" if amx_refusal is None else "")
    return f"Steps: PyTorch's kernels, not native ones: {native_refusal}"


def ready_text(
    url: str, base: str, adapters: list[str], seconds: float, *, has_keys: bool = False
) -> str:
    """Return what is printed when the server is ready: what it serves and what to try."""
    key = ' -H "authorization: Bearer $QUICKCHANGE_API_KEY"' if has_keys else ""
    where = "in another terminal" + (", with a key in QUICKCHANGE_API_KEY" if has_keys else "")
    model = adapters[0] if adapters else base
    prompt = "An hour of my life that I will never get back." if adapters else "Hello!"
    message = f'{{"role": "user", "content": "{prompt}"}}'
    body = f'{{"model": "{model}", "max_tokens": 32, "temperature": 0, "messages": [{message}]}}'
    return f"""
Ready after {seconds:.1f} s on {url}: {", ".join([base, *adapters])}

Try {where}:
  curl {url}/v1/models{key}
  curl {url}/v1/chat/completions{key} -H 'content-type: application/json' \\
    -d '{body}'
  {_client_command()} generate {model} "{prompt}" --url {url}
The API's page: {url}/docs    Measurements: {url}/metrics    Stop with Ctrl-C.
"""


def _client_command() -> str:
    """Return how to call the client from here: by name if the shell finds it, else by path."""
    if shutil.which("quickchange"):
        return "quickchange"
    beside = Path(sys.executable).with_name("quickchange")
    return os.path.relpath(beside) if beside.is_relative_to(Path.cwd()) else str(beside)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
