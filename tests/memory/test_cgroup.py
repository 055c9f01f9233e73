"""The harness itself: a limit is a limit, a peak is a peak, and both versions of the interface are understood."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from benchmarks.harness import cgroup

MIB = 1 << 20
TAKE = "import sys; block = bytearray({mib} << 20); block[::4096] = b'1' * len(block[::4096])"


@pytest.mark.usefixtures("limits")
def test_child_below_its_limit_reports_its_peak() -> None:
    result = cgroup.run_child([sys.executable, "-c", TAKE.format(mib=60)], limit=128 * MIB).check()
    assert 60 * MIB <= result.peak_bytes <= 128 * MIB
    assert not result.killed


@pytest.mark.usefixtures("limits")
def test_child_above_its_limit_is_killed_and_the_group_removed() -> None:
    result = cgroup.run_child([sys.executable, "-c", TAKE.format(mib=200)], limit=96 * MIB)
    assert result.killed
    with pytest.raises(RuntimeError, match="out-of-memory"):
        result.check()
    assert not [path for parent, _ in cgroup._parents() for path in parent.glob(f"torchwrap-{os.getpid()}-*")]


def test_child_reports_json_and_its_own_high_water_mark() -> None:
    program = "from benchmarks.harness.cgroup import report; report({'answer': 42})"
    root = Path(__file__).resolve().parents[2]
    result = cgroup.run_child([sys.executable, "-c", program], environment={"PYTHONPATH": str(root)}).check()
    assert result.data == {"answer": 42}
    assert result.hwm_bytes is None or result.hwm_bytes > MIB


def test_child_that_hangs_is_ended() -> None:
    result = cgroup.run_child([sys.executable, "-c", "import time; time.sleep(60)"], timeout_s=0.5)
    assert result.returncode == -9


@pytest.fixture
def fake_mount(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that looks like a version 2 mount with this process in /box/inner."""
    root = tmp_path / "unified"
    (root / "box" / "inner").mkdir(parents=True)
    for folder in (root, root / "box", root / "box" / "inner"):
        (folder / "cgroup.controllers").write_text("cpu memory\n")
        (folder / "cgroup.subtree_control").write_text("")
    (tmp_path / "mounts").write_text(f"cgroup2 {root} cgroup2 rw,nosuid 0 0\n")
    (tmp_path / "cgroup").write_text("0::/box/inner\n")
    monkeypatch.setattr(cgroup, "MOUNTS", tmp_path / "mounts")
    monkeypatch.setattr(cgroup, "MEMBERSHIP", tmp_path / "cgroup")
    return root


def test_version_2_looks_below_its_own_group_then_beside_it_then_at_the_root(fake_mount: Path) -> None:
    assert [path for path, _ in cgroup._parents()] == [fake_mount / "box" / "inner", fake_mount / "box", fake_mount]


def test_version_2_files_are_read_and_written(tmp_path: Path) -> None:
    for name, text in {
        "memory.max": "max",
        "memory.swap.max": "max",
        "memory.peak": "123456",
        "memory.events": "low 0\nhigh 0\nmax 17\noom 1\noom_kill 1\n",
        "memory.stat": "anon 1\nworkingset_refault_file 9\n",
    }.items():
        (tmp_path / name).write_text(text)
    group = cgroup.MemoryGroup(tmp_path, cgroup.V2)
    group.set_limit(4096)
    assert (tmp_path / "memory.max").read_text() == "4096"
    assert (tmp_path / "memory.swap.max").read_text() == "0"
    assert (group.peak_bytes(), group.failures(), group.kills(), group.refaulted_pages()) == (123456, 17, 1, 9)
    group.set_limit(None)
    assert (tmp_path / "memory.max").read_text() == "max"


def test_no_mount_means_a_reason_to_skip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cgroup, "MOUNTS", tmp_path / "nowhere")
    monkeypatch.setattr(cgroup, "MEMBERSHIP", tmp_path / "nowhere")
    assert cgroup.unavailable_reason()
    with pytest.raises(OSError, match="mounted"), cgroup.memory_group(MIB):
        pass
