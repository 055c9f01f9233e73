"""A file is old or new, never broken; folders and names cannot lead elsewhere."""

from __future__ import annotations

import errno
import os
import random
import signal
import stat
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from torchwrap.core.errors import DiskFullError, StorageError, UnsafePathError
from torchwrap.storage import Lock, atomic_write, atomic_writer, private_folder, safe_join
from torchwrap.storage.atomic import Owner


def test_new_file_gets_the_umask_and_old_file_keeps_its_mode(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        atomic_write(tmp_path / "new", b"1")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o640
    (tmp_path / "new").chmod(0o604)
    atomic_write(tmp_path / "new", b"22")
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o604
    assert (tmp_path / "new").read_bytes() == b"22"
    assert os.listdir(tmp_path) == ["new"]


def test_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").write_bytes(b"old")
    (tmp_path / "link").symlink_to("real")
    atomic_write(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_bytes() == b"new"


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt()], ids=repr)
def test_exception_inside_leaves_the_old_file_and_no_orphan(tmp_path: Path, error: BaseException) -> None:
    (tmp_path / "file").write_bytes(b"old")
    with pytest.raises(type(error)), atomic_writer(tmp_path / "file") as file:
        file.write(b"half")
        raise error
    assert (tmp_path / "file").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("call", ["fsync", "rename", "fchmod"])
def test_failing_system_call_leaves_the_old_file_and_no_orphan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    (tmp_path / "file").write_bytes(b"old")

    def fail(*_: object, **__: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(StorageError, match=str(tmp_path / "file")):
        atomic_write(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


FULL = """
import resource, sys
from torchwrap.core.errors import DiskFullError
from torchwrap.storage import atomic_write
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    atomic_write(sys.argv[1], bytes(1 << 20))
except DiskFullError as error:
    print("full", isinstance(error, OSError))
"""


def test_no_room_is_a_disk_full_error_and_the_old_file_stays(tmp_path: Path, python: Any) -> None:
    (tmp_path / "file").write_bytes(b"old")
    out, err = python(FULL, tmp_path / "file").communicate(timeout=240)
    assert out == "full True\n", err
    assert (tmp_path / "file").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_missing_folder_is_a_storage_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="gone"):
        atomic_write(tmp_path / "gone" / "file", b"")


def write_for_ever(path: Path, ready: int) -> None:
    """What the child of a fork does until it is killed."""
    try:
        for number in range(1, 1 << 30):
            atomic_write(path, bytes([number % 251]) * (3 << 20))
            os.write(ready, b".")
    finally:
        os._exit(1)


def test_killed_at_random_moments_the_file_is_always_whole(tmp_path: Path) -> None:
    path, chance, whole, orphans = tmp_path / "file", random.Random(7), 0, 0
    path.write_bytes(bytes(3 << 20))
    for _ in range(20):
        ready, child_end = os.pipe()
        child = os.fork()
        if not child:
            write_for_ever(path, child_end)
        os.close(child_end)
        os.read(ready, 1)  # it has begun
        time.sleep(chance.uniform(0.0, 0.05))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(ready)
        content = path.read_bytes()
        whole += content == content[:1] * (3 << 20)
        orphans += len(os.listdir(tmp_path)) > 1
    assert whole == 20
    assert orphans > 0, "no kill hit a write: the test shows nothing"
    atomic_write(path, b"done")
    assert os.listdir(tmp_path) == ["file"], "what the killed processes left is swept"


def test_a_living_writers_temporary_file_is_not_swept(tmp_path: Path) -> None:
    with atomic_writer(tmp_path / "file") as file:
        file.write(b"slow")
        atomic_write(tmp_path / "file", b"quick")
    assert (tmp_path / "file").read_bytes() == b"slow"


def test_a_reused_process_id_does_not_count_as_alive() -> None:
    owner = Owner.current()
    assert owner.alive()
    assert not Owner(owner.pid, owner.start - 1, owner.boot).alive()
    assert not Owner(owner.pid, owner.start, "ffffffff").alive()
    assert Owner.from_json(owner.to_json()) == owner
    assert Owner.from_json(b'{"pid": []}') is None


HOLD = """
import sys
from torchwrap.storage import Lock
with Lock(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_second_process_is_told_who_holds_the_lock(tmp_path: Path, python: Any) -> None:
    process = python(HOLD, tmp_path / "LOCK")
    assert process.stdout.readline() == "held\n"
    with pytest.raises(StorageError, match=f"process {process.pid}"):
        Lock(tmp_path / "LOCK")
    process.kill()
    process.wait()
    with Lock(tmp_path / "LOCK") as lock, pytest.raises(StorageError, match=str(os.getpid())):
        Lock(lock.path)


def test_forked_child_does_not_release_the_lock(tmp_path: Path) -> None:
    lock = Lock(tmp_path / "LOCK")
    child = os.fork()
    if not child:
        lock.release()
        os._exit(0)
    os.waitpid(child, 0)
    with pytest.raises(StorageError):
        Lock(tmp_path / "LOCK")
    lock.release()
    lock.release()
    Lock(tmp_path / "LOCK").release()


def test_a_lock_on_a_full_disk_is_nobody_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(DiskFullError, match="No space"):
            Lock(tmp_path / "LOCK")
    Lock(tmp_path / "LOCK").release()


def test_lock_through_a_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "LOCK").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UnsafePathError):
        Lock(tmp_path / "LOCK")
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "a/../../x", "/etc/passwd", "a\0b", "a\\..\\b", "out/x", "out"])
def test_unsafe_names_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "out").symlink_to("/")
    with pytest.raises(UnsafePathError):
        safe_join(tmp_path / "root", name)


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.sampled_from(["a", "..", ".", "/", "\0", "\\", "link", "x y", "~", ""]), max_size=6))
def test_a_joined_path_never_leaves_its_root(tmp_path: Path, parts: list[str]) -> None:
    root = tmp_path / "root"
    root.mkdir(exist_ok=True)
    if not (root / "link").is_symlink():
        (root / "link").symlink_to("..")
    try:
        found = safe_join(root, "/".join(parts))
    except UnsafePathError:
        return
    assert Path(os.path.realpath(found)).is_relative_to(os.path.realpath(root))


def test_private_folder_is_made_closed_to_others(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        folder = private_folder(tmp_path / "a" / "b")
    finally:
        os.umask(before)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert private_folder(folder) == folder


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o702])
def test_folder_writable_by_others_is_refused_unless_sticky(tmp_path: Path, mode: int) -> None:
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(mode)
    with pytest.raises(UnsafePathError, match=f"{mode:o}"):
        private_folder(tmp_path / "open")
    (tmp_path / "open").chmod(mode | stat.S_ISVTX)
    private_folder(tmp_path / "open")


def test_link_and_file_are_no_private_folders(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to("real")
    with pytest.raises(UnsafePathError, match="link"):
        private_folder(tmp_path / "link")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError):
        private_folder(tmp_path / "file")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
def test_somebody_elses_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir(mode=0o700)
    os.chown(tmp_path / "theirs", 12345, 12345)
    with pytest.raises(UnsafePathError, match="12345"):
        private_folder(tmp_path / "theirs")


def test_disk_full_error_is_an_os_error() -> None:
    assert issubclass(DiskFullError, OSError)
