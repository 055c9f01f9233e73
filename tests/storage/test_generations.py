"""Records that change: what is committed survives anything, what is read is what was written."""

from __future__ import annotations

import errno
import os
import random
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from torchwrap.core.errors import CorruptDataError, DiskFullError, StorageError, UnsafePathError
from torchwrap.storage import Backend, Reader, manifest
from torchwrap.storage.checksum import memory_of, sum64
from torchwrap.storage.generations import GenerationStore
from torchwrap.storage.pool import allocate

CHUNK = 1024  # float32 elements: one block
SHAPES = {"wide": (301, 103), "small": (7,), "exact": (2, CHUNK)}


def fresh(path: Path | None, backend: Backend | None = None, lead: int = 0) -> GenerationStore:
    store = GenerationStore(path, backend=backend)
    store.reserve((name, torch.float32, shape, lead, CHUNK) for name, shape in SHAPES.items())
    return store


def value(seed: int, name: str) -> torch.Tensor:
    return torch.randn(SHAPES[name], generator=torch.Generator().manual_seed(1000 * seed + len(name)))


def read(store: GenerationStore, name: str) -> torch.Tensor:
    """By requests of one chunk each, as an optimizer reads."""
    record, parts = store.records[name], []
    with Reader() as reader:
        for index in range(record.count):
            buffer = allocate(CHUNK * 4)
            reader.submit([store.read(record, index, buffer)]).wait()
            first, last = record.span(index)
            head = record.head(index)
            parts.append(buffer.tensor()[head : head + 4 * (last - first)].view(torch.float32).clone())
    return torch.cat(parts).view(record.shape)


@pytest.mark.parametrize("lead", [0, 2, 16, 1022])
@pytest.mark.parametrize("name", SHAPES)
def test_values_come_back_through_chunks_and_through_a_view(tmp_path: Path, name: str, lead: int) -> None:
    store = fresh(tmp_path / "run", lead=lead)
    store.put(name, value(1, name))
    assert torch.equal(read(store, name), value(1, name))
    assert torch.equal(store.file.view(name), value(1, name))
    version = store.records[name].whole()
    assert store.file.segments[name].offset % 4096 == lead * 4
    assert version.sum64 == sum64(memory_of(value(1, name)))


def test_reopening_gives_the_last_commit_and_nothing_later(tmp_path: Path) -> None:
    store = fresh(tmp_path / "run")
    store.put("wide", value(1, "wide"))
    store.put("small", value(1, "small"))
    store.commit({"step": 1})
    store.put("wide", value(2, "wide"))
    store.put("exact", value(2, "exact"))
    store.close()
    again = GenerationStore(tmp_path / "run")
    assert again.run == {"step": 1} and again.generation == 1
    assert set(again.records) == {"wide", "small"}
    assert torch.equal(read(again, "wide"), value(1, "wide"))
    assert torch.equal(read(again, "small"), value(1, "small"))


def test_random_writes_commits_and_rollbacks_follow_a_dictionary(tmp_path: Path) -> None:
    chance = random.Random(5)
    store = fresh(tmp_path / "run")
    now: dict[str, int] = {}
    committed: dict[str, int] = {}
    for seed in range(80):
        action = chance.choice(["put", "put", "put", "commit", "rollback", "forget", "reopen"])
        name = chance.choice(list(SHAPES))
        if action == "put":
            store.put(name, value(seed, name))
            now[name] = seed
        elif action == "commit":
            store.commit({"seed": seed})
            committed = dict(now)
        elif action == "forget":
            store.forget(name)
            now.pop(name, None)
        elif store.generation and action == "rollback":
            store.rollback()
            now = dict(committed)
        elif store.generation:
            store.close()
            store = fresh(tmp_path / "run")
            now = dict(committed)
        for name, made in now.items():
            assert torch.equal(read(store, name), value(made, name))
        assert {name for name, record in store.records.items() if record.current is not None} == set(now)


def test_the_committed_half_is_never_written(tmp_path: Path) -> None:
    store = fresh(tmp_path / "run")
    store.put("wide", value(1, "wide"))
    store.commit({})
    place = store.records["wide"].place(store.records["wide"].whole().half, 0)
    before = os.pread(store.file.fd(False), 4096, place[0])
    for seed in (2, 3, 4):
        store.put("wide", value(seed, "wide"))
        assert os.pread(store.file.fd(False), 4096, place[0]) == before


