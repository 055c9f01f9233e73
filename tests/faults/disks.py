"""Disks that fail on purpose, behind the reader of a wrapped model or behind everything that is made while a model is wrapped.

A disk is a `Backend` that counts its calls. `under(model, disk)` puts it beneath a model that is wrapped already, with nothing read
ahead, and takes it away again; `beneath_all(monkeypatch, disk)` makes every reader and store made from then on use it.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import pytest
from torch import nn

import torchwrap as tw
from tests.hangs import answering, hanging_now
from torchwrap.core.errors import StorageError
from torchwrap.storage.backend import Backend
from torchwrap.storage.ringpool import RingPool

__all__ = ["Disk", "beneath_all", "erring", "fails", "flipped", "hanging", "interrupted", "settle", "short", "under", "zeroed"]

Read = Callable[[int, memoryview, int], int]
"""Real read: (descriptor, target, offset) -> bytes read."""

_DEADLINE_S = 20.0


class Disk(Backend):
    """Real calls, except what `read(number, real, fd, target, offset)` and `write(number)` make of them.

    Args:
        read: stands in for call `number` (from 0) of `pread`.
        write: raises what call `number` of `pwrite`, `reserve` and `sync` together shall raise, or gives the bytes to accept.
    """

    def __init__(
        self,
        read: Callable[[int, Read, int, memoryview, int], int] | None = None,
        write: Callable[[int], int | None] | None = None,
    ) -> None:
        self.reads = self.writes = self.hits = 0
        self._read, self._write, self._lock = read, write, threading.Lock()

    def pread(self, fd: int, target: memoryview, offset: int) -> int:
        with self._lock:
            number, self.reads = self.reads, self.reads + 1
        return read_plainly(fd, target, offset) if self._read is None else self._read(number, read_plainly, fd, target, offset)

    def pwrite(self, fd: int, source: memoryview, offset: int) -> int:
        accepted = self._next_write()
        return super().pwrite(fd, source if accepted is None else source[:accepted], offset)

    def reserve(self, fd: int, offset: int, nbytes: int) -> None:
        self._next_write()
        super().reserve(fd, offset, nbytes)

    def sync(self, fd: int) -> None:
        self._next_write()
        super().sync(fd)

    def _next_write(self) -> int | None:
        with self._lock:
            number, self.writes = self.writes, self.writes + 1
        return None if self._write is None else self._write(number)


def read_plainly(fd: int, target: memoryview, offset: int) -> int:
    """A real read; an odd length goes through an ordinary descriptor, as O_DIRECT itself would refuse it and a failing disk would not."""
    if len(target) % 4096 == 0:
        return os.preadv(fd, [target], offset)
    other = os.open(f"/proc/self/fd/{int(fd)}", os.O_RDONLY)
    try:
        return os.preadv(other, [target], offset)
    finally:
        os.close(other)


def error(code: int) -> OSError:
    """What the system raises with this number."""
    return OSError(code, os.strerror(code))


def short(nbytes: int) -> Disk:
    """Gives at most `nbytes` bytes at a time."""
    return Disk(lambda number, real, fd, target, offset: real(fd, target[:nbytes], offset))


def interrupted(every: int = 2) -> Disk:
    """Each `every`-th call is interrupted by a signal before anything was read."""

    def read(number: int, real: Read, fd: int, target: memoryview, offset: int) -> int:
        if number % every == 0:
            raise InterruptedError(errno.EINTR, "interrupted")
        return real(fd, target, offset)

    return Disk(read)


def erring(*numbers: int, code: int = errno.EIO) -> Disk:
    """Fails in the calls of these numbers, once each; a call repeated has another number."""

    def read(number: int, real: Read, fd: int, target: memoryview, offset: int) -> int:
        if number in numbers:
            disk.hits += 1
            raise error(code)
        return real(fd, target, offset)

    disk = Disk(read)
    return disk


def fails(raised: Callable[[], BaseException]) -> Disk:
    """Fails in every call."""

    def read(number: int, real: Read, fd: int, target: memoryview, offset: int) -> int:
        raise raised()

    return Disk(read)


def flipped(number: int, bit: int = 3) -> Disk:
    """Gives one wrong bit in the middle of what call `number` reads, and in what any call reads if `number` is negative."""
    return _spoiling(number, lambda target: target.__setitem__(len(target) // 2, target[len(target) // 2] ^ 1 << bit))


def zeroed(number: int) -> Disk:
    """Gives a block of zeros within what call `number` reads, and within what any call reads if `number` is negative."""

    def spoil(target: memoryview) -> None:
        middle = len(target) // 2 // 4096 * 4096
        target[middle : middle + 4096] = bytes(len(target[middle : middle + 4096]))

    return _spoiling(number, spoil)


def _spoiling(wanted: int, spoil: Callable[[memoryview], None]) -> Disk:
    def read(number: int, real: Read, fd: int, target: memoryview, offset: int) -> int:
        count = real(fd, target, offset)
        if number == wanted or wanted < 0:
            disk.hits += 1
            spoil(target[:count])
        return count

    disk = Disk(read)
    return disk


class Hanging(Disk):
    """Call `number` blocks until `release`; the others are served. It then reads what it was asked for."""

    def __init__(self, number: int) -> None:
        super().__init__(self._hang)
        self._wanted, self._go, self.began, self.ended = number, threading.Event(), threading.Event(), threading.Event()

    def _hang(self, number: int, real: Read, fd: int, target: memoryview, offset: int) -> int:
        if number != self._wanted:
            with answering():
                return real(fd, target, offset)
        with hanging_now():
            self.began.set()
            self._go.wait(_DEADLINE_S)
        try:
            return real(fd, target, offset)
        finally:
            self.ended.set()

    def release(self) -> None:
        """Let the call go on, and wait until it has written what it read."""
        self._go.set()
        if self.began.is_set():
            assert self.ended.wait(_DEADLINE_S)


def hanging(number: int) -> Hanging:
    """See `Hanging`."""
    return Hanging(number)


def settle(model: nn.Module) -> None:
    """Wait until nothing is being read for the model."""
    engine = tw.handle_of(model, "offload").engine
    for fetch in list(engine._fetches.values()) if engine is not None else ():
        if fetch.ticket is not None:
            with suppress(StorageError):
                fetch.ticket.wait(_DEADLINE_S)


@contextmanager
def under(model: nn.Module, disk: Backend, *, trim: bool = True) -> Iterator[None]:
    """The disk serves the model's reads within the block; with `trim`, nothing that was read before is left."""
    handle = tw.handle_of(model, "offload")
    settle(model)
    if trim:
        handle.trim()
    healthy = _serve(handle.reader, disk)
    try:
        yield
    finally:
        settle(model)
        _serve(handle.reader, healthy)


def _serve(reader: object, disk: Backend) -> Backend:
    before: Backend = reader.backend
    reader.backend = disk
    if isinstance(reader._pool, RingPool):
        reader._pool.stop(0.0)
        reader._pool = None  # a ring stays with the disk that it was made for
    elif reader._pool is not None:
        reader._pool.backend = disk
    return before


def beneath_all(monkeypatch: pytest.MonkeyPatch, disk: Backend) -> None:
    """The disk serves everything that is opened from now on in this test."""
    monkeypatch.setattr("torchwrap.storage.aio.Backend", lambda: disk)
    monkeypatch.setattr("torchwrap.storage.spill.Backend", lambda: disk)
