"""The spill store gives back what was put in, notices every change to its file, and leaves nothing behind."""

from __future__ import annotations

import errno
import gc
import os
import pickle
import shutil
import stat
import subprocess
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from torchwrap.core.errors import CorruptDataError, DiskFullError, StorageError, TorchwrapWarning, UnsafePathError
from torchwrap.storage import Read, Reader, SpillFile, SpillStore, allocate

DTYPES = (torch.float32, torch.bfloat16, torch.uint8, torch.bool, torch.complex64, torch.int64, torch.float8_e4m3fn)


def same(left: torch.Tensor, right: torch.Tensor) -> bool:
    raw = [t.contiguous().reshape(-1).view(torch.uint8) if t.numel() else t for t in (left, right.resolve_conj())]
    return left.dtype == right.dtype and left.shape == right.shape and torch.equal(*raw)


def random_tensor(count: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    raw = torch.randint(0, 2, (count * dtype.itemsize,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return raw.view(dtype)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SpillStore]:
    with SpillStore.create(tmp_path / "spill") as store:
        yield store


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    steps=st.lists(
        st.tuples(st.sampled_from("pppgrs"), st.integers(0, 4), st.integers(0, 9000), st.sampled_from(DTYPES)), min_size=1, max_size=30
    )
)
def test_every_read_gives_the_last_write(tmp_path: Path, steps: list[tuple[str, int, int, torch.dtype]]) -> None:
    held: dict[str, torch.Tensor] = {}
    with SpillStore.create(tmp_path / "spill") as store, Reader(2, 8192) as reader:
        for number, (action, which, count, dtype) in enumerate(steps):
            name = f"layer.{which}"
            if action == "p":
                held[name] = random_tensor(count, dtype, number)
                store.put(name, held[name])
            elif action == "r" and name in held:
                store.remove(name)
                del held[name]
            elif action == "g" and name in held:
                assert same(store.get(name), held[name])
            elif action == "s" and name in held:
                segment, buffer = store.segments[name], allocate(count + 100_000)
                reader.submit([Read(store.file, segment.offset, segment.nbytes, buffer, 0, (store.file.part(name),))]).wait()
                assert same(buffer.tensor()[: segment.nbytes].view(segment.dtype), held[name].reshape(-1))
        assert set(store.segments) == set(held)
        assert all(same(store.get(name), tensor) and same(store.file.view(name), tensor) for name, tensor in held.items())
        extents = sorted([record.extent for record in store.file.records.values()] + store._space._free)
        assert sum(nbytes for _, nbytes in extents) == store._space.end
        assert all(a + n == b for (a, n), (b, _) in pairwise(extents))


LAYOUTS = {
    "scalar": torch.tensor(1.5),
    "empty": torch.empty(0, 3),
    "transposed": torch.randn(5, 7).t(),
    "expanded": torch.randn(1, 4).expand(3, 4),
    "conjugate": torch.randn(3, dtype=torch.complex64).conj(),
    "several chunks": torch.randn(1200, 1100),
    "parameter": torch.nn.Parameter(torch.randn(3)),
}


@pytest.mark.parametrize("tensor", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_any_layout_is_stored(store: SpillStore, tensor: torch.Tensor) -> None:
    segment = store.put("x", tensor)
    assert segment.offset % 4096 == 0
    assert same(store.get("x"), tensor.detach())
    assert same(store.file.view("x"), tensor.detach())


def test_long_and_odd_names(store: SpillStore) -> None:
    for name in ("", "a" * 9000, "../../x", "ä\u2028\0"):
        store.put(name, torch.ones(2))
        store.file.check_header(name)
        assert store.get(name).tolist() == [1, 1]


def test_rewriting_reuses_space_but_never_the_live_place(store: SpillStore) -> None:
    places = [store.put("x", torch.full((100_000,), float(step))).offset for step in range(20)]
    assert all(a != b for a, b in pairwise(places))
    assert len(set(places)) == 2
    assert store.file.nbytes < 3 * 410_000


def test_folder_and_files_are_private_and_random(tmp_path: Path) -> None:
    first, second = SpillStore.create(tmp_path), SpillStore.create(tmp_path)
    assert first.folder != second.folder
    for store in (first, second):
        assert stat.S_IMODE(store.folder.stat().st_mode) == 0o700
        assert {stat.S_IMODE(entry.stat().st_mode) for entry in store.folder.iterdir()} == {0o600}
        store.close()
        store.close()
    assert os.listdir(tmp_path) == []


def overwrite(path: Path, offset: int, content: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(content)


@pytest.mark.parametrize("damage", ["truncated", "bit flipped", "zeroed", "swapped", "stale"])
def test_altered_data_is_never_used(store: SpillStore, damage: str) -> None:
    one, two = torch.arange(3000.0), torch.arange(3000.0) * 2
    stale, old = store.put("a", two), store.file.path.read_bytes()
    store.put("a", one)
    a, b = store.put("a", one), store.put("b", two)
    path, raw = store.file.path, store.file.path.read_bytes()
    if damage == "truncated":
        os.truncate(path, b.offset + 4096)
    elif damage == "bit flipped":
        overwrite(path, a.offset + 40, bytes([raw[a.offset + 40] ^ 4]))
        overwrite(path, b.offset + 40, bytes([raw[b.offset + 40] ^ 4]))
    elif damage == "zeroed":
        overwrite(path, a.offset, bytes(4096))
        overwrite(path, b.offset, bytes(4096))
    elif damage == "swapped":
        overwrite(path, a.offset - 4096, raw[b.offset - 4096 : b.offset + b.nbytes])
        overwrite(path, b.offset - 4096, raw[a.offset - 4096 : a.offset + a.nbytes])
    else:
        overwrite(path, b.offset - 4096, old[stale.offset - 4096 : stale.offset + stale.nbytes])
        overwrite(path, a.offset - 4096, old[stale.offset - 4096 : stale.offset])
    with pytest.raises(CorruptDataError, match=str(path)):
        store.get("b")
    if damage != "truncated":  # the cut is behind the first tensor
        with pytest.raises(CorruptDataError):
            store.get("a")
    with Reader() as reader, pytest.raises(CorruptDataError):
        if damage == "stale":
            store.file.check_header("b")
        reader.submit([Read(store.file, b.offset, b.nbytes, allocate(b.nbytes), 0, (store.file.part("b"),))]).wait()


def test_damaged_header_is_named(store: SpillStore) -> None:
    segment = store.put("a", torch.ones(5))
    store.file.check_header("a")
    overwrite(store.file.path, segment.offset - 4096 + 30, b"\xff")
    with pytest.raises(CorruptDataError, match="damaged"):
        store.file.check_header("a")
    with pytest.raises(CorruptDataError, match="damaged"):
        store.get("a")


def test_replaced_file_is_noticed(store: SpillStore, tmp_path: Path) -> None:
    store.put("a", torch.ones(5))
    shutil.copy(store.file.path, tmp_path / "copy")
    os.replace(tmp_path / "copy", store.file.path)
    with pytest.raises(CorruptDataError):
        store.file.check_unchanged()


def test_removed_folder_does_not_lose_data(store: SpillStore) -> None:
    store.put("a", torch.ones(5))
    shutil.rmtree(store.folder)
    store.put("b", torch.zeros(5))
    assert store.get("a").tolist() == [1] * 5
    assert store.get("b").tolist() == [0] * 5


@pytest.mark.parametrize("fault", [
    lambda n, kind: 4096 * (n % 3) + 700 if kind == "write" else None,
    lambda n, kind: InterruptedError() if n % 2 else None,
    lambda n, kind: OSError(errno.EINVAL, "Invalid argument") if n == 3 else None,
    lambda n, kind: OSError(errno.EIO, "Input/output error") if n == 3 and kind != "reserve" else None,
], ids=["short writes", "interrupted", "O_DIRECT refused", "EIO once"])  # fmt: skip
def test_disk_hiccups_do_not_change_a_byte(tmp_path: Path, faulty: Any, fault: Any) -> None:
    backend = faulty(lambda n, kind: None if kind == "reserve" else fault(n, kind))
    tensors = {str(size): random_tensor(size, torch.float32, size) for size in (3, 1000, 1_500_000)}
    with SpillStore.create(tmp_path, backend=backend) as store:
        for name, tensor in tensors.items():
            store.put(name, tensor)
        assert all(same(store.get(name), tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("kind", [errno.ENOSPC, errno.EIO, "interrupt"], ids=["disk full", "EIO", "KeyboardInterrupt"])
@pytest.mark.parametrize("first", range(5), ids=["reserve", "chunk 1", "chunk 2", "chunk 3", "header"])
def test_failure_at_any_call_leaves_the_old_version_and_no_lost_space(tmp_path: Path, faulty: Any, first: int, kind: Any) -> None:
    backend = faulty(lambda n, _: None)
    with SpillStore.create(tmp_path, backend=backend) as store:
        old, new = torch.arange(1500.0), torch.randn(2_200_000)
        store.put("x", old)
        end = store._space.end
        backend.calls = 0
        failure = KeyboardInterrupt() if kind == "interrupt" else OSError(kind, os.strerror(kind))
        backend.fault = lambda n, _: failure if n >= first else None
        expected = KeyboardInterrupt if kind == "interrupt" else DiskFullError if kind == errno.ENOSPC else StorageError
        with pytest.raises(expected) as caught:
            store.put("x", new)
        if kind == errno.ENOSPC:
            assert caught.value.needed >= new.nbytes
            assert caught.value.available > 0
        assert store.file.nbytes == store._space.end >= end
        backend.fault = lambda n, _: None
        assert same(store.get("x"), old)
        store.put("x", new)
        assert same(store.get("x"), new)
    assert os.listdir(tmp_path) == []


def test_reservation_beyond_the_disk_is_refused_with_figures(tmp_path: Path) -> None:
    with pytest.raises(DiskFullError) as caught:
        SpillStore.create(tmp_path / "s", needed=1 << 60)
    assert caught.value.needed == 1 << 60
    assert 0 < caught.value.available < 1 << 60
    assert os.listdir(tmp_path / "s") == []


def test_reserved_space_is_used_before_the_file_grows(tmp_path: Path) -> None:
    with SpillStore.create(tmp_path, needed=1 << 20) as store:
        assert store.file.nbytes == 1 << 20
        store.put("x", torch.zeros(200_000))
        assert store.file.nbytes == 1 << 20


VIEWED = """
import sys, torch
from torchwrap.storage import SpillStore
store = SpillStore.create(sys.argv[1])
store.put("a", torch.ones(100_000))
view = store.file.view("a")
store.remove("a")
print(view.sum().item())
"""


def test_a_program_ends_with_a_view_of_what_was_removed(tmp_path: Path, python: Any) -> None:
    out, err = python(VIEWED, tmp_path).communicate(timeout=240)
    assert out == "100000.0\n", err
    assert os.listdir(tmp_path) == []


LIMITED = """
import resource, sys, torch
from torchwrap.core.errors import DiskFullError
from torchwrap.storage import SpillStore
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
with SpillStore.create(sys.argv[1]) as store:
    store.put("a", torch.ones(1000))
    try:
        store.put("b", torch.ones(1 << 20))
    except DiskFullError as error:
        print("full", error.needed > 4 << 20, store.get("a").sum().item(), list(store.segments))
"""


def test_limit_on_file_size_is_a_disk_full_error(tmp_path: Path, python: Any) -> None:
    out, err = python(LIMITED, tmp_path).communicate(timeout=240)
    assert out == "full True 1000.0 ['a']\n", err
    assert os.listdir(tmp_path) == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """8 MiB of tmpfs, where this user may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m,mode=700", "tmpfs", folder], capture_output=True, text=True, check=False)
    if made.returncode:
        pytest.skip(f"cannot mount a tmpfs: {made.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
def test_full_disk_is_refused_with_figures_and_what_is_there_stays(small_disk: Path) -> None:
    with pytest.warns(TorchwrapWarning, match="memory"), SpillStore.create(small_disk) as store:
        store.put("a", torch.ones(1_000_000))
        with pytest.raises(DiskFullError) as caught:
            store.put("b", torch.ones(1_500_000))
        assert caught.value.needed > 6_000_000
        assert caught.value.available < 5_000_000
        assert store.get("a").sum() == 1_000_000
    assert os.listdir(small_disk) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
def test_disk_that_fills_up_under_the_store_is_typed(small_disk: Path) -> None:
    with pytest.warns(TorchwrapWarning, match="memory"), SpillStore.create(small_disk) as store:
        store.put("a", torch.ones(100_000))
        (small_disk / "filler").write_bytes(bytes(7_000_000))
        with pytest.raises(DiskFullError):
            store.put("b", torch.ones(400_000))
        assert store.get("a").sum() == 100_000


@pytest.mark.parametrize("kind", ["link", "world-writable", "file", "read-only"])
def test_unsafe_folder_is_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "spill"
    if kind == "link":
        (tmp_path / "real").mkdir()
        path.symlink_to("real")
    elif kind == "world-writable":
        path.mkdir()
        path.chmod(0o777)
    elif kind == "file":
        path.write_bytes(b"")
    else:
        path = Path("/proc/self")
    with pytest.raises((UnsafePathError, StorageError)):
        SpillStore.create(path)


WRITER = """
import os, sys, torch
from torchwrap.storage import SpillStore
store = SpillStore.create(sys.argv[1])
store.put("x", torch.full((50_000,), float(sys.argv[2])))
print(store.folder, flush=True)
sys.stdin.readline()
print(store.get("x").unique().tolist(), flush=True)
if sys.argv[2] == "2": os._exit(0)
"""


def test_two_processes_share_a_folder_and_leftovers_of_the_killed_one_are_swept(tmp_path: Path, python: Any) -> None:
    first, second, third = (python(WRITER, tmp_path, number) for number in (1, 2, 3))
    folders = [Path(process.stdout.readline().strip()) for process in (first, second, third)]
    assert len(set(folders)) == 3
    for process, value in ((second, 2.0), (third, 3.0)):
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.stdout.readline() == f"[{value}]\n"
    assert second.wait(30) == 0
    assert third.wait(30) == 0
    assert folders[1].exists(), "os._exit leaves the folder"
    assert not folders[2].exists(), "an ordinary exit without close() removes it"
    SpillStore.create(tmp_path).close()
    assert sorted(tmp_path.iterdir()) == [folders[0]], "the living process keeps its folder, the dead one's is gone"
    first.kill()
    first.wait()
    SpillStore.create(tmp_path).close()
    assert os.listdir(tmp_path) == []


def test_sweeping_leaves_what_is_not_ours(tmp_path: Path) -> None:
    (tmp_path / "torchwrap-notes").mkdir()
    (tmp_path / "torchwrap-0123456789abcdef").mkdir()  # young and without a record: being made
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "precious").write_bytes(b"1")
    (tmp_path / "torchwrap-ffffffffffffffff").symlink_to("target")
    SpillStore.create(tmp_path).close()
    assert len(os.listdir(tmp_path)) == 4
    assert (tmp_path / "target" / "precious").exists()
    os.utime(tmp_path / "torchwrap-0123456789abcdef", (1, 1))
    SpillStore.create(tmp_path).close()
    assert not (tmp_path / "torchwrap-0123456789abcdef").exists()


def test_collected_store_is_removed(tmp_path: Path) -> None:
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    store = SpillStore.create(tmp_path)
    store.put("x", torch.ones(10))
    file = store.file
    del store
    gc.collect()
    assert os.listdir(tmp_path) == []
    assert file.view("x").tolist() == [1] * 10, "readers that still hold the file are not hurt"
    del file
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before


def test_forked_child_reads_but_neither_changes_nor_deletes(store: SpillStore) -> None:
    store.put("x", torch.arange(10.0))
    child = os.fork()
    if not child:
        code = 1
        try:
            store.put("y", torch.ones(1))
        except StorageError:
            code = 0 if store.get("x").tolist() == list(range(10)) else 2
        store.close()
        os._exit(code)
    assert os.waitpid(child, 0)[1] == 0
    assert store.folder.exists()
    store.put("x", torch.ones(10))
    assert store.get("x").tolist() == [1] * 10


def test_kept_store_opens_again_and_is_not_swept(tmp_path: Path) -> None:
    store = SpillStore.create(tmp_path)
    store.put("x", torch.zeros(7))
    store.put("x", torch.arange(7.0))
    store.put("y", torch.tensor(True))
    store.close(keep=True)
    SpillStore.create(tmp_path).close()
    file = SpillFile.open(store.folder)
    assert file.view("x").tolist() == list(range(7))
    assert file.view("y").item() is True
    with Reader() as reader:
        segment, buffer = file.segments["x"], allocate(100)
        reader.submit([Read(file, segment.offset, segment.nbytes, buffer, 0, (file.part("x"),))]).wait()
    overwrite(file.path, segment.offset - 4096 + 40, b"\xff\xff")
    with pytest.raises(CorruptDataError):
        SpillFile.open(store.folder)
    (store.folder / "index.json").write_text('{"file": "../x", "records": {}}')
    with pytest.raises(UnsafePathError):
        SpillFile.open(store.folder)


def test_closed_store_refuses(tmp_path: Path) -> None:
    store = SpillStore.create(tmp_path)
    store.put("x", torch.ones(3))
    view = store.file.view("x")
    store.close()
    assert view.tolist() == [1, 1, 1]
    for use in (lambda: store.put("y", torch.ones(1)), lambda: store.get("x"), lambda: store.remove("x"), lambda: store.file.fd(False)):
        with pytest.raises(StorageError):
            use()


def test_store_cannot_be_pickled(store: SpillStore) -> None:
    for thing in (store, store.file):
        with pytest.raises(TypeError, match="process"):
            pickle.dumps(thing)


def test_unknown_name_is_a_key_error(store: SpillStore) -> None:
    for use in (store.get, store.remove, store.file.view, store.file.part, store.file.check_header):
        with pytest.raises(KeyError):
            use("missing")


def test_default_folder_is_the_systems_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with SpillStore.create() as store:
        assert store.folder.parent == tmp_path