CHILD = """
import sys, torch
from pathlib import Path
from torchwrap.storage.generations import GenerationStore
store = GenerationStore(Path(sys.argv[1]))
store.reserve((f"r{i}", torch.float32, (5000 + i,), 0, 1024) for i in range(3))
step = store.run.get("step", 0)
print("ready", flush=True)
while True:
    step += 1
    for i in range(3):
        store.put(f"r{i}", torch.full((5000 + i,), float(step)))
    if step % 2 == 0:
        store.commit({"step": step})
"""


def test_sigkill_at_random_moments_leaves_a_whole_generation(tmp_path: Path, python: Callable[..., object]) -> None:
    chance = random.Random()
    folder = tmp_path / "run"
    last = 0
    for trial in range(40):
        if trial >= 4 and last:  # a slow machine may need more of them to see a commit
            break
        child = python(CHILD, folder)
        assert child.stdout.readline() == "ready\n"  # type: ignore[attr-defined]
        try:
            child.wait(chance.uniform(0.02, 0.25))  # type: ignore[attr-defined]
        except Exception:
            child.send_signal(signal.SIGKILL)  # type: ignore[attr-defined]
        child.wait()  # type: ignore[attr-defined]
        store = GenerationStore(folder)
        step = int(store.run.get("step", 0))  # type: ignore[arg-type]
        assert step >= last and step % 2 == 0
        for i in range(3 if step else 0):
            with Reader() as reader:
                record, total = store.records[f"r{i}"], torch.empty(0)
                for index in range(record.count):
                    buffer = allocate(4096)
                    reader.submit([store.read(record, index, buffer)]).wait()
                    first, end = record.span(index)
                    total = torch.cat([total, buffer.tensor()[: 4 * (end - first)].view(torch.float32)])
            assert torch.equal(total, torch.full((5000 + i,), float(step)))
        expected = {"LOCK", store.file.path.name} | ({"manifest.json"} if step else set())
        assert set(os.listdir(folder)) == expected
        last = step
        store.close()
        del store
    assert last


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_failed_write_leaves_the_committed_value_and_can_be_repeated(tmp_path: Path, faulty: type, code: int) -> None:
    broken = False
    store = fresh(tmp_path / "run", faulty(lambda _, kind: OSError(code, os.strerror(code)) if broken and kind == "write" else None))
    store.put("wide", value(1, "wide"))
    store.commit({})
    broken = True
    with pytest.raises(DiskFullError if code == errno.ENOSPC else StorageError):
        store.put("wide", value(2, "wide"))
    assert torch.equal(read(store, "wide"), value(1, "wide"))
    broken = False
    store.put("wide", value(2, "wide"))
    assert torch.equal(read(store, "wide"), value(2, "wide"))


def test_a_write_in_place_that_fails_is_noticed_until_rollback(tmp_path: Path, faulty: type) -> None:
    broken = False
    store = fresh(tmp_path / "run", faulty(lambda _, kind: OSError(errno.EIO, "broken") if broken and kind == "write" else None))
    store.put("wide", value(1, "wide"))
    store.commit({})
    store.put("wide", value(2, "wide"))
    broken = True
    with pytest.raises(StorageError):
        store.put("wide", value(3, "wide"))
    broken = False
    with pytest.raises(StorageError, match="rollback"):
        read(store, "wide")
    with pytest.raises(StorageError, match="rollback"):
        store.commit({})
    store.rollback()
    assert torch.equal(read(store, "wide"), value(1, "wide"))


def test_space_is_reserved_before_anything_is_written(tmp_path: Path, faulty: type) -> None:
    full = faulty(lambda _, kind: OSError(errno.ENOSPC, "full") if kind == "reserve" else None)
    store = GenerationStore(tmp_path / "run", backend=full)
    with pytest.raises(DiskFullError) as caught:
        store.reserve([("wide", torch.float32, (301, 103), 0, CHUNK)])
    assert caught.value.needed >= 2 * 301 * 103 * 4
    assert not store.records and store.file.nbytes == 0
    store.close()
    assert [entry.name for entry in (tmp_path / "run").iterdir()] == ["LOCK"]


def test_more_than_the_disk_has_is_refused_with_the_figures(tmp_path: Path) -> None:
    store = GenerationStore(tmp_path / "run")
    with pytest.raises(DiskFullError) as caught:
        store.reserve([("huge", torch.float32, (1 << 45,), 0, CHUNK)])
    assert caught.value.needed > caught.value.available > 0


@pytest.mark.parametrize("position", [0, 4095, 4096 * 20 + 17])
def test_a_flipped_bit_is_found_before_the_chunk_is_used(tmp_path: Path, position: int) -> None:
    store = fresh(tmp_path / "run")
    store.put("wide", value(1, "wide"))
    store.commit({})
    name = store.file.path
    offset = store.file.segments["wide"].offset + position
    store.close()
    del store
    with open(name, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 4]))
    again = GenerationStore(tmp_path / "run")
    with pytest.raises(CorruptDataError, match="wide"):
        read(again, "wide")


