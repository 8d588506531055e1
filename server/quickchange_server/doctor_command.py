"""The command `doctor`: what a server with these settings would see, for people and bug reports.

Looks and changes nothing: no folder, file, table or download is made. Each check stands alone, so
that one that fails hides no other. Secrets are never shown.
"""

import json
import os
import platform
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from quickchange_server.config import OPTIONS, ServerConfig
from quickchange_server.triton_needs import missing_for_triton

State = Literal["ok", "note", "problem"]
PACKAGES = ("torch", "transformers", "peft", "safetensors", "fastapi", "uvicorn", "pydantic")
LEAST_FREE_BYTES = 1 << 30
CREDENTIALS = re.compile(r"//\S*@")
"""Greedy, for passwords may hold slashes and at signs."""
HALF_CREDENTIALS = re.compile(r"[^\s'\"/*]+@")
"""What a driver shows of an address that it took apart in the wrong place."""
SECRET_FIELDS = re.compile(r"(?i)([?&;]\w*(?:password|passwd|secret|token|key)\w*=)[^&;\s]+")


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at: `problem` keeps a server from starting or from serving."""

    what: str
    state: State
    text: str


def examine(config: ServerConfig) -> list[Finding]:
    """Look at everything."""
    checks: list[tuple[str, Callable[[ServerConfig], Iterator[Finding]]]] = [
        ("versions", _versions),
        ("machine", _machine),
        ("device", _device),
        ("kernels", _kernels),
        ("base", _base),
        ("memory", _memory),
        ("store", _store),
        ("catalog", _catalog),
        ("port", _port),
        ("settings", _settings),
    ]
    found: list[Finding] = []
    for what, check in checks:
        try:
            found += check(config)
        except Exception as error:  # one blind spot must not hide the rest
            reason = _masked(f"{type(error).__name__}: {error}".splitlines()[0])
            reason = HALF_CREDENTIALS.sub("***@", reason)
            found.append(Finding(what, "problem", reason))
    return found


def render(findings: list[Finding]) -> str:
    """Return a line for each finding, and how many problems there are."""
    width = max(len(each.what) for each in findings)
    lines = [f"{each.state:<7}  {each.what:<{width}}  {each.text}" for each in findings]
    num_problems = sum(each.state == "problem" for each in findings)
    end = "no problems" if not num_problems else f"{num_problems} problem(s)"
    return "\n".join([*lines, "", end])


def as_json(findings: list[Finding]) -> str:
    """Return the same for machines."""
    return json.dumps({"findings": [asdict(each) for each in findings]}, indent=1)


def _versions(config: ServerConfig) -> Iterator[Finding]:
    from quickchange_server import __version__

    yield Finding("quickchange", "ok", f"{__version__}, Python {platform.python_version()}")
    yield Finding("packages", "ok", ", ".join(f"{name} {_version(name)}" for name in PACKAGES))


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "(no metadata)"


def _machine(config: ServerConfig) -> Iterator[Finding]:
    from quickchange_server.memory_budget import format_bytes
    from quickchange_server.memory_limit import host_memory

    num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    limit = host_memory()
    yield Finding("machine", "ok", f"{platform.platform()}, {num_cores} cores")
    free, total = format_bytes(limit.free_bytes), format_bytes(limit.total_bytes)
    yield Finding("memory", "ok", f"{free} of {total} free ({limit.source})")


def _device(config: ServerConfig) -> Iterator[Finding]:
    import torch

    from quickchange_server.serving import pick_device

    device = pick_device(config.device)
    if device == "cpu":
        yield Finding("device", "ok", f"cpu (torch {torch.__version__}, no GPU in use)")
        return
    free, total = torch.cuda.mem_get_info(device)
    name = torch.cuda.get_device_name(device)
    yield Finding("device", "ok", f"{device}: {name}, {free >> 20} of {total >> 20} MiB free")


def _kernels(config: ServerConfig) -> Iterator[Finding]:
    from quickchange_adapters.native import amx, build

    from quickchange_server.serving import pick_device

    if pick_device(config.device) != "cpu":
        yield triton_finding(config.kernels, missing_for_triton())
        return
    folder = config.cache_folder / "native"
    try:
        build.check_cpu()
        has_amx = config.amx == "auto" and not amx.missing_instructions()
        how = ", with AMX" if has_amx else ""
        if any(folder.glob("quickchange-*.so")):
            yield Finding("kernels", "ok", f"native{how}, built in {folder}")
            return
        compiler = build.find_compiler()
    except build.BuildFailed as error:
        state: State = "problem" if config.kernels == "native" else "note"
        yield Finding("kernels", state, f"PyTorch's on a CPU, not native ones: {error}")
        return
    yield Finding("kernels", "ok", f"native{how}, built at the first start by {compiler}")


def triton_finding(kernels: str, missing: str | None) -> Finding:
    """Return what is to be said of the kernels on a GPU."""
    if kernels != "auto":
        return Finding("kernels", "ok", f"--kernels {kernels}")
    if missing is not None:
        return Finding("kernels", "problem", f"Triton's need {missing}; or use --kernels plain")
    return Finding("kernels", "ok", f"Triton's ({_version('triton')}), compiled at the start")


def _base(config: ServerConfig) -> Iterator[Finding]:
    from quickchange_server.base_footprint import read_footprint
    from quickchange_server.memory_budget import format_bytes

    folder = _folder_of_base(config)
    if folder is None and not _is_fetched(config.model):
        yield Finding("base", "problem", f"--model {config.model}: there is no such folder")
        return
    if folder is None:
        text = f"{config.model} is not on this machine yet: the first start fetches it"
        yield Finding("base", "note", text)
        return
    footprint = read_footprint(folder, config.dtype)
    size = format_bytes(footprint.weight_bytes)
    yield Finding("base", "ok", f"{config.base_name} in {folder}, {size} as it is served")


def _folder_of_base(config: ServerConfig) -> Path | None:
    """Return the base's folder if it is here; nothing is fetched."""
    from quickchange_server.builtin import BUILTIN_PREFIX, builtin_base, builtin_folder

    if config.model.startswith(BUILTIN_PREFIX):
        folder = builtin_folder(builtin_base(config.model), config.cache_folder)
        return folder if folder.is_dir() else None
    folder = Path(config.model).expanduser()
    return folder if folder.is_dir() else None


