"""The reader delivers exactly the file's bytes, or a typed error: for every alignment, and for everything a disk can do."""

from __future__ import annotations

import errno
import gc
import os
import pickle
import shutil
import threading
import time
import warnings
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from tests.storage.rings import beneath_every_reader
from torchwrap.core.errors import CorruptDataError, StorageError, TorchwrapWarning
from torchwrap.storage import Backend, Part, Read, Reader, TensorFile, allocate, patience, probe, sum64, workers
from torchwrap.storage.uring import unavailable_reason

SIZE = 150_001


@pytest.fixture(
    autouse=True,
    params=["threads", pytest.param("ring", marks=pytest.mark.skipif(bool(unavailable_reason()), reason=f"{unavailable_reason()}"))],
)
def reads_by(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """All of this with threads that read, and with one thread and io_uring."""
    if request.param == "ring":
        beneath_every_reader(monkeypatch)
    return str(request.param)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("reader") / "model.safetensors"
    values = torch.randint(0, 255, (SIZE,), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    save_file({"x": values}, path)
    return path


@pytest.fixture
def file(path: Path) -> Iterator[TensorFile]:
    with TensorFile.open(path) as file:
        yield file


def read_all(reader: Reader, file: TensorFile, **changes: Any) -> bytes:
    """The whole tensor "x", landed in place."""
    segment = file.segments["x"]
    start = segment.offset % 4096
    buffer = allocate(segment.nbytes + 8192)
    read = Read(file, segment.offset, segment.nbytes, buffer, start, (replace(file.part("x"), **changes),))
    reader.submit([read]).wait()
    return bytes(buffer.memory[start : start + segment.nbytes])


def content(file: TensorFile) -> bytes:
    return file.path.read_bytes()[file.segments["x"].offset :]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_range_lands_exactly_and_touches_only_its_own_blocks(path: Path, data: st.DataObject) -> None:
    whole = path.read_bytes()
    mode = data.draw(st.sampled_from(["auto", "buffered"]))
    chunk = data.draw(st.sampled_from([4096, 8192, 65536]))
    with TensorFile.open(path) as file, Reader(3, chunk, mode=mode) as reader:  # type: ignore[arg-type]
        buffer = allocate(1 << 20)
        buffer.tensor().fill_(0xAA)
        reads, at = [], 0
        for number in range(data.draw(st.integers(1, 5))):
            offset = data.draw(st.integers(0, len(whole)))
            nbytes = data.draw(st.integers(0, len(whole) - offset))
            congruent = data.draw(st.booleans())  # then it is read in place
            start = at + (offset % 4096 if congruent else data.draw(st.integers(0, 4095)))
            cut = data.draw(st.integers(0, nbytes))
            first = Part(f"{number} a", offset, cut, crc32=zlib.crc32(whole[offset : offset + cut]))
            reads.append(Read(file, offset, nbytes, buffer, start, (first, Part(f"{number} b", offset + cut, nbytes - cut))))
            at = -(-(start + nbytes) // 4096) * 4096
        if at > buffer.nbytes:
            return
        ticket = reader.submit(reads)
        ticket.wait()
    for read in reads:
        assert buffer.memory[read.start : read.start + read.nbytes] == whole[read.offset : read.offset + read.nbytes]
        for part in read.parts:
            assert ticket.sums[part.name] == sum64(whole[part.offset : part.offset + part.nbytes])
    assert bytes(buffer.memory[at:]) == b"\xaa" * (buffer.nbytes - at)
    assert ticket.nbytes == sum(read.nbytes for read in reads)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    offset=st.integers(0, 20_000),
    nbytes=st.integers(1, 60_000),
    before=st.integers(0, 5000),
    after=st.integers(0, 5000),
    congruent=st.booleans(),
    odd=st.integers(1, 4095),
)
def test_a_target_without_room_around_it_is_not_overrun(
    path: Path, offset: int, nbytes: int, before: int, after: int, congruent: bool, odd: int
) -> None:
    """Nothing outside the target is written; inside it, only the blocks that an in-place read touches."""
    buffer = allocate(3 * 4096 + before + nbytes + after)
    buffer.tensor().fill_(0xAA)
    # The address decides whether blocks are read in place, so it is chosen here and not left to the allocator.
    begin = 4096 + (offset - before + (0 if congruent else odd)) % 4096
    end = begin + before + nbytes + after
    with TensorFile.open(path) as file, Reader(2, 8192) as reader:
        reader.submit([Read(file, offset, nbytes, buffer.memory[begin:end], before)]).wait()
    first, last = begin + before, begin + before + nbytes
    assert buffer.memory[first:last] == path.read_bytes()[offset : offset + nbytes]
    if congruent:
        first, last = max(begin, first // 4096 * 4096), min(end, -(-last // 4096) * 4096)
    assert bytes(buffer.memory[:first]) == b"\xaa" * first
    assert bytes(buffer.memory[last:]) == b"\xaa" * (buffer.nbytes - last)


def test_congruent_reads_are_not_copied(file: TensorFile, faulty: Any) -> None:
    addresses: list[int] = []

    class Watching(Backend):
        def pread(self, fd: int, target: memoryview, offset: int) -> int:
            addresses.append(torch.frombuffer(target, dtype=torch.uint8).data_ptr() - offset)
            return super().pread(fd, target, offset)

    buffer, segment = allocate(SIZE + 8192), file.segments["x"]
    with Reader(chunk=16384, backend=Watching()) as reader:
        reader.submit([Read(file, segment.offset, segment.nbytes, buffer, segment.offset % 4096)]).wait()
    assert set(addresses) == {buffer.address - segment.offset + segment.offset % 4096}


FAULTS: dict[str, Callable[[int, str], BaseException | int | None]] = {
    "short reads": lambda n, _: 1 + 977 * n % 5000,
    "one byte at a time at first": lambda n, _: 1 if n < 40 else None,
    "blocks of 512": lambda n, _: 512 if n % 3 else None,
    "interrupted": lambda n, _: InterruptedError() if n % 2 else None,
    "EIO once per request": lambda n, _: OSError(errno.EIO, "Input/output error") if n == 1 else None,
    "O_DIRECT refused later": lambda n, _: OSError(errno.EINVAL, "Invalid argument") if n == 2 else None,
    "slow": lambda n, _: time.sleep(0.005),
}


@pytest.mark.filterwarnings("ignore::torchwrap.core.errors.TorchwrapWarning")
@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS.keys())
def test_disk_hiccups_do_not_change_a_byte(file: TensorFile, faulty: Any, fault: Any) -> None:
    expected = content(file)
    with Reader(2, 16384, backend=faulty(fault)) as reader:
        assert read_all(reader, file, sum64=sum64(expected), crc32=zlib.crc32(expected)) == expected
        assert reader.stats.bytes == SIZE


@pytest.mark.parametrize("first", range(12))
def test_error_at_any_call_is_typed_and_the_reader_goes_on(file: TensorFile, faulty: Any, first: int) -> None:
    backend = faulty(lambda n, _: OSError(errno.EIO, "Input/output error") if n >= first else None)
    with Reader(2, 16384, backend=backend) as reader:
        if first < 10:
            with pytest.raises(StorageError, match=rf"{file.path}, offset \d+") as caught:
                read_all(reader, file)
            assert isinstance(caught.value.__cause__, OSError)
        backend.fault = lambda n, _: None
        assert read_all(reader, file) == content(file)


def test_an_exception_that_is_no_os_error_reaches_the_waiter(file: TensorFile, faulty: Any) -> None:
    with Reader(backend=faulty(lambda n, _: KeyboardInterrupt())) as reader, pytest.raises(StorageError) as caught:
        read_all(reader, file)
    assert isinstance(caught.value.__cause__, KeyboardInterrupt)


@pytest.mark.parametrize("field", ["sum64", "crc32"])
def test_wrong_bytes_name_file_tensor_expected_and_got(file: TensorFile, field: str) -> None:
    class Lying(Backend):
        def pread(self, fd: int, target: memoryview, offset: int) -> int:
            count = super().pread(fd, target, offset)
            if offset == 16384:
                target[5] ^= 1
            return count

    expected = {"sum64": sum64, "crc32": zlib.crc32}[field](content(file))
    with Reader(chunk=16384, backend=Lying()) as reader, pytest.raises(CorruptDataError) as caught:
        read_all(reader, file, **{field: expected})
    message = str(caught.value)
    assert all(piece in message for piece in (str(file.path), "'x'", field, f"{expected:#x}"))


def test_truncated_file_is_an_error_never_garbage(tmp_path: Path, path: Path) -> None:
    other = tmp_path / "model.safetensors"
    for size in (SIZE - 1, 100_000, 4096, 0):
        shutil.copy(path, other)
        with TensorFile.open(other) as file, Reader(2, 16384) as reader:
            os.truncate(other, size)
            with pytest.raises(CorruptDataError, match=str(other)):
                read_all(reader, file)


def test_file_changed_while_it_is_read_is_an_error(tmp_path: Path, path: Path) -> None:
    other = tmp_path / "model.safetensors"
    shutil.copy(path, other)
    os.utime(other, ns=(1, 1))

    class Changing(Backend):
        def pread(self, fd: int, target: memoryview, offset: int) -> int:
            if offset == 32768:
                with open(other, "r+b") as writer:
                    writer.seek(-1, os.SEEK_END)
                    writer.write(b"z")
            return super().pread(fd, target, offset)

    with TensorFile.open(other) as file, Reader(1, 16384, backend=Changing()) as reader, pytest.raises(CorruptDataError, match="changed"):
        read_all(reader, file)


def test_refused_direct_reads_fall_back_with_one_warning(file: TensorFile, faulty: Any) -> None:
    backend = faulty(lambda n, _: OSError(errno.EINVAL, "Invalid argument") if n == 0 else None)
    with Reader(1, 16384, backend=backend) as reader:
        with pytest.warns(TorchwrapWarning, match="O_DIRECT") as caught:
            assert read_all(reader, file) == content(file)
        assert caught[0].filename == __file__
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert read_all(reader, file) == content(file)


def test_refusal_at_open_falls_back_too(file: TensorFile, monkeypatch: pytest.MonkeyPatch) -> None:
    original = TensorFile.fd

    def refuse(self: TensorFile, direct: bool) -> int:
        if direct:
            raise OSError(errno.EINVAL, "Invalid argument")
        return original(self, direct)

    monkeypatch.setattr(TensorFile, "fd", refuse)
    with Reader() as reader, pytest.warns(TorchwrapWarning, match="O_DIRECT"):
        assert read_all(reader, file) == content(file)
    with Reader(mode="direct") as reader, pytest.raises(StorageError, match="O_DIRECT"):
        read_all(reader, file)


def test_direct_mode_does_not_fall_back_silently(file: TensorFile, faulty: Any) -> None:
    backend = faulty(lambda n, _: OSError(errno.EINVAL, "Invalid argument"))
    with Reader(1, backend=backend, mode="direct") as reader, pytest.raises(StorageError, match="O_DIRECT"):
        backend.fault = lambda n, _: OSError(errno.EINVAL, "Invalid argument") if n == 0 else None
        read_all(reader, file)


def test_tickets_finish_in_order_of_submission(file: TensorFile) -> None:
    offsets: list[int] = []

    class Noting(Backend):
        def pread(self, fd: int, target: memoryview, offset: int) -> int:
            offsets.append(offset)
            return super().pread(fd, target, offset)

    with Reader(1, 16384, backend=Noting()) as reader:
        buffers = [allocate(40960) for _ in range(3)]
        tickets = [reader.submit([Read(file, at, 40960, buffer)]) for at, buffer in zip((81920, 0, 40960), buffers, strict=True)]
        tickets[-1].wait()
        assert all(ticket.done() for ticket in tickets)
    assert [offset // 40960 for offset in offsets] == sorted([offset // 40960 for offset in offsets], key=[2, 0, 1].index)


class Hanging(Backend):
    """A disk that answers when told."""

    def __init__(self) -> None:
        self.asked, self.answer = threading.Event(), threading.Event()

    def pread(self, fd: int, target: memoryview, offset: int) -> int:
        self.asked.set()
        self.answer.wait(20)
        return super().pread(fd, target, offset)


def test_watchdog_raises_instead_of_hanging_and_the_read_may_still_finish(file: TensorFile) -> None:
    disk, buffer = Hanging(), allocate(8192)
    with Reader(1, backend=disk, timeout_s=0.05) as reader:
        ticket = reader.submit([Read(file, 4096, 4096, buffer)])
        with pytest.raises(StorageError, match=f"{file.path}, offset 4096"):
            ticket.wait()
        assert not ticket.done()
        disk.answer.set()
        ticket.wait(20)
        assert buffer.memory[:4096] == file.path.read_bytes()[4096:8192]


def test_watchdog_counts_time_without_progress_not_time_in_all(file: TensorFile, faulty: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]

    def slow(number: int, kind: str) -> None:
        now[0] += 0.2

    for module in (patience, workers):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now[0]))
    with Reader(1, 4096, backend=faulty(slow), timeout_s=0.3) as reader:
        assert read_all(reader, file) == content(file)
        assert reader.stats.busy_s > 0.3


def test_close_while_the_disk_hangs_returns_and_fails_what_had_not_begun(file: TensorFile) -> None:
    disk, buffer = Hanging(), allocate(16384)
    reader = Reader(1, backend=disk)
    begun = reader.submit([Read(file, 0, 4096, buffer)])
    waiting = reader.submit([Read(file, 4096, 4096, buffer, 4096)])
    assert disk.asked.wait(20)
    reader.close(timeout_s=0.05)
    with pytest.raises(StorageError, match="closed"):
        waiting.wait()
    assert not begun.done()
    buffer.free()
    disk.answer.set()
    begun.wait(20)
    with pytest.raises(StorageError, match="closed"):
        reader.submit([])
    reader.close()


def threads_named(name: str) -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith(name) and thread.is_alive()]


