"""io_uring: real reads, real errors of the kernel, and memory that it may still write to when everybody else has let go of it."""

from __future__ import annotations

import errno
import gc
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import torchwrap as tw
from tests.faults.subjects import IDS, lean, probe, tower
from torchwrap.core.errors import ConfigError, CorruptDataError, StorageError
from torchwrap.storage import Part, Read, Reader, TensorFile, allocate, sum64, uring
from torchwrap.storage.uring import Ring, unavailable_reason

pytestmark = pytest.mark.skipif(bool(unavailable_reason()), reason=f"io_uring: {unavailable_reason()}")


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "data"
    path.write_bytes(os.urandom(300_001))
    return path


@pytest.fixture
def file(tmp_path: Path) -> Iterator[TensorFile]:
    path = tmp_path / "data.safetensors"
    save_file({"x": torch.randint(0, 255, (400_001,), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))}, path)
    with TensorFile.open(path) as file:
        yield file


def eventually(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 20
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.002)
    return True


def pool_of(reader: Reader) -> Any:
    return reader._pool


def reading() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("torchwrap-read")]


class Plain:
    """A descriptor as a reader sees a file."""

    def __init__(self, fd: int, path: str = "somewhere") -> None:
        self._fd, self.path = fd, Path(path)

    def fd(self, direct: bool) -> int:
        return self._fd

    def check_unchanged(self) -> None:
        pass


class Pipe(Plain):
    """A disk that answers when told: what is written into the pipe is what a read of it brings."""

    def __init__(self) -> None:
        out, self._into = os.pipe()
        super().__init__(out, "pipe")

    def answer(self, content: bytes) -> None:
        assert os.write(self._into, content) == len(content)

    def close(self) -> None:
        os.close(self._fd)
        os.close(self._into)


@pytest.fixture
def pipe() -> Any:
    pipe = Pipe()
    yield pipe
    pipe.close()


# The ring by itself.


def test_many_rounds_of_reads_bring_the_bytes_of_the_file(path: Path) -> None:
    """More rounds than the rings have places, so that their counters run round them."""
    whole, target, fd = path.read_bytes(), memoryview(bytearray(300_001)), os.open(path, os.O_RDONLY)
    ring = Ring(3)
    for number in range(100):
        target[:] = bytes(300_001)
        for token in range(3):
            ring.start(token, fd, target[token * 100_000 : (token + 1) * 100_000], token * 100_000)
        found: dict[int, Any] = {}
        while len(found) < 3:
            found.update(ring.wait())
        assert found == dict.fromkeys(range(3), 100_000), number
        assert target[:300_000] == whole[:300_000]
    ring.close()
    os.close(fd)


