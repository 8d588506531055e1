"""Folders that peers are installed into: one each, with a virtual environment of its own.

Nothing is installed into the environment that runs this. What was installed is noted in a file, so
that a second run is instant, and a recipe that changed is installed anew.
"""

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from benchmarks.failure import BenchmarkFailure
from benchmarks.server_process import last_line

INSTALL_TIMEOUT_S = 3600.0
PIP = ("-m", "pip", "--quiet", "--disable-pip-version-check")


class PeerEnvironment:
    """One peer's folder: `venv` in it, whatever else was made for it, and a log of the making."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.python = folder / "venv" / "bin" / "python"

    def install(self, recipe: str, steps: Callable[["PeerEnvironment"], None]) -> None:
        """Make the folder by `steps`, unless it was made by the same recipe before.

        Raises: BenchmarkFailure, with the end of what the failing command printed.
        """
        note = self.folder / "installed.txt"
        if note.is_file() and note.read_text() == recipe:
            return
        print(f"installing into {self.folder}: {recipe}", file=sys.stderr, flush=True)
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        steps(self)
        note.write_text(recipe)

    def make_venv(self, *requirements: str, index: Sequence[str] = ()) -> None:
        """Make the virtual environment, and install into it what is named.

        Raises: BenchmarkFailure.
        """
        self.run([sys.executable, "-m", "venv", str(self.folder / "venv")])
        if requirements:
            self.pip("install", *index, *requirements)

    def pip(self, *arguments: str) -> None:
        """Run the environment's pip.

        Raises: BenchmarkFailure.
        """
        self.run([str(self.python), *PIP, *arguments])

    def run(self, command: Sequence[str], environment: Mapping[str, str] | None = None) -> str:
        """Run a command in the folder, add what it prints to commands.log, and return that.

        Raises: BenchmarkFailure when it fails, is not there, or does not end in an hour.
        """
        try:
            done = subprocess.run(
                command,
                cwd=self.folder,
                env={**os.environ, **(environment or {})},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                timeout=INSTALL_TIMEOUT_S,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise BenchmarkFailure(f"`{_shown(command)} …` failed: {error}") from error
        with (self.folder / "commands.log").open("a") as log:
            log.write(f"$ {shlex.join(command)}\n{done.stdout}\n")
        if done.returncode:
            raise BenchmarkFailure(
                f"`{_shown(command)} …` failed with {done.returncode}: "
                f"{last_line(done.stdout)} (all of it: {self.folder.name}/commands.log)"
            )
        return done.stdout

    def version(self, package: str) -> str:
        """Return the version of a package in the virtual environment."""
        code = f"from importlib.metadata import version; print(version({package!r}))"
        return self.run([str(self.python), "-c", code]).strip()

    def size_gib(self) -> float:
        """Return how much disk the folder takes."""
        files = (path for path in self.folder.rglob("*") if not path.is_symlink())
        return sum(path.stat().st_size for path in files if path.is_file()) / 2**30


def _shown(command: Sequence[str]) -> str:
    """Return the beginning of a command as a table can show it, without the folders."""
    return shlex.join(Path(word).name for word in command[:4])
