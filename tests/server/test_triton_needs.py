"""What a GPU's kernels need beside the GPU is looked for before seconds go into loading a base."""

import os
from pathlib import Path

import pytest
from quickchange_server.config import load_config
from quickchange_server.doctor_command import triton_finding
from quickchange_server.errors import ConfigInvalid
from quickchange_server.serving import check_triton
from quickchange_server.triton_needs import missing_for_triton


@pytest.fixture
def machine(tmp_path: Path) -> dict[str, str]:
    """Return the environment of a machine that has a compiler and headers, and an empty cache."""
    (tmp_path / "bin").mkdir()
    compiler = tmp_path / "bin" / "gcc"
    compiler.write_text("#!/bin/sh\n")
    compiler.chmod(0o755)
    (tmp_path / "include").mkdir()
    (tmp_path / "include" / "Python.h").touch()
    return {"PATH": str(tmp_path / "bin"), "TRITON_HOME": str(tmp_path)}


def test_a_compiler_and_headers_are_enough(tmp_path: Path, machine: dict[str, str]) -> None:
    assert missing_for_triton(machine, tmp_path / "include") is None


def test_what_is_missing_is_named(tmp_path: Path, machine: dict[str, str]) -> None:
    assert "python3-dev" in (missing_for_triton(machine, tmp_path / "bin") or "")
    elsewhere = {**machine, "CPATH": f"/nowhere{os.pathsep}{tmp_path / 'include'}"}
    assert missing_for_triton(elsewhere, tmp_path / "bin") is None
    nowhere = {**machine, "PATH": str(tmp_path / "include")}
    assert "gcc" in (missing_for_triton(nowhere, tmp_path / "include") or "")
    assert missing_for_triton({**nowhere, "CC": "cc"}, tmp_path / "include") is None


@pytest.mark.parametrize("variable", ["TRITON_HOME", "TRITON_CACHE_DIR"])
def test_what_was_compiled_before_needs_no_compiler(tmp_path: Path, variable: str) -> None:
    folder = tmp_path / "cache" if variable == "TRITON_CACHE_DIR" else tmp_path / ".triton/cache"
    environment = {"PATH": str(tmp_path), variable: str(tmp_path / "cache")}
    if variable == "TRITON_HOME":
        environment[variable] = str(tmp_path)
    assert missing_for_triton(environment, tmp_path) is not None
    (folder / "KEY").mkdir(parents=True)
    (folder / "KEY" / "cuda_utils.cpython-312-x86_64-linux-gnu.so").touch()
    assert missing_for_triton(environment, tmp_path) is None


def test_a_start_without_it_is_refused_unless_other_kernels_were_asked_for() -> None:
    with pytest.raises(ConfigInvalid, match=r"need a compiler .*--kernels plain"):
        check_triton(load_config({}), "a compiler")
    check_triton(load_config({}), None)
    check_triton(load_config({"kernels": "plain"}), "a compiler")


def test_doctor_says_so() -> None:
    assert triton_finding("auto", "a compiler").state == "problem"
    assert triton_finding("auto", None).state == "ok"
    assert triton_finding("plain", "a compiler").state == "ok"