def spoil_crc(content: bytes) -> bytes:
    return content[:-3] + bytes([content[-3] ^ 1]) + content[-2:]


@pytest.mark.parametrize("spoil", [spoil_crc, lambda content: content[: len(content) // 2], lambda _: b""], ids=["bit", "half", "empty"])
def test_a_damaged_manifest_is_refused(tmp_path: Path, spoil: Callable[[bytes], bytes]) -> None:
    store = fresh(tmp_path / "run")
    store.put("small", value(1, "small"))
    store.commit({})
    store.close()
    path = tmp_path / "run" / "manifest.json"
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(CorruptDataError):
        GenerationStore(tmp_path / "run")
    assert len(os.listdir(tmp_path / "run")) == 3  # nothing was swept


@pytest.mark.parametrize("change", ["remove", "truncate"])
def test_a_data_file_that_does_not_fit_the_manifest_is_refused(tmp_path: Path, change: str) -> None:
    store = fresh(tmp_path / "run")
    store.put("small", value(1, "small"))
    store.commit({})
    store.close()
    if change == "remove":
        store.file.path.unlink()
    else:
        os.truncate(store.file.path, 4096)
    with pytest.raises(CorruptDataError):
        GenerationStore(tmp_path / "run")


def test_a_folder_in_use_is_refused_and_left_alone(tmp_path: Path) -> None:
    store = fresh(tmp_path / "run")
    with pytest.raises(StorageError, match=str(os.getpid())):
        GenerationStore(tmp_path / "run")
    store.put("small", value(1, "small"))
    store.commit({})


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir(mode=0o500)
    with pytest.raises(StorageError):
        GenerationStore(tmp_path / "run")


def test_a_folder_that_others_may_write_to_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run").chmod(0o777)
    with pytest.raises(UnsafePathError):
        GenerationStore(tmp_path / "run")


def test_orphans_are_swept_and_other_files_stay(tmp_path: Path) -> None:
    store = fresh(tmp_path / "run")
    store.put("small", value(1, "small"))
    store.commit({})
    store.close()
    (tmp_path / "run" / "generations-0123456789abcdef.tws").write_bytes(b"x")
    (tmp_path / "run" / ".manifest.json.tw-1-2-01234567-0123456789abcdef.tmp").write_bytes(b"x")
    (tmp_path / "run" / "notes.txt").write_bytes(b"mine")
    again = GenerationStore(tmp_path / "run")
    assert set(os.listdir(tmp_path / "run")) == {"LOCK", "manifest.json", "notes.txt", again.file.path.name}


def test_files_are_for_their_owner_only(tmp_path: Path) -> None:
    store = fresh(tmp_path / "run")
    store.put("small", value(1, "small"))
    store.commit({})
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "run").iterdir()} == {0o600}
    assert (tmp_path / "run").stat().st_mode & 0o777 == 0o700


def test_a_manifest_that_was_replaced_before_an_error_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = fresh(tmp_path / "run")
    store.put("small", value(1, "small"))

    def replaced_then_failed(self: manifest.KeptFolder, content: bytes) -> None:
        (self.path / "manifest.json").write_bytes(content)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(manifest.KeptFolder, "replace", replaced_then_failed)
        with pytest.raises(KeyboardInterrupt):
            store.commit({"step": 1})
    store.put("small", value(2, "small"))
    store.close()
    again = GenerationStore(tmp_path / "run")
    assert torch.equal(read(again, "small"), value(1, "small"))


def test_a_temporary_store_has_one_half_and_goes_with_its_file(tmp_path: Path) -> None:
    store = GenerationStore(None, beside=tmp_path)
    store.reserve([("small", torch.float32, (7,), 0, CHUNK)])
    store.put("small", value(1, "small"))
    with pytest.raises(StorageError, match="path"):
        store.commit({})
    file = store.file
    store.close()
    del store
    assert torch.equal(file.view("small"), value(1, "small"))
    assert len(os.listdir(tmp_path)) == 1
    del file
    assert os.listdir(tmp_path) == []


def test_use_after_close_and_before_the_first_write_is_refused(tmp_path: Path) -> None:
    store = fresh(tmp_path / "run")
    with pytest.raises(StorageError, match="no stored value"):
        read(store, "small")
    with pytest.raises(StorageError, match="nothing was committed"):
        store.rollback()
    store.close()
    with pytest.raises(StorageError, match="closed"):
        store.put("small", value(1, "small"))
