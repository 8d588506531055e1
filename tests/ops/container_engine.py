"""Builds the project's image with buildah and runs it with podman, in a storage under .ops.

No registry of images is asked: Debian's Python stands in for the official image, unless that is in
the storage already. pip's settings on this machine reach the build as mounts; no layer has them.
"""

import ast
import json
import os
import resource
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from benchmarks.machine import ROOT
from tests.ops.environments import OPS, NotHere

TOOLS = ("buildah", "podman", "runc", "mmdebstrap")
BUILD_S, RUN_S = 1800, 300
OFFICIAL = "docker.io/library/python:{version}-slim-bookworm"
DEBIAN_PYTHON = "3.11"
LIKE_OFFICIAL = """
ln -s python3 /usr/bin/python
echo 'Dir::Cache::pkgcache ""; Dir::Cache::srcpkgcache "";' > /etc/apt/apt.conf.d/docker-clean
"""
RESTRICTED = (
    *("--read-only", "--read-only-tmpfs=false", "--tmpfs=/tmp", "--cap-drop=ALL"),
    *("--security-opt=no-new-privileges", "--user=10001:10001"),
)
"""As the chart has it."""


class ContainerEngine:
    """buildah and podman. Needs root; isolation of builds is a chroot, of runs namespaces."""

    def __init__(self, folder: Path = OPS / "images") -> None:
        missing = [tool for tool in TOOLS if shutil.which(tool) is None]
        if missing:
            raise NotHere(f"no {', '.join(missing)}; on Debian: apt-get install {' '.join(TOOLS)}")
        if os.geteuid() != 0:
            raise NotHere("the images are built and run as root")
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._storage = [f"--root={folder / 'storage'}", f"--runroot={folder / 'run'}"]

    def build(self, name: str, **arguments: object) -> str:
        """Build the Dockerfile; return the image's name."""
        given = {"PYTHON": self._python, "TORCH_CPU_INDEX": torch_index(), **arguments}
        words = [f"--build-arg={key}={value}" for key, value in given.items() if value]
        words += [f"--volume={each}:{each}:ro" for each in pip_paths()]
        conf = self.folder / "pip.conf"
        conf.write_text("[global]\n" + "".join(f"{k} = {v}\n" for k, v in pip_settings().items()))
        words += [f"--volume={conf}:/etc/pip.conf:ro", "--isolation=chroot", "--pull-never"]
        words += ["--format=docker", "--layers", f"--tag={name}", str(ROOT)]
        self._buildah("build", *words)
        return f"localhost/{name}:latest"

    def inspect(self, image: str) -> Any:
        """Return what is known of an image."""
        return json.loads(self.podman("image", "inspect", image))[0]

    def podman(self, *words: str, errors: int = subprocess.PIPE) -> str:
        """Run podman; return what it prints. Raises: RuntimeError with what it said."""
        runtime = ["--runtime=runc", "--cgroup-manager=cgroupfs"]
        return output(["podman", *self._storage, *runtime, *words], RUN_S, errors)

    @contextmanager
    def running(
        self, image: str, *options: str, command: tuple[str, ...] = ()
    ) -> Iterator["Container"]:
        """Give a container of the image, with the host's loopback; kill and remove it."""
        bounds = [f"--ulimit={name}={most}:{most}" for name, most in limits().items()]
        words = ["--detach", "--network=host", "--no-healthcheck", *bounds, *options]
        container = Container(self, self.podman("run", *words, image, *command).strip())
        try:
            yield container
        finally:
            self.podman("rm", "--force", "--time=0", container.id)

    def remove_built(self) -> None:
        """Take what was built out of the storage, which is gigabytes; Python's image stays."""
        named = self._buildah("images", "--format={{.Name}}:{{.Tag}}").split()
        ours = [name for name in named if name.startswith("localhost/")]
        self._buildah("rmi", "--force", *ours)
        self._buildah("rmi", "--prune", "--force")

    def _buildah(self, *words: str) -> str:
        return output(["buildah", *self._storage, *words], BUILD_S)

    @cached_property
    def _python(self) -> str:
        """The version of Python whose image is in the storage; Debian's, made here, if none is."""
        names = self._buildah("images", "--format={{.Name}}:{{.Tag}}").split()
        for version in ("3.12", DEBIAN_PYTHON):
            if OFFICIAL.format(version=version) in names:
                return version
        self._make_stand_in()
        return DEBIAN_PYTHON

    def _make_stand_in(self) -> None:
        archive = self.folder / "debian.tar"
        packages = "--include=python3,python3-venv,python3-pip,ca-certificates"
        output(["mmdebstrap", "--variant=minbase", packages, "bookworm", str(archive)], BUILD_S)
        made = self._buildah("from", "scratch").strip()
        self._buildah("add", "--quiet", made, str(archive), "/")
        self._buildah("run", "--isolation=chroot", made, "--", "sh", "-ec", LIKE_OFFICIAL)
        self._buildah("commit", "--rm", "--quiet", made, OFFICIAL.format(version=DEBIAN_PYTHON))
        archive.unlink()