def test_errors_of_the_kernel_are_those_of_a_read(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    ring, target = Ring(2), memoryview(bytearray(5000))
    for wrong, number in (((fd, target[1:100], 0), errno.EINVAL), ((100_000, target, 0), errno.EBADF)):
        ring.start(7, *wrong)
        [(token, error)] = ring.wait()
        assert token == 7 and isinstance(error, OSError) and error.errno == number
    ring.start(1, os.open(path, os.O_RDONLY), target, 300_000)
    assert ring.wait() == [(1, 1)], "the end of a file is a short read"
    ring.start(1, os.open(path, os.O_RDONLY), target, 400_000)
    assert ring.wait() == [(1, 0)]
    ring.close()


def test_wake_ends_the_wait_of_another_thread_and_of_the_next() -> None:
    ring, seen = Ring(1), []
    waiting = threading.Thread(target=lambda: seen.append(ring.wait()))
    waiting.start()
    ring.wake()
    waiting.join(20)
    ring.wake()
    assert seen == [[]] and ring.wait() == []
    ring.close()


def test_a_ring_gives_its_descriptors_back() -> None:
    before, rings = descriptors(), set(uring._open)
    for _ in range(20):
        ring = Ring(4)
        ring.wake()
        ring.wait()
        ring.close()
    assert descriptors() <= before and uring._open == rings


def test_memory_that_the_kernel_may_write_to_outlives_everybody(pipe: Pipe) -> None:
    """Ring and buffer are dropped by all who know them while a read is under way."""
    ring, buffer = Ring(1), allocate(8192)
    ring.start(0, pipe.fd(False), buffer.memory[:4096], 0)
    ring.wake()
    ring.wait()  # the kernel has it
    known, dropped = weakref.ref(ring), weakref.ref(buffer)
    del ring, buffer
    gc.collect()
    assert dropped() is None
    ring = known()
    assert ring is not None
    memory = ring._memory[0]
    pipe.answer(b"x" * 4096)
    assert ring.wait() == [(0, 4096)]
    assert memory == b"x" * 4096 and 0 not in ring._memory
    ring.close()
    assert ring not in uring._open


def test_close_waits_for_what_is_under_way(pipe: Pipe) -> None:
    ring, target = Ring(1), memoryview(bytearray(4096))
    ring.start(0, pipe.fd(False), target, 0)
    ring.wake()
    ring.wait()
    closing = threading.Thread(target=ring.close)
    closing.start()
    closing.join(0.05)
    assert closing.is_alive()
    pipe.answer(b"y" * 4096)
    closing.join(20)
    assert bytes(target) == b"y" * 4096 and ring not in uring._open


# A reader on it.


@pytest.mark.parametrize("chunk", [4096, 16384, 1 << 20])
def test_reads_are_exact_and_summed_by_one_thread(file: TensorFile, chunk: int) -> None:
    whole, buffer = file.path.read_bytes(), allocate(400_000)
    others = reading()
    parts = (Part("a", 5, 100_000, sum64=sum64(whole[5:100_005])), Part("b", 100_005, 199_996))
    with Reader(3, chunk, mode="uring") as reader:
        ticket = reader.submit([Read(file, 5, 300_000, buffer, 5, parts), Read(file, 7, 9000, buffer, 310_000)])
        ticket.wait()
        names = [thread.name for thread in reading() if thread not in others]
    assert buffer.memory[5:300_005] == whole[5:300_005] and buffer.memory[310_000:319_000] == whole[7:9007]
    assert ticket.sums["b"] == sum64(whole[100_005:300_001])
    assert names == ["torchwrap-read-0"]


def test_sums_are_taken_when_nobody_waits(file: TensorFile) -> None:
    with Reader(2, 4096, mode="uring") as reader:
        ticket = reader.submit([Read(file, 0, 200_000, allocate(200_000), 0, (Part("all", 0, 200_000),))])
        assert eventually(ticket.done)
        assert ticket.sums["all"] == sum64(file.path.read_bytes()[:200_000])


def test_a_truncated_file_is_an_error(file: TensorFile) -> None:
    os.truncate(file.path, 100_000)
    with Reader(2, 16384, mode="uring") as reader, pytest.raises(CorruptDataError, match="data"):
        reader.submit([Read(file, 0, 200_000, allocate(200_000))]).wait()


def test_an_error_of_the_disk_is_retried_once_and_typed() -> None:
    """Memory that is not mapped is a bad sector, to the kernel too: EIO."""
    disk = Plain(os.open("/proc/self/mem", os.O_RDONLY), "sick disk")
    with Reader(1, mode="uring") as reader:
        with pytest.raises(StorageError, match="sick disk, offset 4096") as caught:
            reader.submit([Read(disk, 4096, 4096, allocate(4096))]).wait()
        assert caught.value.__cause__.errno == errno.EIO and reader.stats.retries == 1
    os.close(disk.fd(False))


def test_a_hang_is_an_error_for_its_ticket_and_nobody_else(pipe: Pipe, file: TensorFile) -> None:
    buffer, other = allocate(4096), allocate(4096)
    with Reader(2, mode="uring", timeout_s=0.05) as reader:
        hung = reader.submit([Read(pipe, 0, 4096, buffer)])
        with pytest.raises(StorageError, match=r"no progress for 0\.05 s.*pipe, offset 0|pipe, offset 0"):
            hung.wait()
        assert not hung.done()
        reader.submit([Read(file, 0, 4096, other)]).wait(20)
        assert other.memory[:4096] == file.path.read_bytes()[:4096]
        pipe.answer(b"z" * 4096)
        hung.wait(20)
        assert buffer.memory[:4096] == b"z" * 4096


def test_close_during_a_hang_returns_and_the_kernel_keeps_its_memory(pipe: Pipe) -> None:
    before, others, buffer = descriptors(), set(reading()), allocate(4096)
    tensor = buffer.tensor()
    reader = Reader(1, mode="uring")
    begun = reader.submit([Read(pipe, 0, 4096, buffer)])
    waiting = reader.submit([Read(pipe, 4096, 4096, allocate(4096))])
    assert eventually(lambda: len(pool_of(reader)._active) == 1)
    reader.close(timeout_s=0.05)
    with pytest.raises(StorageError, match="closed"):
        waiting.wait()
    assert not begun.done() and descriptors() > before
    buffer.free()
    del buffer
    pipe.answer(b"w" * 4096)
    begun.wait(20)
    assert bytes(tensor.numpy()) == b"w" * 4096
    assert eventually(lambda: descriptors() <= before and set(reading()) <= others)


def test_a_reader_nobody_has_ends_its_thread_after_a_hang(pipe: Pipe) -> None:
    before, others = descriptors(), set(reading())
    reader = Reader(2, mode="uring")
    reader.submit([Read(pipe, 0, 4096, allocate(4096))])
    pool = weakref.ref(pool_of(reader))
    assert eventually(lambda: len(pool()._active) == 1)
    del reader
    gc.collect()
    assert set(reading()) - others, "its read is still under way"
    pipe.answer(b"v" * 4096)
    assert eventually(lambda: descriptors() <= before and set(reading()) <= others)


EXIT = """
import os, sys, threading
from torchwrap.storage import Read, Reader, allocate
from tests.storage.test_uring import Pipe, TensorFile
pipe, reader = Pipe(), Reader(4, 65536, mode="uring")
targets = [memoryview(bytearray(4096)), allocate(4096), allocate(300_000)]
reader.submit([Read(pipe, 0, 4096, targets[0]), Read(pipe, 4096, 4096, targets[1])])
file = TensorFile.open(sys.argv[1])
tickets = [reader.submit([Read(file, 0, 300_000, targets[2])]) for _ in range(50)]
tickets[0].wait()
print("leaving", flush=True)
sys.exit(7)
"""


def test_the_interpreter_exits_while_reads_are_under_way(file: TensorFile, python: Any) -> None:
    process = python(EXIT, file.path)
    out, err = process.communicate(timeout=240)
    assert (process.returncode, out) == (7, "leaving\n"), err


FORK = """
import os, sys
from tests.storage.forks import reads_in_a_child
from torchwrap.storage import Read, Reader, allocate
from tests.storage.test_uring import Pipe, TensorFile
pipe, file, reader, buffer = Pipe(), TensorFile.open(sys.argv[1]), Reader(2, mode="uring"), allocate(8192)
ticket = reader.submit([Read(pipe, 0, 4096, buffer)])
reader.submit([Read(file, 0, 4096, allocate(4096))]).wait()
status = reads_in_a_child(file, reader, ticket, buffer)
pipe.answer(b"u" * 4096)
ticket.wait(20)
assert buffer.memory[:4096] == b"u" * 4096
reader.submit([Read(file, 0, 4096, buffer)]).wait()
assert buffer.memory[:4096] == open(sys.argv[1], "rb").read()[:4096]
reader.close()
print("child", status)
"""


def test_a_forked_child_has_a_ring_of_its_own_and_leaves_its_parents_alone(file: TensorFile, python: Any) -> None:
    out, err = python(FORK, file.path).communicate(timeout=240)
    assert out == "child 0\n", err


# Where there is none.


@pytest.mark.parametrize("number", [errno.EPERM, errno.ENOSYS, errno.ENOMEM])
def test_a_refusal_is_a_configuration_error_and_auto_does_not_care(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def refuse(*_: int) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(uring, "_call", refuse)
    with pytest.raises(ConfigError, match=errno.errorcode[number]) as caught:
        Reader(mode="uring")
    assert caught.value.where == "io_backend" and 'io_backend="auto"' in str(caught.value)
    model = tower()
    before, classes = descriptors(), [type(module) for module in model.modules()]
    with pytest.raises(ConfigError, match=errno.errorcode[number]):
        lean(model, io_backend="uring")
    assert [type(module) for module in model.modules()] == classes and descriptors() <= before
    assert torch.equal(probe(lean(model)), probe(tower()))


def test_another_processor_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    with pytest.raises(ConfigError, match="aarch64"):
        Reader(mode="uring")


def test_a_refused_enter_leaves_nothing_open(monkeypatch: pytest.MonkeyPatch) -> None:
    before, rings, call = descriptors(), set(uring._open), uring._call
    monkeypatch.setattr(uring, "_call", lambda number, *rest: call(number, *rest) if number == 425 else _refuse())
    with pytest.raises(ConfigError, match="EPERM"):
        Reader(mode="uring")
    assert descriptors() <= before and uring._open == rings


def _refuse() -> int:
    raise PermissionError(errno.EPERM, "Operation not permitted")


def test_no_ring_for_want_of_descriptors_is_a_typed_error(file: TensorFile, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = Reader(mode="uring")

    def none_left(_: int) -> int:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr("os.eventfd", none_left)
    file.fd(True)  # it stays open, as for any reader
    before = descriptors()
    with pytest.raises(StorageError, match="Too many open files"):
        reader.submit([Read(file, 0, 4096, allocate(4096))])
    assert descriptors() <= before
    monkeypatch.undo()
    reader.submit([Read(file, 0, 4096, allocate(4096))]).wait()
    reader.close()


def test_no_thread_for_a_ring_is_an_error_and_the_ring_is_given_back(file: TensorFile, monkeypatch: pytest.MonkeyPatch) -> None:
    def none_left(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    rings = set(uring._open)
    with Reader(mode="uring") as reader:
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", none_left)
            with pytest.raises(RuntimeError, match="new thread"):
                reader.submit([Read(file, 0, 4096, allocate(4096))])
        assert uring._open == rings
        reader.submit([Read(file, 0, 4096, allocate(4096))]).wait(20)


def test_a_reader_that_reads_nothing_makes_no_ring(file: TensorFile) -> None:
    rings = set(uring._open)
    with Reader(mode="uring") as reader:
        reader.submit([]).wait()
        assert uring._open == rings


SANDBOX = """
import ctypes, struct
from torchwrap.core.errors import ConfigError
libc = ctypes.CDLL(None, use_errno=True)
# load the number of the system call; io_uring_setup: refuse with EPERM; anything else: allow
program = b"".join(struct.pack("HBBI", *line) for line in [(0x20, 0, 0, 0), (0x15, 0, 1, 425), (6, 0, 0, 0x50001), (6, 0, 0, 0x7FFF0000)])
kept = ctypes.create_string_buffer(program)
assert libc.prctl(38, 1, 0, 0, 0) == 0
assert libc.prctl(22, 2, struct.pack("HxxxxxxP", 4, ctypes.addressof(kept)), 0, 0) == 0
from torchwrap.storage import Reader
try:
    Reader(mode="uring")
except ConfigError as error:
    print(error)
from tests.faults.subjects import lean, probe, tower
assert probe(lean(tower())).equal(probe(tower()))
"""


def test_a_real_sandbox(python: Any) -> None:
    out, err = python(SANDBOX).communicate(timeout=240)
    assert "EPERM" in out and 'io_backend="auto"' in out, err
    assert not err


# A model on it.


def test_a_model_streams_and_trains_to_the_same_bits() -> None:
    others = reading()
    plain, model = tower().train(), lean(tower(), io_backend="uring").train()
    optimizers = [torch.optim.AdamW(plain.parameters(), fused=True), tw.OffloadedOptimizer(model, torch.optim.AdamW, fused=True)]
    for _ in range(3):
        losses = []
        for each, optimizer in zip((plain, model), optimizers, strict=True):
            optimizer.zero_grad()
            loss = each(IDS).logsumexp(-1).mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        assert torch.equal(*losses)
    assert {thread.name for thread in reading() if thread not in others} == {"torchwrap-read-0"}, (
        "weights and optimizer state, one thread each"
    )
    assert torch.equal(probe(model), probe(plain))
    optimizers[1].close()
    tw.unwrap(model)
