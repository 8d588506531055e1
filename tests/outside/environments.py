"""An environment of its own for each suite, under `.outside/`: the newest client as PyPI has it."""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / ".outside"
INSTALL_S = 1800


class CannotInstall(Exception):
    """A client cannot be installed here; the message is pip's reason."""


@dataclass(frozen=True)
class Suite:
    """One client of other people's, and what runs it.

    `has_torch`: the environment sees the packages of the Python that runs this, whose torch it
    needs; what the client itself brings wins.
    """

    name: str
    packages: tuple[str, ...]
    has_torch: bool = False

    @property
    def file(self) -> Path:
        """The tests."""
        return Path(__file__).with_name(f"{self.name.replace('-', '_')}_suite.py")

    @property
    def python(self) -> Path:
        """The environment's interpreter."""
        return FOLDER / self.name / "bin" / "python"

    @property
    def client(self) -> str:
        """The distribution that is tested."""
        return self.packages[0].partition("[")[0]


SUITES = (
    Suite("openai", ("openai",)),
    Suite("langchain", ("langchain-openai",)),
    Suite("lorax", ("lorax-client",)),
    Suite("text-generation", ("text-generation",)),
    Suite("lm-eval", ("lm-eval[api,hf]",), has_torch=True),
    Suite("schemathesis", ("schemathesis",)),
    Suite("mlflow", ("mlflow",), has_torch=True),
)


def make_environment(suite: Suite) -> str:
    """Make or renew a suite's environment; return the version of its client.

    Raises: CannotInstall.
    """
    folder = FOLDER / suite.name
    if not suite.python.exists():
        _run([sys.executable, "-m", "venv", str(folder)])
        if suite.has_torch:
            (here,) = (folder / "lib").glob("python*/site-packages")
            mine = next(path for path in sys.path if path.endswith("site-packages"))
            (here / "zz-torch.pth").write_text(f"{mine}\n", encoding="utf-8")
    pip = [str(suite.python), "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    _run([*pip, "--upgrade", *suite.packages, "pytest"])
    return version_of(suite)


def version_of(suite: Suite) -> str:
    """Return the version of the client that is installed."""
    program = f"from importlib.metadata import version; print(version({suite.client!r}))"
    return _run([str(suite.python), "-c", program]).strip()


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=INSTALL_S)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise CannotInstall(next((line for line in lines if "ERROR" in line), lines[-1]))
    return done.stdout
