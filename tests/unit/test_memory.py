"""How the memory is measured and divided."""

from __future__ import annotations

from pathlib import Path

import pytest

from server.engine import memory
from server.engine.memory import (
    OutOfMemoryError,
    PoolLimits,
    _cgroup_available,
    _meminfo_available,
    available_bytes,
    size_kv_pools,
)
from server.engine.models.config import KVGroupSpec

FULL = KVGroupSpec("full", None, (5,), 1, 8)
SLIDING = KVGroupSpec("sliding", 64, (0, 1, 2, 3, 4), 1, 8)
LIMITS = PoolLimits(block_size=16, max_model_len=1600, max_num_seqs=4, max_num_batched_tokens=32)
SLIDING_MOST = 4 * (64 // 16 + 2) + 32 // 16


def test_ample_memory_is_not_taken_beyond_what_can_be_used() -> None:
    assert size_kv_pools([FULL, SLIDING], [10, 50], 10**9, LIMITS) == (400, SLIDING_MOST)
    assert size_kv_pools([FULL], [10], 10**9, LIMITS) == (400,)
    assert size_kv_pools([SLIDING], [50], 10**9, LIMITS) == (SLIDING_MOST,)


def test_the_full_pool_gets_what_the_sliding_pool_cannot_use() -> None:
    budget = 60 + SLIDING_MOST * 50 + 200 * 10 + 9
    assert size_kv_pools([FULL, SLIDING], [10, 50], budget, LIMITS) == (200, SLIDING_MOST)
    assert size_kv_pools([SLIDING, FULL], [50, 10], budget, LIMITS) == (SLIDING_MOST, 200)


@pytest.mark.parametrize("budget", range(60 + 100 * 10 + 8 * 50, 10_000, 97))
def test_pools_keep_to_the_budget_and_hold_one_sequence(budget: int) -> None:
    full, sliding = size_kv_pools([FULL, SLIDING], [10, 50], budget, LIMITS)
    assert (full + 1) * 10 + (sliding + 1) * 50 <= budget
    assert full >= LIMITS.blocks_of_one(FULL)
    assert sliding >= LIMITS.blocks_of_one(SLIDING)
    assert full >= min(sliding, LIMITS.blocks_of_all(SLIDING))


@pytest.mark.covers("L09")
def test_too_little_memory_is_refused_with_what_to_change() -> None:
    least = 60 + LIMITS.blocks_of_one(FULL) * 10 + LIMITS.blocks_of_one(SLIDING) * 50
    assert size_kv_pools([FULL, SLIDING], [10, 50], least, LIMITS)[0] == 100
    with pytest.raises(
        OutOfMemoryError, match=r"--max-model-len 1600 .* lower --max-model-len, or .* more memory"
    ):
        size_kv_pools([FULL, SLIDING], [10, 50], least - 1, LIMITS)
    with pytest.raises(OutOfMemoryError, match="only 0 MiB"):
        size_kv_pools([FULL], [10], -5, LIMITS)


def test_meminfo_is_read_in_kib(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 100 kB\nMemAvailable:   42 kB\n")
    assert _meminfo_available(meminfo) == 42 * 1024


def write_cgroup(directory: Path, **files: str) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (directory / name.replace("__", ".")).write_text(content)


@pytest.mark.covers("L09")
def test_cgroup_v2_room_is_the_least_of_all_levels_and_counts_page_cache_as_free(tmp_path: Path) -> None:
    root, own = tmp_path / "fs", tmp_path / "self"
    own.write_text("0::/pod/container\n")
    write_cgroup(
        root / "pod/container", memory__max="max\n", memory__current="7", memory__stat="inactive_file 0\n"
    )
    write_cgroup(
        root / "pod", memory__max="1000\n", memory__current="700", memory__stat="anon 1\ninactive_file 50\n"
    )
    assert _cgroup_available(root, own) == 350


@pytest.mark.covers("L09")
def test_cgroup_v1_limits_are_read_and_no_limit_is_none(tmp_path: Path) -> None:
    root, own = tmp_path / "fs", tmp_path / "self"
    own.write_text("12:cpu,cpuacct:/a\n9:memory:/a\n")
    write_cgroup(
        root / "memory/a",
        memory__limit_in_bytes="500\n",
        memory__usage_in_bytes="450\n",
        memory__stat="total_inactive_file 20\n",
    )
    assert _cgroup_available(root, own) == 70
    own.write_text("0::/../outside\n")
    assert _cgroup_available(root, own) is None
    assert _cgroup_available(root, tmp_path / "absent") is None


@pytest.mark.covers("L09")
def test_where_a_cgroup_is_slowed_down_is_a_limit_as_well(tmp_path: Path) -> None:
    root, own = tmp_path / "fs", tmp_path / "self"
    own.write_text("0::/\n")
    write_cgroup(
        root,
        memory__max="1000\n",
        memory__high="600\n",
        memory__current="500",
        memory__stat="inactive_file 0\n",
    )
    assert _cgroup_available(root, own) == 100
    (root / "memory.high").write_text("max\n")
    assert _cgroup_available(root, own) == 500


@pytest.mark.covers("L09")
@pytest.mark.parametrize(("of_cgroup", "expected"), [(None, 1000), (300, 300), (5000, 1000)])
def test_the_container_s_limit_counts_where_it_is_less_than_the_machine_s_memory(
    of_cgroup: int | None, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "_meminfo_available", lambda path: 1000)
    monkeypatch.setattr(memory, "_cgroup_available", lambda root, own: of_cgroup)
    assert available_bytes("cpu") == expected
