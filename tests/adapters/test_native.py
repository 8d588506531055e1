"""The native library: built safely, exact to pack and unpack, and a row's bits its own."""

import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from quickchange_adapters.native import build
from quickchange_adapters.native.build import BuildFailed, library_path
from quickchange_adapters.native.library import highest_of_rows, load_library
from quickchange_adapters.native.weight import NativeInt8Weight, NativeWeight, PackedMemory
from quickchange_adapters.ops.int8_weight import Int8Weight, quantise

from tests.server.engine.native import needs_native

SHAPES = [(32, 2), (96, 64), (381, 64), (1, 32), (70, 576)]


def build_by(compiler: str, cache: Path) -> subprocess.CompletedProcess[str]:
    """Build the library into a cache folder's `native/`, as an install does."""
    environment = {**os.environ, "QUICKCHANGE_CACHE": str(cache), "CXX": compiler}
    command = [sys.executable, "-m", "quickchange_adapters.native"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def script_in(folder: Path, text: str) -> str:
    """Write a compiler that is a shell script; return its path."""
    path = folder / "compiler"
    path.write_text(f"#!/bin/sh\n{text}")
    path.chmod(0o755)
    return str(path)


def native_weight(weight: torch.Tensor) -> NativeWeight:
    return NativeWeight(weight, load_library(), PackedMemory())


@needs_native
@pytest.mark.parametrize(("num_outputs", "num_inputs"), SHAPES)
def test_a_matrix_unpacks_to_its_very_bits(num_outputs: int, num_inputs: int) -> None:
    weight = torch.randn(num_outputs, num_inputs).bfloat16()
    weight[0, 0] = float("inf")
    packed = native_weight(weight)
    assert torch.equal(packed.dense(), weight)
    assert packed.num_bytes == -(-num_outputs // 32) * 32 * num_inputs * 2


@needs_native
def test_a_matrix_that_lies_across_its_memory_is_packed_as_it_reads() -> None:
    weight = torch.randn(1024, 2048).bfloat16().t()  # large: memory given back is gone at once
    assert torch.equal(native_weight(weight).dense(), weight)


@needs_native
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize(("num_outputs", "num_inputs"), SHAPES)
def test_a_product_is_float32_s_rounded_once(
    num_outputs: int, num_inputs: int, has_bias: bool
) -> None:
    weight = torch.randn(num_outputs, num_inputs).bfloat16()
    bias = torch.randn(num_outputs).bfloat16() if has_bias else None
    x = torch.randn(29, num_inputs).bfloat16()
    wanted = x.double() @ weight.double().T
    if bias is not None:
        wanted += bias.double()
    actual = native_weight(weight).apply(x, bias)
    torch.testing.assert_close(actual.double(), wanted, rtol=2**-8, atol=1e-4 * num_inputs**0.5)


@needs_native
@pytest.mark.parametrize(("num_outputs", "num_inputs"), SHAPES)
def test_int8_is_what_its_numbers_stand_for_whatever_the_number_of_rows(
    num_outputs: int, num_inputs: int
) -> None:
    weight = torch.randn(num_outputs, num_inputs).bfloat16()
    weight[0] = 0
    bias = torch.randn(num_outputs).bfloat16()
    native = NativeInt8Weight(weight, load_library(), PackedMemory())
    portable = Int8Weight(weight)
    assert torch.equal(native.dense(), portable.dense())
    numbers, scales = quantise(weight)
    error = (numbers.float() * scales[:, None] - weight.float()).abs()
    assert (error <= 0.5001 * scales[:, None]).all()
    x = torch.randn(29, num_inputs).bfloat16()
    wanted = native.apply(x, bias)
    torch.testing.assert_close(wanted, portable.apply(x, bias), rtol=2**-7, atol=1e-3)
    for count in (1, 2, 3, 4, 5, 12, 13):
        assert torch.equal(native.apply(x[:count], bias), wanted[:count])
    assert native.num_bytes < 0.7 * native_weight(weight).num_bytes + 512


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_quantising_leaves_the_matrix_alone_and_zero_rows_and_nan_as_they_are(
    dtype: torch.dtype,
) -> None:
    weight = torch.randn(150, 6).to(dtype)
    weight[70] = 0
    weight[140, 3] = float("nan")
    before = weight.clone()
    quantised = Int8Weight(weight).dense()
    assert torch.equal(weight.nan_to_num(9), before.nan_to_num(9))
    assert not quantised[70].any()
    assert quantised[140].isnan().all()
    sound = torch.tensor([*range(140), *range(141, 150)])
    largest = weight[sound].abs().amax(dim=1, keepdim=True)
    assert ((quantised - weight)[sound].abs() <= largest / 100).all()


@needs_native
def test_a_rows_bits_do_not_depend_on_the_number_of_rows_or_threads() -> None:
    weight, x = torch.randn(192, 576).bfloat16(), torch.randn(64, 576).bfloat16()
    packed = native_weight(weight)
    wanted = packed.apply(x, None)
    before = torch.get_num_threads()
    try:
        for num_threads in (1, 2, 3):
            torch.set_num_threads(num_threads)
            for count in range(1, 30):
                assert torch.equal(packed.apply(x[5 : 5 + count], None), wanted[5 : 5 + count])
    finally:
        torch.set_num_threads(before)


@needs_native
@needs_native
@pytest.mark.parametrize("num_columns", [1, 15, 16, 17, 1000])
def test_the_highest_number_of_a_row_is_pytorch_s(num_columns: int) -> None:
    generator = torch.Generator().manual_seed(num_columns)
    # few different numbers, so that the highest comes more than once
    rows = torch.randint(-3, 4, (9, num_columns), generator=generator).float()
    rows[5] = -torch.inf
    rows[6, -1] = torch.inf
    rows[7, num_columns // 2] = torch.nan
    rows[8, -1] = torch.nan
    rows[8, 0] = torch.inf if num_columns > 1 else torch.nan
    highest, places = highest_of_rows(load_library(), rows)
    assert highest[:7] == rows[:7].amax(dim=1).tolist()
    assert places[:7] == [row.index(max(row)) for row in rows[:7].tolist()]
    assert all(math.isnan(each) for each in highest[7:])
    assert places[7:] == [0, 0]


def test_two_builders_at_once_leave_one_whole_library(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "quickchange_adapters.native"]
    environment = {**os.environ, "QUICKCHANGE_CACHE": str(tmp_path)}
    running = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    paths = {each.communicate()[0].strip() for each in running}
    assert [each.returncode for each in running] == [0, 0]
    assert paths == {str(path) for path in (tmp_path / "native").iterdir()}


@needs_native
def test_a_library_that_others_could_have_written_is_not_loaded(tmp_path: Path) -> None:
    path = library_path()
    folder = tmp_path / "native"
    folder.mkdir(mode=0o700)
    copy = folder / path.name
    copy.write_bytes(path.read_bytes())
    copy.chmod(0o722)
    with pytest.raises(BuildFailed, match="can be written by others"):
        library_path(folder)
    copy.chmod(0o700)
    assert library_path(folder) == copy
    folder.chmod(0o777)
    with pytest.raises(BuildFailed, match="can be written by others"):
        library_path(folder)


@needs_native
def test_a_library_that_is_there_needs_no_compiler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(library_path(), tmp_path)
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert library_path(tmp_path).parent == tmp_path
    with pytest.raises(BuildFailed, match="no-such-compiler"):
        library_path(tmp_path / "empty")


@needs_native
@pytest.mark.parametrize("compiler", ["no-such-compiler", "false"])
def test_without_a_working_compiler_the_reason_is_said(tmp_path: Path, compiler: str) -> None:
    done = build_by(compiler, tmp_path)
    assert done.returncode == 1
    assert "no native kernels here" in done.stderr
    assert compiler in done.stderr
    assert not list(tmp_path.rglob("*.so"))


@needs_native
def test_an_assembler_that_does_not_know_amx_gives_a_library_without_it(tmp_path: Path) -> None:
    script = f"""
        case "$*" in *-c*WITHOUT_AMX*|*-shared*) exec {build.find_compiler()} "$@";; esac
        echo 'Error: no such instruction: ldtilecfg' >&2; exit 1
    """
    done = build_by(script_in(tmp_path, script), tmp_path)
    assert done.returncode == 0
    assert "without AMX" in done.stderr
    assert "no such instruction: ldtilecfg" in done.stderr
    assert str(tmp_path / "native") in done.stderr
    library = load_library.__wrapped__(tmp_path / "native")
    assert library.qc_use_tiles(1) == 1
    x = torch.randn(3, 64).bfloat16()
    matrix = torch.randn(40, 64).bfloat16()
    actual = NativeWeight(matrix, library, PackedMemory()).apply(x, None)
    assert torch.equal(actual, native_weight(matrix).apply(x, None))


@needs_native
def test_a_compiler_that_fails_for_another_reason_leaves_nothing(tmp_path: Path) -> None:
    script = f"""
        [ -e {tmp_path}/once ] && exec {build.find_compiler()} "$@"; touch {tmp_path}/once
        echo 'fatal error: Killed signal terminated program cc1plus' >&2; exit 1
    """
    done = build_by(script_in(tmp_path, script), tmp_path)
    assert done.returncode == 1
    assert "Killed signal" in done.stderr
    assert not list(tmp_path.rglob("*.so"))


@needs_native
@pytest.mark.parametrize(
    ("cache", "reason"),
    [("~no-such-user/cache", "has no place"), ("/tmp/" + "x" * 300, "cannot be kept in")],
)
def test_a_cache_that_cannot_be_used_is_a_reason_not_a_crash(
    cache: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QUICKCHANGE_CACHE", cache)
    with pytest.raises(BuildFailed, match=f"{reason}.*QUICKCHANGE_CACHE"):
        library_path()


@needs_native
def test_what_a_killed_builder_left_goes_and_a_build_is_announced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    abandoned, running = tmp_path / "build-old", tmp_path / "build-new"
    for folder in (abandoned, running):
        folder.mkdir()
        (folder / "library.o").touch()
    os.utime(abandoned, (0, 0))
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(BuildFailed, match="false"):
        library_path(tmp_path)
    assert list(tmp_path.iterdir()) == [running]
    assert "compiling the native kernels" in caplog.text


def test_the_openmp_runtime_is_found_in_a_folder_with_a_space(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    maps = "7f00-7f01 r-xp 00000000 08:01 42    /srv/my venv/lib/libgomp-a34b.so.1.0.0\n"
    monkeypatch.setattr(Path, "read_text", lambda path: maps)
    assert build.openmp_runtime() == Path("/srv/my venv/lib/libgomp-a34b.so.1.0.0")


def test_the_builder_needs_no_torch() -> None:
    code = "import sys, quickchange_adapters.native.__main__; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_source_is_part_of_the_fingerprint() -> None:
    folder = Path(build.__file__).parent
    sources = {path.name for path in folder.iterdir() if path.suffix in (".h", ".cpp")}
    assert sources == {*build.SOURCES, build.MAIN_SOURCE}
