"""Memory limits are read from fake /proc and /sys trees of both control group versions."""

from __future__ import annotations

from pathlib import Path

import pytest

from torchwrap.storage import memory_available, memory_limit, memory_usage
from torchwrap.storage.limits import group_usage, is_limited

MIB = 1 << 20
V1_NONE = "9223372036854771712"


def tree(root: Path, files: dict[str, object]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{content}\n")
    return root


MEMINFO = {"proc/meminfo": "MemTotal:       16777216 kB\nMemFree: 1 kB\nMemAvailable:    8388608 kB"}
V2 = {
    "proc/self/mountinfo": "30 20 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate",
    "proc/self/cgroup": "0::/outer/inner",
}
V1 = {
    "proc/self/mountinfo": "35 30 0:31 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n"
    "36 30 0:32 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory",
    "proc/self/cgroup": "5:cpu:/\n4:memory:/job/task\n0::/",
}


def test_version_2_takes_the_smallest_limit_of_all_levels(tmp_path: Path) -> None:
    base = "sys/fs/cgroup/"
    root = tree(tmp_path, {**MEMINFO, **V2, base + "outer/memory.max": 512 * MIB, base + "outer/inner/memory.max": 900 * MIB})
    assert memory_limit(root=root) == 512 * MIB


def test_version_2_high_binds_like_max(tmp_path: Path) -> None:
    base = "sys/fs/cgroup/outer/inner/"
    root = tree(tmp_path, {**MEMINFO, **V2, base + "memory.max": "max", base + "memory.high": 300 * MIB})
    assert memory_limit(root=root) == 300 * MIB


def test_version_1_is_hierarchical(tmp_path: Path) -> None:
    base = "sys/fs/cgroup/memory/"
    limits = {"": V1_NONE, "job/": 2048 * MIB, "job/task/": 4096 * MIB}
    root = tree(tmp_path, {**MEMINFO, **V1, **{f"{base}{k}memory.limit_in_bytes": v for k, v in limits.items()}})
    assert memory_limit(root=root) == 2048 * MIB


def test_container_that_sees_its_own_group_as_root(tmp_path: Path) -> None:
    mount = "36 30 0:32 /docker/abc /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory"
    files = {
        "proc/self/mountinfo": mount,
        "proc/self/cgroup": "4:memory:/docker/abc",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": 64 * MIB,
    }
    assert memory_limit(root=tree(tmp_path, {**MEMINFO, **files})) == 64 * MIB


@pytest.mark.parametrize("files", [{}, V1, V2], ids=["none", "v1", "v2"])
def test_without_a_limit_the_machine_is_the_limit(tmp_path: Path, files: dict[str, object]) -> None:
    assert memory_limit(root=tree(tmp_path, {**MEMINFO, **files})) == 16384 * MIB
    assert memory_available(root=tmp_path) == 8192 * MIB
    assert memory_usage(root=tmp_path) == 8192 * MIB


def test_a_limit_above_the_machine_is_the_machine(tmp_path: Path) -> None:
    assert memory_limit(root=tree(tmp_path, {**MEMINFO, **V2, "sys/fs/cgroup/outer/inner/memory.max": 1 << 50})) == 16384 * MIB


def test_file_cache_does_not_count_as_used(tmp_path: Path) -> None:
    base = "sys/fs/cgroup/outer/inner/"
    stat = f"anon {100 * MIB}\nactive_file {30 * MIB}\ninactive_file {70 * MIB}"
    root = tree(tmp_path, {**MEMINFO, **V2, base + "memory.max": 300 * MIB, base + "memory.current": 200 * MIB, base + "memory.stat": stat})
    assert memory_usage(root=root) == 100 * MIB
    assert memory_available(root=root) == 200 * MIB


def test_the_tightest_group_counts_not_the_smallest_limit(tmp_path: Path) -> None:
    base = "sys/fs/cgroup/"
    levels = {"outer/": (1000, 990), "outer/inner/": (500, 100)}
    files: dict[str, object] = {}
    for level, (limit, used) in levels.items():
        files |= {f"{base}{level}memory.max": limit * MIB, f"{base}{level}memory.current": used * MIB}
    root = tree(tmp_path, {**MEMINFO, **V2, **files})
    assert memory_available(root=root) == 10 * MIB
    assert memory_usage(root=root) == 990 * MIB


def test_usage_of_the_group_is_not_that_of_a_machine_with_less_left(tmp_path: Path) -> None:
    base = "sys/fs/cgroup/outer/inner/"
    root = tree(tmp_path, {**MEMINFO, **V2, base + "memory.max": 12_000 * MIB, base + "memory.current": 300 * MIB})
    assert memory_available(root=root) == 8192 * MIB
    assert group_usage(root=root) == 300 * MIB


def test_without_a_limited_group_there_is_no_usage_of_one(tmp_path: Path) -> None:
    assert group_usage(root=tree(tmp_path, {**MEMINFO, **V2})) is None


def test_unknown_system_has_no_answer(tmp_path: Path) -> None:
    assert memory_limit(root=tmp_path) is None
    assert memory_available(root=tmp_path) is None


def test_this_machine_has_plausible_figures() -> None:
    limit, available = memory_limit(), memory_available()
    assert limit is not None
    assert available is not None
    assert 0 < available <= limit


@pytest.mark.parametrize(("limit", "binds"), [(512 * MIB, True), (1 << 40, False), ("max", False)], ids=["below", "above", "none"])
def test_only_a_limit_below_the_memory_of_the_machine_binds(tmp_path: Path, limit: object, binds: bool) -> None:
    root = tree(tmp_path, {**MEMINFO, **V2, "sys/fs/cgroup/outer/inner/memory.max": limit})
    assert is_limited(root=root) is binds
