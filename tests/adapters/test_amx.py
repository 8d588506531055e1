"""Products by AMX, its instructions in plain C++: exact, row by row, and off where wrong."""

import ctypes
import mmap
from collections.abc import Iterator

import pytest
import torch
from quickchange_adapters.native import amx
from quickchange_adapters.native.amx import use_amx
from quickchange_adapters.native.library import Linear, load_library
from quickchange_adapters.native.weight import NativeInt8Weight, NativeWeight, PackedMemory

from tests.server.engine.native import REASON, needs_native, soft_tiles_library

pytestmark = needs_native
SHAPES = [(32, 32), (96, 64), (381, 96), (1, 32), (70, 576)]
KINDS = [NativeWeight, NativeInt8Weight]
Weight = NativeWeight | NativeInt8Weight


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Iterator[ctypes.CDLL]:
    monkeypatch.setattr(amx, "missing_instructions", frozenset)
    library = soft_tiles_library()
    assert use_amx(library, wanted=True) is None
    yield library
    library.qc_use_tiles(0)


def random_weight(kind: type[Weight], shape: tuple[int, int], library: ctypes.CDLL) -> Weight:
    return kind(torch.randn(shape).bfloat16(), library, PackedMemory())


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_product_is_float32_s_rounded_once(
    kind: type[Weight], shape: tuple[int, int], has_bias: bool, library: ctypes.CDLL
) -> None:
    weight = random_weight(kind, shape, library)
    bias = torch.randn(shape[0]).bfloat16() if has_bias else None
    x = torch.randn(45, shape[1]).bfloat16()
    wanted = x.double() @ weight.dense().double().T
    if bias is not None:
        wanted += bias.double()
    # an int8 matrix's dense form is rounded once more than the one that multiplies
    tolerance = 2**-8 if kind is NativeWeight else 0.02
    torch.testing.assert_close(
        weight.apply(x, bias).double(), wanted, rtol=2**-8, atol=tolerance * shape[1] ** 0.5
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_rows_bits_do_not_depend_on_the_number_of_rows_or_threads(
    kind: type[Weight], library: ctypes.CDLL
) -> None:
    weight = random_weight(kind, (192, 160), library)
    x = torch.randn(64, 160).bfloat16()
    wanted = weight.apply(x, None)
    before = torch.get_num_threads()
    try:
        for num_threads in (1, 2, 3):
            torch.set_num_threads(num_threads)
            for count in range(1, 50, 3):
                assert torch.equal(weight.apply(x[5 : 5 + count], None), wanted[5 : 5 + count])
    finally:
        torch.set_num_threads(before)


def test_each_row_keeps_its_infinity_and_nan(library: ctypes.CDLL) -> None:
    weight = random_weight(NativeWeight, (64, 64), library)
    x = torch.randn(20, 64).bfloat16()
    wanted = weight.apply(x, None)
    for row, bad in ((3, torch.inf), (17, torch.nan)):
        x[row, 9] = bad
    actual = weight.apply(x, None)
    assert not actual[[3, 17]].isfinite().any()
    others = [row for row in range(20) if row not in (3, 17)]
    assert torch.equal(actual[others], wanted[others])


def cancelling(num_inputs: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix and rows whose products are zero but for what sums round, which their order says."""
    half, x = torch.randn(128, num_inputs // 2), torch.randn(16, num_inputs // 2)
    return torch.cat([half, -half], dim=1).bfloat16(), torch.cat([x, x], dim=1).bfloat16()


def test_it_is_amx_that_multiplies_and_odd_inputs_do_without(library: ctypes.CDLL) -> None:
    for num_inputs, is_other in ((576, True), (562, False)):
        matrix, x = cancelling(num_inputs)
        weight = NativeWeight(matrix, library, PackedMemory())
        library.qc_use_tiles(1)
        by_tiles = weight.apply(x, None)
        library.qc_use_tiles(0)
        assert torch.equal(weight.apply(x, None), by_tiles) != is_other


@pytest.mark.parametrize("num_rows", [1, 5, 16, 17, 32, 33])
def test_nothing_is_read_behind_the_last_row(num_rows: int, library: ctypes.CDLL) -> None:
    """Behind x comes a page that nobody may read."""
    weight = random_weight(NativeWeight, (32, 64), library)
    page, num_bytes = mmap.PAGESIZE, num_rows * 64 * 2
    size = -(-num_bytes // page) * page
    memory = mmap.mmap(-1, size + page, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    guard = ctypes.c_void_p(whole.data_ptr() + size)
    assert ctypes.CDLL(None).mprotect(guard, ctypes.c_size_t(page), 0) == 0
    x = whole[size - num_bytes : size].view(torch.bfloat16).view(num_rows, 64)
    x.copy_(torch.randn(num_rows, 64))
    y = torch.empty(num_rows, 32, dtype=torch.bfloat16)
    linear: Linear = weight.describe(None)
    assert library.qc_product(x.data_ptr(), num_rows, linear, 32, 64, y.data_ptr()) == 0
    assert torch.equal(y, weight.apply(x.clone(), None))


def test_it_is_off_where_the_cpu_the_system_or_the_operator_says_so(
    library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch
) -> None:
    matrix, x = cancelling(576)
    weight = NativeWeight(matrix, library, PackedMemory())
    by_tiles = weight.apply(x, None)
    assert use_amx(library, wanted=False) == "it is switched off"
    assert not torch.equal(weight.apply(x, None), by_tiles)
    monkeypatch.setattr(amx, "missing_instructions", lambda: amx.AMX_FLAGS)
    assert use_amx(library, wanted=True) == "the CPU has no amx_bf16, amx_tile"
    assert not torch.equal(weight.apply(x, None), by_tiles)


def test_it_is_off_where_its_products_are_wrong(
    library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    matrix, x = cancelling(576)
    weight = NativeWeight(matrix, library, PackedMemory())
    by_tiles = weight.apply(x, None)
    right = NativeInt8Weight.apply
    calls = 0

    def wrong(self: NativeInt8Weight, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        nonlocal calls
        calls += 1
        y = right(self, x, bias)
        y[-1, -1] += calls == 6  # the last product by tiles
        return y

    monkeypatch.setattr(NativeInt8Weight, "apply", wrong)
    assert use_amx(library, wanted=True) == "its products are wrong on this machine"
    assert "AMX is not used" in caplog.text
    assert not torch.equal(weight.apply(x, None), by_tiles)


class Refusing:
    """A library on a system that gives no right to use the tiles."""

    def qc_use_tiles(self, on: int) -> int:
        return on


def test_a_system_that_does_not_allow_it_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(amx, "missing_instructions", frozenset)
    refusal = use_amx(Refusing(), wanted=True)  # type: ignore[arg-type]
    assert refusal is not None
    assert "the system does not allow it" in refusal


@pytest.mark.skipif(
    REASON is not None or bool(amx.missing_instructions()), reason="this CPU has no AMX"
)
@pytest.mark.parametrize("kind", KINDS)
def test_the_processor_s_instructions_give_the_same_bits(
    kind: type[Weight], library: ctypes.CDLL
) -> None:
    matrix, x = torch.randn(381, 576).bfloat16(), torch.randn(45, 576).bfloat16()
    real = load_library()
    assert use_amx(real, wanted=True) is None
    try:
        for count in (1, 16, 45):
            wanted = kind(matrix, library, PackedMemory()).apply(x[:count], None)
            assert torch.equal(kind(matrix, real, PackedMemory()).apply(x[:count], None), wanted)
    finally:
        real.qc_use_tiles(0)
