"""What a figure was measured on: processor, versions, commit, load. Does not import torch."""

import os
import platform
import subprocess
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TELLING_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "amx_int8")


@dataclass(frozen=True, slots=True)
class Machine:
    """One machine at one time. `load` is the load average at the start: noise, if above zero."""

    cpu: str
    num_cores: int
    cpu_flags: tuple[str, ...]
    memory_gib: float
    gpus: tuple[str, ...]
    versions: dict[str, str]
    commit: str
    date: str
    load: float
    threads: str

    @classmethod
    def here(cls) -> "Machine":
        """Describe this machine now."""
        return cls(
            cpu=_cpu_field("model name") or platform.processor() or platform.machine(),
            num_cores=len(os.sched_getaffinity(0)),
            cpu_flags=tuple(f for f in TELLING_FLAGS if f in _cpu_field("flags").split()),
            memory_gib=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30,
            gpus=_gpus(),
            versions={name: _version(name) for name in ("torch", "transformers", "peft")},
            commit=_commit(),
            date=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
            load=os.getloadavg()[0],
            threads=os.environ.get("OMP_NUM_THREADS", "default"),
        )

    def describe(self) -> str:
        """Return the lines that stand above a table."""
        versions = ", ".join(f"{name} {number}" for name, number in self.versions.items())
        flags = f" ({' '.join(self.cpu_flags)})" if self.cpu_flags else ""
        return "\n".join(
            [
                f"- machine: {self.cpu}, {self.num_cores} cores{flags}, {self.memory_gib:.0f} GiB",
                f"- GPU: {', '.join(self.gpus) or 'none'}",
                f"- versions: Python {platform.python_version()}, {versions}",
                f"- commit {self.commit}, {self.date}, load average at start {self.load:.2f}, "
                f"OMP_NUM_THREADS {self.threads}",
            ]
        )


def _cpu_field(name: str) -> str:
    """Return a field of the first processor, on Linux; empty elsewhere."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    found = (line.partition(":")[2].strip() for line in lines if line.startswith(name))
    return next(found, "")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _gpus() -> tuple[str, ...]:
    return tuple(_output("nvidia-smi", "--query-gpu=name", "--format=csv,noheader").splitlines())


def _commit() -> str:
    commit = _output("git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD") or "unknown"
    is_changed = _output("git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no")
    return commit + (" with changes" if is_changed else "")


def _output(*command: str) -> str:
    """Return what a command prints; empty where it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()
