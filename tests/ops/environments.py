"""Heavy tools for `make test-ops`, each in a folder of its own under .ops. Nothing needs root.

A tool that cannot be had raises NotHere with the reason; its tests are skipped, and counted.
"""

import fcntl
import shutil
import subprocess
import sys
from pathlib import Path

from benchmarks.machine import ROOT

OPS = ROOT / ".ops"
HELM_ENGINE = ("helm", "helm-python-sdk==0.2.2", "kubernetes-validate==1.37.0", "pyyaml==6.0.3")
"""The environment in which `chart_engine.py` runs: its name, then its packages."""
DOWNLOAD_S = 600


class NotHere(Exception):
    """A tool cannot be had on this machine."""


def debian_package(name: str, binary: str, ops: Path = OPS) -> Path:
    """Return the folder with a package's `binary`: the system's own, or unpacked under .ops.

    Raises: NotHere.
    """
    installed = shutil.which(binary)
    if installed is not None:
        return Path(installed).parent
    folder = ops / name
    if not (folder / "usr/bin" / binary).exists():
        _unpack(name, folder, ops / "packages")
    if not (folder / "usr/bin" / binary).exists():
        raise NotHere(f"Debian's package {name} has no {binary}")
    return folder / "usr/bin"


def python_beside(name: str, package: str, ops: Path = OPS) -> Path:
    """Return the Python of an environment that has what this one has, and `package`.

    What is here is not fetched again, and the pins of constraints.txt hold there too.

    Raises: NotHere.
    """
    folder = ops / name
    python = folder / "bin" / "python"
    if (folder / "complete").exists():
        return python
    shutil.rmtree(folder, ignore_errors=True)
    ours = next(path for path in sys.path if path.endswith("site-packages"))
    installing = [str(python), "-m", "pip", "install", "-q", "-c", str(ROOT / "constraints.txt")]
    trouble = _run([sys.executable, "-m", "venv", str(folder)], ROOT)
    if not trouble:
        theirs = next(folder.glob("lib/python*/site-packages"))
        (theirs / "beside.pth").write_text(f"import site; site.addsitedir({ours!r})\n")
        trouble = _run([*installing, package], ROOT)
    if trouble:
        raise NotHere(f"pip install {package}: {trouble}")
    (folder / "complete").touch()
    return python


def _unpack(name: str, folder: Path, packages: Path) -> None:
    for tool in ("apt-get", "dpkg"):
        if shutil.which(tool) is None:
            raise NotHere(f"{name} comes as a Debian package, and there is no {tool}")
    packages.mkdir(parents=True, exist_ok=True)
    download = ["apt-get", "download", name]
    if _run(download, packages):
        _run(["apt-get", "update"], packages)  # the list of packages may be old, or not there yet
        trouble = _run(download, packages)
        if trouble:
            raise NotHere(f"apt-get download {name}: {trouble}")
    package = max(packages.glob(f"{name}_*.deb"), key=lambda file: file.stat().st_mtime)
    trouble = _run(["dpkg", "-x", str(package), str(folder)], packages)
    if trouble:
        raise NotHere(f"dpkg -x {package.name}: {trouble}")


def _run(command: list[str], folder: Path) -> str:
    """Return the last line of what went wrong; nothing if it went well."""
    try:
        done = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, timeout=DOWNLOAD_S
        )
    except subprocess.TimeoutExpired:
        return f"no end within {DOWNLOAD_S} s"
    lines = done.stderr.strip().splitlines() or ["it failed and said nothing"]
    return lines[-1] if done.returncode else ""


def python_environment(
    name: str, *packages: str, pins: Path | None = None, ops: Path = OPS
) -> Path:
    """Return the interpreter of an environment under .ops that has these packages.

    It is built once, also when several processes ask at the same moment. `pins` is a file of
    constraints for what the packages bring along.

    Raises: NotHere.
    """
    folder = ops / name
    python = folder / "bin" / "python"
    stamp = folder / "packages"
    wanted = "\n".join([*packages, pins.read_text() if pins else ""])
    ops.mkdir(parents=True, exist_ok=True)
    with (ops / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if stamp.is_file() and stamp.read_text() == wanted:
            return python
        held = ["-c", str(pins)] if pins else []
        for command in (
            [sys.executable, "-m", "venv", "--clear", str(folder)],
            [str(python), "-m", "pip", "install", "--quiet", *held, *packages],
        ):
            trouble = _run(command, ops)
            if trouble:
                raise NotHere(f"{' '.join(packages)}: {trouble}")
        stamp.write_text(wanted)
    return python
