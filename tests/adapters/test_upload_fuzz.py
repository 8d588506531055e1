"""A good upload, changed at random: each is accepted or refused by name, in little time and memory.

`QUICKCHANGE_FUZZ_EXAMPLES` makes it as long as wanted. Jobs run in a worker with tight limits, so
that a mistake, a crash, a long search and a large allocation are all seen.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from quickchange_adapters.limits import AdapterLimits, CheckLimits
from quickchange_adapters.report import Report
from quickchange_adapters.validate import ValidationJob
from quickchange_adapters.validation_process import ValidationProcess

from tests.adapters.adapter_files import (
    config_values,
    header_of,
    q_pairs,
    safetensors_bytes,
    small_spec,
    weights_bytes,
    write_adapter,
)

NUM_EXAMPLES = int(os.environ.get("QUICKCHANGE_FUZZ_EXAMPLES", "100"))
SPEC = small_spec()
LIMITS = AdapterLimits(max_rank=64)
MIB = 1 << 20
CODES = {
    *("config_invalid", "config_unsupported", "weights_invalid", "weights_not_safetensors"),
    *("shape_mismatch", "unknown_module", "rank_too_large", "not_finite", "no_effect"),
    "base_mismatch",
}
CONFIG = json.dumps(config_values(rank_pattern={"v_proj": 2}, exclude_modules=["x"])).encode()
TENSORS = q_pairs(SPEC)
WEIGHTS = weights_bytes(TENSORS)
DATA = b"".join(array.tobytes() for array in TENSORS.values())
KEYS = [
    *(*config_values(), "layers_pattern", "layers_to_transform", "lora_bias", "exclude_modules")
]
PROFILE = settings(
    max_examples=NUM_EXAMPLES,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([0, -1, 1, 4, 8, 2**31, 2**63, 2**64, 10**40, 1e300, -0.0, 1e-300]),
    st.floats(allow_nan=False),
    st.text(max_size=12),
    st.sampled_from(["q_proj", ".*", "(a|b)*", "(", "[[:alpha:]]", "F32", "all-linear", "\0"]),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner, max_size=3)
    ),
    max_leaves=8,
)


@pytest.fixture(scope="module")
def worker() -> Iterator[ValidationProcess]:
    limits = CheckLimits(max_cpu_s=5, max_wall_s=60, max_memory_bytes=64 * MIB, max_jobs=10**9)
    process = ValidationProcess(limits)
    yield process
    process.stop()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


def check(worker: ValidationProcess, folder: Path, config: bytes, weights: bytes) -> Report:
    """Have an upload checked; whatever it holds, it must be said by name."""
    paths = write_adapter(folder, weights, config)
    report = worker.run(ValidationJob(*paths, SPEC, LIMITS))
    assert worker.is_usable, report.problems
    for problem in report.problems:
        assert problem.code in CODES, problem
        assert "went wrong" not in problem.message, problem
        assert len(problem.message) < 4000
        assert len(problem.where) < 400
    assert len(json.dumps(report.to_json(), allow_nan=False)) < 200_000
    return report


@st.composite
def mutations(draw: st.DrawFn, data: bytes) -> bytes:
    """Change some bytes, cut some out, repeat some, or let the end go."""
    changed = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, max(len(changed) - 1, 0)))
        length = draw(st.integers(1, 40))
        how = draw(st.sampled_from(["set", "cut", "repeat", "end", "insert"]))
        if how == "set":
            changed[place : place + 1] = draw(st.binary(min_size=1, max_size=1))
        elif how == "cut":
            del changed[place : place + length]
        elif how == "repeat":
            changed[place:place] = changed[place : place + length]
        elif how == "insert":
            changed[place:place] = draw(st.binary(min_size=1, max_size=12))
        else:
            del changed[place:]
    return bytes(changed)


def test_the_good_one_is_good(worker: ValidationProcess, folder: Path) -> None:
    assert check(worker, folder, CONFIG, WEIGHTS).ok


@PROFILE
@given(config=mutations(CONFIG))
def test_bytes_of_a_config(worker: ValidationProcess, folder: Path, config: bytes) -> None:
    check(worker, folder, config, WEIGHTS)


@PROFILE
@given(weights=mutations(WEIGHTS[:600]))
def test_bytes_of_a_header(worker: ValidationProcess, folder: Path, weights: bytes) -> None:
    check(worker, folder, CONFIG, weights + WEIGHTS[600:])


@PROFILE
@given(
    key=st.sampled_from(KEYS),
    value=VALUES,
    more=st.dictionaries(
        st.sampled_from([*config_values(), "exclude_modules"]), VALUES, max_size=2
    ),
)
def test_values_of_a_config(
    worker: ValidationProcess, folder: Path, key: str, value: Any, more: dict[str, Any]
) -> None:
    config = json.dumps({**config_values(), **more, key: value}).encode()
    check(worker, folder, config, WEIGHTS)


@PROFILE
@given(
    tensor=st.sampled_from([*TENSORS, "__metadata__", "new"]),
    field=st.sampled_from(["dtype", "shape", "data_offsets", "more", ""]),
    value=VALUES | st.lists(st.integers(0, 9000), min_size=1, max_size=3),
)
def test_values_of_a_header(
    worker: ValidationProcess, folder: Path, tensor: str, field: str, value: Any
) -> None:
    header = header_of(TENSORS)
    if field:
        header[tensor] = {**header.get(tensor, {}), field: value}
    else:
        header[tensor] = value
    check(worker, folder, CONFIG, safetensors_bytes(header, DATA))


@PROFILE
@given(numbers=st.binary(min_size=4, max_size=64), place=st.integers(0, len(DATA) - 64))
def test_numbers_of_tensors(
    worker: ValidationProcess, folder: Path, numbers: bytes, place: int
) -> None:
    data = DATA[:place] + numbers + DATA[place + len(numbers) :]
    check(worker, folder, CONFIG, safetensors_bytes(header_of(TENSORS), data))