def test_threads_end_with_close_and_with_the_reader(file: TensorFile, reads_by: str) -> None:
    before = len(threads_named("torchwrap-read"))
    reader = Reader(3)
    read_all(reader, file)
    assert len(threads_named("torchwrap-read")) == before + {"threads": 3, "ring": 1}[reads_by]
    assert all(thread.daemon for thread in threads_named("torchwrap-read"))
    del reader
    gc.collect()
    assert len(threads_named("torchwrap-read")) == before


def test_a_finished_ticket_keeps_neither_file_nor_memory_alive(path: Path) -> None:
    with Reader() as reader:
        with TensorFile.open(path) as other:
            read_all(reader, other)  # from now on the reader has everything it needs for itself
        del other
        gc.collect()
        before = len(os.listdir("/proc/self/fd"))
        file = TensorFile.open(path)
        ticket = reader.submit([Read(file, 0, 100, allocate(4096))])
        ticket.wait()
        file.close()
        del file
        gc.collect()
        assert len(os.listdir("/proc/self/fd")) == before
        assert ticket.done()


def test_closing_a_file_under_a_running_read_is_safe(path: Path) -> None:
    disk, buffer, file = Hanging(), allocate(4096), TensorFile.open(path)
    with Reader(1, backend=disk) as reader:
        ticket = reader.submit([Read(file, 0, 4096, buffer)])
        assert disk.asked.wait(20)
        file.close()
        decoys = [os.open("/dev/zero", os.O_RDONLY) for _ in range(8)]
        disk.answer.set()
        ticket.wait(20)
        assert buffer.memory[:4096] == path.read_bytes()[:4096]
        for decoy in decoys:
            os.close(decoy)


