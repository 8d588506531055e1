"""PEFT's `generate`: peft_baseline.py in an environment of its own, in a process of its own."""

import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.machine import ROOT
from benchmarks.peers.environment import PeerEnvironment
from benchmarks.peers.system import Job, Measured, System
from benchmarks.peers.torch_index import cpu_index
from benchmarks.timing import Figures
from benchmarks.workload import Scenario

# The releases that constraints.txt names, as the server has them; psutil and httpx for the script.
REQUIREMENTS = ("torch", "transformers", "peft", "psutil", "httpx")


class PeftGenerate(System):
    """Static batches without a server: nobody waits in a queue, nothing is parsed or sent."""

    name = "PEFT generate"

    def __init__(self, job: Job, folder: Path) -> None:
        self._job = job
        self._environment = PeerEnvironment(folder / "peft")

    def prepare(self) -> None:
        """Install PEFT into its environment."""
        lines = (ROOT / "constraints.txt").read_text().splitlines()
        pins = [line for line in lines if line.partition("==")[0] in REQUIREMENTS]
        self._environment.install(" ".join(pins), _install)

    def describe(self) -> str:
        """Return versions."""
        versions = (f"{name} {self._environment.version(name)}" for name in REQUIREMENTS[:3])
        return f"{', '.join(versions)}; static batches in the base's dtype, without a server"

    def measure(self, scenarios: Sequence[Scenario]) -> Iterator[Measured]:
        """Load the models, warm up, run each scenario once, end the process."""
        with tempfile.NamedTemporaryFile(suffix=".json") as results:
            self._environment.run(self._command(scenarios, results.name))
            found = json.loads(Path(results.name).read_text())["results"]
        by_label = {each["scenario"]: Figures(**each["runs"][0]) for each in found}
        for scenario in scenarios:
            yield scenario, by_label[scenario.label]

    def _command(self, scenarios: Sequence[Scenario], results: str) -> list[str]:
        work = self._job.work
        options = {
            "--model": self._job.base,
            "--scenarios": ",".join(scenario.label for scenario in scenarios),
            "--prompt-words": work.prompts.num_words,
            "--tokens": work.num_tokens,
            "--rank": self._job.rank,
            "--repeats": 1,
            "--json": results,
        }
        script = str(ROOT / "benchmarks" / "peft_baseline.py")
        words = [str(word) for option in options.items() for word in option]
        return [str(self._environment.python), script, *words]


def _install(environment: PeerEnvironment) -> None:
    constraints = str(ROOT / "constraints.txt")
    environment.make_venv("-c", constraints, *REQUIREMENTS, index=cpu_index())