class Container:
    """One that runs, or has run."""

    def __init__(self, engine: ContainerEngine, identity: str) -> None:
        self._engine = engine
        self.id = identity

    def execute(self, *words: str) -> str:
        """Run a command inside; return what it prints. Raises: RuntimeError."""
        return self._engine.podman("exec", self.id, *words)

    def logs(self) -> str:
        """Return what its process printed."""
        return self._engine.podman("logs", self.id, errors=subprocess.STDOUT)

    def is_running(self) -> bool:
        """Whether its process is there."""
        state = self._engine.podman("container", "inspect", "--format={{.State.Running}}", self.id)
        return state.strip() == "true"

    def stop(self, grace_s: int) -> int:
        """Send the image's signal to stop; return the exit code, 137 after a kill."""
        self._engine.podman("stop", f"--time={grace_s}", self.id)
        return int(self._engine.podman("wait", self.id))

    def changes(self) -> set[str]:
        """Return the files and folders that differ from the image's, mounts left out."""
        lines = self._engine.podman("diff", self.id).splitlines()
        return {line.split(maxsplit=1)[1] for line in lines}


def output(command: list[str], timeout_s: float, errors: int = subprocess.PIPE) -> str:
    """Run a command to its end; return what it prints. Raises: RuntimeError with all of it."""
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=errors, text=True, timeout=timeout_s
    )
    if done.returncode != 0:
        words = f"{done.stdout[-3000:]}{(done.stderr or '')[-3000:]}"
        raise RuntimeError(f"{' '.join(command)[:300]}: exit code {done.returncode}\n{words}")
    return done.stdout


def pip_settings() -> dict[str, str]:
    """Return pip's settings on this machine, whether from files or from the environment."""
    lines = output(["python3", "-m", "pip", "config", "list"], 60).splitlines()
    pairs = (line.partition("=") for line in lines)
    return {name.rpartition(".")[2]: ast.literal_eval(value) for name, _, value in pairs}


def pip_paths() -> list[str]:
    """Return the files and folders of this machine that pip's settings name.

    The pages of an index on disk refer to files beside the index.
    """
    words = " ".join(pip_settings().values()).replace("file://", "").split()
    named = {Path(word) for word in words if word.startswith("/")}
    found = {path.parent if path.name == "simple" else path for path in named if path.exists()}
    return sorted(str(path) for path in found)


def torch_index() -> str:
    """Return where builds for CPUs come from: nowhere, if this machine has the wheel."""
    folders = [Path(word) for word in pip_settings().get("find-links", "").split()]
    is_here = any(folder.is_dir() and any(folder.glob("torch-*")) for folder in folders)
    return os.environ.get("TORCH_CPU_INDEX", "file:///nowhere" if is_here else "")


def limits() -> dict[str, int]:
    """Return limits well below those of this process: podman's own may be above them."""
    wanted = {"nofile": resource.RLIMIT_NOFILE, "nproc": resource.RLIMIT_NPROC}
    return {name: min(4096, resource.getrlimit(number)[1]) for name, number in wanted.items()}