def test_pickled_reader_has_no_threads_and_works(file: TensorFile) -> None:
    with Reader(2, 16384, timeout_s=7) as reader:
        read_all(reader, file)
        copy = pickle.loads(pickle.dumps(reader))
    assert copy._pool is None
    assert (copy.threads, copy.chunk, copy.timeout_s, copy.stats.bytes) == (2, 16384, 7, 0)
    with copy:
        assert read_all(copy, file) == content(file)


def test_ticket_cannot_be_pickled(file: TensorFile) -> None:
    with Reader() as reader, pytest.raises(TypeError):
        pickle.dumps(reader.submit([Read(file, 0, 8, allocate(1))]))


FORK = """
import os, sys, threading
from tests.storage.forks import reads_in_a_child
from torchwrap.storage import Backend, Read, Reader, TensorFile, allocate
class Hanging(Backend):
    hang = threading.Event()
    def pread(self, fd, target, offset):
        if os.getpid() == parent: self.hang.wait(20)
        return super().pread(fd, target, offset)
parent = os.getpid()
file, reader, buffer = TensorFile.open(sys.argv[1]), Reader(2, backend=Hanging()), allocate(8192)
ticket = reader.submit([Read(file, 0, 4096, buffer)])
status = reads_in_a_child(file, reader, ticket, buffer)
Hanging.hang.set()
ticket.wait(20)
assert buffer.memory[:4096] == open(sys.argv[1], "rb").read()[:4096]
print("child", status)
"""


