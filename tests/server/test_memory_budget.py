"""Who gets how much memory: limits as the system states them, shares, and refusals."""

import json
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
from quickchange_server.base_footprint import BaseFootprint, read_footprint
from quickchange_server.config import ServerConfig
from quickchange_server.errors import BaseUnavailable, ConfigInvalid
from quickchange_server.memory_budget import GIB, MIB, MemoryBudget, format_bytes, resolve_budget
from quickchange_server.memory_limit import MemoryLimit, cgroup_limits, host_memory
from safetensors.torch import save_file

BASE = BaseFootprint(
    weight_bytes=256 * MIB,
    kv_bytes_per_token=23_040,
    adapter_bytes_per_rank=610_560,
    max_model_len=8192,
)


def limit(size: int, source: str = "a test") -> MemoryLimit:
    """Return a limit under which everything is free."""
    return MemoryLimit(size, size, source)


def on_cpu(size: int, config: ServerConfig | None = None) -> MemoryBudget:
    """Resolve a budget on the CPU under a limit."""
    return resolve_budget(config or ServerConfig(), BASE, "cpu", limit(size), limit(size))


@pytest.mark.parametrize("gibs", [1, 2, 4, 8, 24, 512])
def test_auto_parts_and_base_stay_under_nine_tenths_of_the_limit(gibs: int) -> None:
    budget = on_cpu(gibs * GIB)
    parts = (
        budget.kv_cache_bytes,
        budget.adapter_device_bytes,
        budget.adapter_host_bytes,
        budget.merged_bytes,
    )
    assert budget.base_bytes + sum(parts) <= 0.9 * gibs * GIB
    assert min(parts[:3]) > 0


def test_merged_copies_get_the_base_s_size_or_nothing() -> None:
    assert on_cpu(8 * GIB).merged_bytes == BASE.weight_bytes
    assert on_cpu(1 * GIB).merged_bytes == 0


@pytest.mark.parametrize(
    ("rows", "max_model_len", "tokens"),
    [(4, 1024, 4 * 1024), (32, None, 32 * 2048), (1, None, 8192), (2, 1 << 20, 8192)],
)
def test_kv_cache_takes_no_more_than_rows_use(
    rows: int, max_model_len: int | None, tokens: int
) -> None:
    config = ServerConfig(max_batch_rows=rows, max_model_len=max_model_len)
    assert on_cpu(512 * GIB, config).kv_cache_bytes == tokens * BASE.kv_bytes_per_token


def test_explicit_values_are_kept_and_auto_shares_the_rest() -> None:
    auto = on_cpu(3 * GIB)
    fixed = on_cpu(3 * GIB, ServerConfig(adapter_host_bytes=1 * GIB, merged_bytes=0))
    assert (fixed.adapter_host_bytes, fixed.merged_bytes) == (1 * GIB, 0)
    assert 0 < fixed.kv_cache_bytes < auto.kv_cache_bytes


def test_numbers_of_adapters_give_bytes_for_the_largest_rank() -> None:
    config = ServerConfig(max_loras=4, max_cpu_loras=8, max_lora_rank=16)
    budget = on_cpu(8 * GIB, config)
    assert budget.adapter_device_bytes == 4 * 16 * BASE.adapter_bytes_per_rank
    assert budget.adapter_host_bytes == 8 * 16 * BASE.adapter_bytes_per_rank


def test_bytes_win_over_a_number_of_adapters() -> None:
    config = ServerConfig(max_loras=4, adapter_device_bytes=MIB)
    assert on_cpu(8 * GIB, config).adapter_device_bytes == MIB


def test_explicit_values_that_do_not_fit_are_refused_by_name() -> None:
    with pytest.raises(ConfigInvalid, match=r"--kv-cache-bytes 7\.0 GiB .*8\.0 GiB \(a test\)"):
        on_cpu(8 * GIB, ServerConfig(kv_cache_bytes=7 * GIB))


def test_base_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ConfigInvalid, match="the base 256.0 MiB"):
        on_cpu(512 * MIB)


def test_gpu_and_host_have_budgets_of_their_own() -> None:
    budget = resolve_budget(
        ServerConfig(), BASE, "cuda:0", limit(80 * GIB, "GPU"), limit(2 * GIB, "RAM")
    )
    assert budget.adapter_device_bytes == 512 * MIB
    assert budget.adapter_host_bytes < GIB
    with pytest.raises(ConfigInvalid, match=r"--adapter-host-bytes .*\(RAM\)"):
        resolve_budget(
            ServerConfig(adapter_host_bytes=8 * GIB),
            BASE,
            "cuda:0",
            limit(80 * GIB),
            limit(2 * GIB, "RAM"),
        )


def test_table_shows_every_part_with_its_place() -> None:
    table = on_cpu(8 * GIB).render()
    assert "8.0 GiB (a test)" in table
    for words in ("base", "KV cache", "adapters", "host", "merged copies", "tokens"):
        assert words in table
    assert format_bytes(on_cpu(8 * GIB).kv_cache_bytes) in table