def _is_fetched(model: str) -> bool:
    """Whether a start would look for a base elsewhere: built in, or on the Hub."""
    from quickchange_server.base_folder import HUB_ID
    from quickchange_server.builtin import BUILTIN_PREFIX

    return model.startswith(BUILTIN_PREFIX) or HUB_ID.fullmatch(model) is not None


def _memory(config: ServerConfig) -> Iterator[Finding]:
    from quickchange_server.base_footprint import read_footprint
    from quickchange_server.memory_budget import resolve_budget
    from quickchange_server.memory_limit import device_memory, host_memory
    from quickchange_server.serving import pick_device

    folder = _folder_of_base(config)
    if folder is None:
        return
    device = pick_device(config.device)
    footprint = read_footprint(folder, config.dtype)
    budget = resolve_budget(config, footprint, device, device_memory(device), host_memory())
    for line in budget.render().splitlines():
        yield Finding("budget", "ok", line.strip())


def _store(config: ServerConfig) -> Iterator[Finding]:
    if config.store_url is not None:
        yield Finding("store", "note", f"{_masked(config.store_url)}: not asked; `fsck` reads it")
        yield _space("store cache", config.store_cache_folder)
        return
    folder = config.store_folder
    nearest = next(each for each in (folder, *folder.absolute().parents) if each.exists())
    if not os.access(nearest, os.W_OK):
        yield Finding("store", "problem", f"{folder}: {nearest} cannot be written")
        return
    yield _space("store", folder)


def _space(what: str, folder: Path) -> Finding:
    nearest = next(each for each in (folder, *folder.absolute().parents) if each.exists())
    free = shutil.disk_usage(nearest).free
    made = "" if folder.exists() else ", made at the start"
    state: State = "ok" if free >= LEAST_FREE_BYTES else "note"
    return Finding(what, state, f"{folder}{made}, {free >> 20} MiB free")


def _catalog(config: ServerConfig) -> Iterator[Finding]:
    from quickchange_adapters.catalog_engine import open_engine
    from sqlalchemy import inspect

    from quickchange_server.storage import sqlite_file

    url = config.catalog_url
    file = sqlite_file(url)
    if file is not None and not file.exists():
        yield Finding("catalog", "ok", f"SQLite {file}, made at the start")
        return
    engine = open_engine(url)
    try:
        num_tables = len(inspect(engine).get_table_names())
    finally:
        engine.dispose()
    yield Finding("catalog", "ok", f"{_masked(url)} answers, {num_tables} tables")


def _port(config: ServerConfig) -> Iterator[Finding]:
    from quickchange_server.errors import CannotStart
    from quickchange_server.listeners import bind

    try:
        bind(config.host, config.port).close()
    except CannotStart as error:
        yield Finding("port", "problem", f"{error}; a server may run already")
        return
    yield Finding("port", "ok", f"{config.host} port {config.port} is free")


def _settings(config: ServerConfig) -> Iterator[Finding]:
    """Show what differs from the defaults, from wherever it was set."""
    for option in OPTIONS.values():
        value = getattr(config, option.name)
        if value != option.default:
            yield Finding("setting", "ok", f"{option.flag} {_masked(str(value))}")


def _masked(text: str) -> str:
    """Return a text without the name and password in any URL, before its host or in its query."""
    return SECRET_FIELDS.sub(r"\1***", CREDENTIALS.sub("//***@", text))


def run(config: ServerConfig, *, is_json: bool) -> bool:
    """Print the findings; return whether there is a problem."""
    findings = examine(config)
    sys.stdout.write((as_json(findings) if is_json else render(findings)) + "\n")
    return any(each.state == "problem" for each in findings)