def test_forked_child_gets_fresh_threads_and_a_typed_error_for_old_tickets(path: Path, python: Any) -> None:
    out, err = python(FORK, path).communicate(timeout=240)
    assert out == "child 0\n", err


def test_nothing_to_read_is_done_at_once(file: TensorFile) -> None:
    with Reader() as reader:
        ticket = reader.submit([Read(file, 10, 0, allocate(1), 0, (Part("none", 10, 0, sum64=0, crc32=0),))])
        assert ticket.done()
        ticket.wait()
        assert ticket.sums == {"none": 0}
        assert reader._pool is None or not reader._pool._workers


@pytest.mark.parametrize(
    "change",
    [{"start": 4000}, {"start": -1}, {"offset": -1}, {"target": memoryview(b"x" * 8192)}, {"parts": (Part("p", 0, 5000),)}],
    ids=["too late", "negative start", "negative offset", "read-only", "part outside"],
)
def test_impossible_read_is_refused(file: TensorFile, change: dict[str, Any]) -> None:
    with Reader() as reader, pytest.raises(ValueError, match=r"fit|inside"):
        reader.submit([replace(Read(file, 0, 4096, allocate(4096)), **change)])


@pytest.mark.parametrize("change", [{"threads": 0}, {"chunk": 1}, {"timeout_s": 0}, {"mode": "fast"}], ids=str)
def test_impossible_reader_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="no way to read"):
        Reader(**change)


def test_submit_from_many_threads(file: TensorFile) -> None:
    results: list[bool] = []
    with Reader(3, 8192) as reader:
        workers = [threading.Thread(target=lambda: results.append(read_all(reader, file) == content(file))) for _ in range(6)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    assert results == [True] * 6


def test_probe_finds_a_rate(file: TensorFile) -> None:
    found = probe(file, seconds=0.03)
    assert found.bytes_per_s > 0
    assert (found.threads, found.chunk) in ((2, 4 << 20), (2, 16 << 20), (4, 4 << 20))