def test_footprint_counts_what_is_in_the_files(tiny_base: Path) -> None:
    footprint = read_footprint(tiny_base)
    vocab_size = json.loads((tiny_base / "config.json").read_text())["vocab_size"]
    # width 64, MLP 128, 4 heads and 2 key-value heads of 16, tied embeddings, 2 layers
    linears = [(64, 64), (32, 64), (32, 64), (64, 64), (128, 64), (128, 64), (64, 128)]
    block = sum(rows * columns for rows, columns in linears) + 2 * 64
    assert footprint.weight_bytes == 4 * (2 * block + 64 + vocab_size * 64)
    assert footprint.kv_bytes_per_token == 4 * 2 * 2 * 2 * 16
    assert footprint.adapter_bytes_per_rank == 4 * 2 * sum(map(sum, linears))
    assert footprint.max_model_len == 512


def test_footprint_follows_the_serving_dtype(tiny_base: Path) -> None:
    whole, half = read_footprint(tiny_base, "float32"), read_footprint(tiny_base, "bfloat16")
    assert whole.weight_bytes == 2 * half.weight_bytes
    assert whole.kv_bytes_per_token == 2 * half.kv_bytes_per_token


def test_folder_that_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BaseUnavailable, match=r"no config\.json"):
        read_footprint(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(BaseUnavailable, match="language model"):
        read_footprint(tmp_path)
    (tmp_path / "config.json").write_text('{"num_hidden_layers": 1}')
    with pytest.raises(BaseUnavailable, match=r"no \.safetensors"):
        read_footprint(tmp_path)


@pytest.mark.parametrize("content", [b"", b"\xff" * 16, b"\x02" + b"\0" * 7 + b"[]", b"PK\3\4"])
def test_weights_that_are_not_safetensors_are_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"num_hidden_layers": 1}')
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(BaseUnavailable, match="is not a safetensors file"):
        read_footprint(tmp_path)


def test_weights_in_several_files_are_added_up(tmp_path: Path, tiny_base: Path) -> None:
    (tmp_path / "config.json").write_bytes((tiny_base / "config.json").read_bytes())
    for number in range(2):
        save_file({f"part{number}": torch.zeros(5, 3)}, tmp_path / f"model-{number}.safetensors")
    assert read_footprint(tmp_path).weight_bytes == 2 * 15 * 4


def fake_cgroup(root: Path, line: str, files: dict[str, str]) -> None:
    """Lay out what the kernel would show of a cgroup under a root folder."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(line + "\n")
    for name, content in files.items():
        file = root / "sys/fs/cgroup" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)


def test_cgroup_of_version_2_counts_cache_as_free(tmp_path: Path) -> None:
    files = {
        "memory.max": "1000000\n",
        "memory.current": "300000\n",
        "memory.stat": "anon 200000\ninactive_file 100000\n",
    }
    fake_cgroup(tmp_path, "0::/", files)
    assert cgroup_limits(tmp_path) == [MemoryLimit(1_000_000, 800_000, "the cgroup's limit")]
    assert host_memory(tmp_path).total_bytes == 1_000_000


def test_limit_of_a_parent_holds_too(tmp_path: Path) -> None:
    files = {
        "pod/memory.max": "500000",
        "pod/memory.current": "0",
        "pod/container/memory.max": "max",
        "pod/container/memory.current": "0",
    }
    fake_cgroup(tmp_path, "0::/pod/container", files)
    assert [each.total_bytes for each in cgroup_limits(tmp_path)] == [500_000]


def test_cgroup_of_version_1(tmp_path: Path) -> None:
    files = {
        "memory/box/memory.limit_in_bytes": "2000000",
        "memory/box/memory.usage_in_bytes": "500000",
        "memory/box/memory.stat": "inactive_file 1\ntotal_inactive_file 100000\n",
    }
    fake_cgroup(tmp_path, "4:cpu,memory:/box", files)
    assert host_memory(tmp_path) == MemoryLimit(2_000_000, 1_600_000, "the cgroup's limit")


def test_machine_without_cgroups_has_its_ram(tmp_path: Path) -> None:
    found = host_memory(tmp_path)
    assert found.source == "available RAM"
    assert found.total_bytes == psutil.virtual_memory().total


def test_what_steps_take_of_a_gpu_is_kept_for_them() -> None:
    base = replace(BASE, gpu_bytes_per_row=4 * MIB)
    sizes = {
        rows: resolve_budget(
            ServerConfig(max_batch_rows=rows), base, "cuda:0", limit(8 * GIB), limit(8 * GIB)
        )
        for rows in (1, 1024)
    }
    assert sizes[1024].work_bytes - sizes[1].work_bytes == 1023 * 4 * MIB
    assert "working" in sizes[1].render()
    for budget in sizes.values():
        parts = budget.kv_cache_bytes + budget.adapter_device_bytes + budget.merged_bytes
        assert budget.base_bytes + parts + budget.work_bytes <= 0.9 * 8 * GIB
    assert on_cpu(8 * GIB).work_bytes == 0
    config = ServerConfig(max_batch_rows=4096)
    with pytest.raises(ConfigInvalid, match="working memory for --max-batch-rows 16"):
        resolve_budget(config, base, "cuda:0", limit(8 * GIB), limit(8 * GIB))
