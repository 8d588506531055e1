"""What imports what: server -> adapters -> libraries; the client stands alone, without torch."""

import ast
import subprocess
import sys
import tomllib
from importlib.metadata import EntryPoint, entry_points, requires
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OURS = {"quickchange_server", "quickchange_adapters", "quickchange_client"}
PACKAGES = {
    "quickchange_server": ROOT / "server",
    "quickchange_adapters": ROOT / "adapters",
    "quickchange_client": ROOT / "clients/python",
}
MAY_IMPORT: dict[str, set[str]] = {
    "quickchange_server": {"quickchange_adapters"},
    "quickchange_adapters": set(),
    "quickchange_client": set(),
}
CLIENT_LIBRARIES = {"anyio", "httpx", "pydantic", "typer", "rich"}


def imports_of(package: str) -> dict[str, set[str]]:
    """Return each module file of a package with the top-level names that it imports."""
    return {
        str(file.relative_to(ROOT)): _imported_names(ast.parse(file.read_text(encoding="utf-8")))
        for file in (PACKAGES[package] / package).rglob("*.py")
    }


def _imported_names(tree: ast.Module) -> set[str]:
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.partition(".")[0])
    return names


def dependencies_of(folder: Path) -> set[str]:
    """Return the names of what a distribution requires."""
    project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
    signs = "<>=!~[ ;"
    return {
        name[: min((name.find(sign) for sign in signs if sign in name), default=len(name))]
        for name in project["dependencies"]
    }


@pytest.mark.parametrize("package", sorted(OURS))
def test_imports_go_one_way(package: str) -> None:
    modules = imports_of(package)
    assert modules
    allowed = MAY_IMPORT[package] | {package}
    wrong = {file: names & OURS - allowed for file, names in modules.items()}
    assert {file: names for file, names in wrong.items() if names} == {}


def test_client_imports_only_the_libraries_it_declares() -> None:
    assert dependencies_of(PACKAGES["quickchange_client"]) == CLIENT_LIBRARIES
    allowed = CLIENT_LIBRARIES | {"quickchange_client"} | sys.stdlib_module_names
    wrong = {file: names - allowed for file, names in imports_of("quickchange_client").items()}
    assert {file: names for file, names in wrong.items() if names} == {}


def brought_by(name: str) -> set[str]:
    """Return all that is installed with a distribution, by what the metadata of each requires."""
    from packaging.requirements import Requirement

    found: set[str] = set()
    waiting = [name]
    while waiting:
        found.add(current := _plain(waiting.pop()))
        wanted = [Requirement(line) for line in requires(current) or ()]
        named = [
            each.name for each in wanted if not each.marker or each.marker.evaluate({"extra": ""})
        ]
        waiting += [each for each in named if _plain(each) not in found]
    return found


def test_the_client_brings_little_and_nothing_heavy() -> None:
    brought = brought_by("quickchange-client")
    assert brought >= CLIENT_LIBRARIES
    assert brought.isdisjoint({"torch", "numpy", "transformers", "quickchange-server"})
    assert len(brought) <= 24
    assert "torch" in brought_by("quickchange-server")


def test_client_loads_without_torch() -> None:
    program = "import sys, quickchange_client; print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("folder", ["server", "adapters", "clients"])
def test_top_folders_are_no_packages(folder: str) -> None:
    assert not (ROOT / folder / "__init__.py").exists()


def test_server_adds_its_commands_to_the_client_s() -> None:
    added = {each.name: each.load() for each in entry_points(group="quickchange.commands")}
    assert {"serve", "base"} <= set(added)


def test_every_command_that_is_declared_can_be_loaded() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = project["entry-points"]["quickchange.commands"]
    assert {"serve", "base", "fsck", "export"} <= set(declared)
    assert all(EntryPoint(name, value, "").load() for name, value in declared.items())


def test_exact_versions_satisfy_the_ranges() -> None:
    from packaging.requirements import Requirement

    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {
        _plain(each.name): str(each.specifier).removeprefix("==")
        for each in (Requirement(line) for line in lines if line and not line.startswith("#"))
    }
    groups = [
        tomllib.loads((folder / "pyproject.toml").read_text())
        for folder in (ROOT, PACKAGES["quickchange_client"])
    ]
    wanted = [line for group in groups for line in group["project"]["dependencies"]]
    wanted += groups[0]["dependency-groups"]["dev"]
    for requirement in map(Requirement, wanted):
        assert requirement.specifier.contains(pinned[_plain(requirement.name)]), requirement


def _plain(name: str) -> str:
    return name.lower().replace("_", "-")


def test_no_file_has_marks_of_a_merge_that_was_not_finished() -> None:
    marks = ["<" * 7 + " ", ">" * 7 + " "]
    patterns = [word for mark in marks for word in ("-e", f"^{mark}")]
    done = subprocess.run(
        ["git", "grep", "-n", *patterns], cwd=ROOT, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (1, "")


def test_the_image_for_gpus_has_the_compiler_that_triton_needs() -> None:
    stage = (ROOT / "Dockerfile").read_text().split("\nFROM ")[-1]
    assert "\nARG DEVICE=" in stage
    assert 'if [ "$DEVICE" = cuda ]; then set -- gcc libc6-dev; fi;' in stage
    assert '--no-install-recommends libgomp1 "$@"' in stage


def test_the_image_s_libraries_are_what_both_distributions_need() -> None:
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith("RUN python tools/requirements.py"))
    words = line.removeprefix("RUN python ").partition(" >")[0].split()
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for folder in (ROOT, ROOT / "clients/python"):
        project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
        assert set(project["dependencies"]) <= set(done.stdout.splitlines())
    assert any(each.startswith("s3fs") for each in done.stdout.splitlines())
    wrong = [sys.executable, words[0], "no-such-extra"]
    assert subprocess.run(wrong, cwd=ROOT, capture_output=True).returncode != 0
